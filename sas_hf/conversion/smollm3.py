"""SmolLM3 checkpoints: Llama's weights, and layers without RoPE."""

from transformers import SmolLM3Config

from .family import LLAMA_FIELDS, SourceFamily, refuse_sliding_window, same, text_architectures


def derive(config: SmolLM3Config) -> dict:
    refuse_sliding_window(config, active="sliding_attention" in config.layer_types)
    return {"no_rope_layers": config.no_rope_layers[: config.num_hidden_layers]}  # the list may be longer


SMOLLM3 = SourceFamily(
    model_type="smollm3",
    architectures=text_architectures("SmolLM3"),
    fields=LLAMA_FIELDS | same("attention_bias", "mlp_bias"),
    derive=derive,
)
