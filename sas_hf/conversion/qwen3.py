"""Qwen3 checkpoints: Llama's weights, and norms of each query and key head."""

from transformers import Qwen3Config

from .family import LLAMA_FIELDS, SourceFamily, refuse_sliding_window, same, text_architectures


def derive(config: Qwen3Config) -> dict:
    refuse_sliding_window(config, active="sliding_attention" in config.layer_types)
    return {}


QWEN3 = SourceFamily(
    model_type="qwen3",
    architectures=text_architectures("Qwen3"),
    fields=LLAMA_FIELDS | same("attention_bias"),
    constants={"qk_norm": "per_head"},
    derive=derive,
)
