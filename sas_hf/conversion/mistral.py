"""Mistral checkpoints: Llama's weights; a sliding window that would act is refused."""

from transformers import MistralConfig

from .family import LLAMA_FIELDS, SourceFamily, refuse_sliding_window, text_architectures


def derive(config: MistralConfig) -> dict:
    refuse_sliding_window(config, active=config.sliding_window is not None)
    return {}


MISTRAL = SourceFamily(
    model_type="mistral",
    architectures=text_architectures("Mistral"),
    fields=LLAMA_FIELDS,
    derive=derive,
)
