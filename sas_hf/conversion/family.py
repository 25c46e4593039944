"""What a source family must say of itself; one module per family gives an instance, the engine does the rest."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class SourceFamily:
    """
    Args:
        model_type: the source's `config.model_type`.
        architectures: source class name → the SAS class with the same head.
        fields: source configuration → the fields of the SAS configuration that make the same function without
            simulation; raises a `ValueError` for what no field can express.
        rename: name of a weight in the source model → its name in the SAS model.
    """

    model_type: str
    architectures: dict[str, type[PreTrainedModel]]
    fields: Callable[[PreTrainedConfig], dict]
    rename: Callable[[str], str]
