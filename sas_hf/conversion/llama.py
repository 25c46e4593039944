"""Llama-architecture checkpoints (Llama 1-3, SmolLM, TinyLlama, ...): every weight keeps its name."""

from .family import LLAMA_FIELDS, SourceFamily, same, text_architectures


LLAMA = SourceFamily(
    model_type="llama",
    architectures=text_architectures("Llama"),
    fields=LLAMA_FIELDS | same("attention_bias", "mlp_bias"),
)
