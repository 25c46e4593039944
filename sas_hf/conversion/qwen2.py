"""Qwen2 and Qwen2.5 checkpoints: Llama's weights, with biases on queries, keys and values alone."""

from .family import LLAMA_FIELDS, SourceFamily, full_attention_only, text_architectures


QWEN2 = SourceFamily(
    model_type="qwen2",
    architectures=text_architectures("Qwen2"),
    fields=LLAMA_FIELDS,
    constants={"attention_bias": True, "attention_output_bias": False},
    derive=full_attention_only,
)
