"""Qwen2 and Qwen2.5 checkpoints: Llama's weights, with biases on queries, keys and values alone."""

from transformers import Qwen2Config

from .family import LLAMA_FIELDS, SourceFamily, refuse_sliding_window, text_architectures


def derive(config: Qwen2Config) -> dict:
    refuse_sliding_window(config, active="sliding_attention" in config.layer_types)
    return {}


QWEN2 = SourceFamily(
    model_type="qwen2",
    architectures=text_architectures("Qwen2"),
    fields=LLAMA_FIELDS,
    constants={"attention_bias": True, "attention_output_bias": False},
    derive=derive,
)
