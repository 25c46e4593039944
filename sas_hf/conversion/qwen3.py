"""Qwen3 checkpoints: Llama's weights, and norms of each query and key head."""

from .family import LLAMA_FIELDS, SourceFamily, full_attention_only, same, text_architectures


QWEN3 = SourceFamily(
    model_type="qwen3",
    architectures=text_architectures("Qwen3"),
    fields=LLAMA_FIELDS | same("attention_bias"),
    constants={"qk_norm": "per_head"},
    derive=full_attention_only,
)
