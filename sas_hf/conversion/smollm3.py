"""SmolLM3 checkpoints: Llama's weights, and layers without RoPE."""

from typing import cast

from transformers import SmolLM3Config

from .family import LLAMA_FIELDS, SourceFamily, full_attention_only, same, text_architectures


def derive(config: SmolLM3Config) -> dict:
    # The list may be longer than the model.
    return full_attention_only(config) | {
        "no_rope_layers": cast(list[int], config.no_rope_layers)[: config.num_hidden_layers]
    }


SMOLLM3 = SourceFamily(
    model_type="smollm3",
    architectures=text_architectures("SmolLM3"),
    fields=LLAMA_FIELDS | same("attention_bias", "mlp_bias"),
    derive=derive,
)
