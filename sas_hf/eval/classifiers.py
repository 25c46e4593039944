"""What scoring classifiers of texts and of images shares: which checkpoints have one, and how one is loaded."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..hub.checkpoints import AutoClass, classes_made_by, load_config, load_model, read_settings
from .arguments import refuse_named_configuration
from .harness import to_device
from .results import Metric


def require_head(name: str | Path, auto_class: AutoClass, what: str, remedy: str) -> None:
    """
    Refuse a checkpoint that cannot have the head, before data or weights are read.

    Args:
        auto_class: that loads what is scored.
        what: it is, such as "image classifier".
        remedy: how else it can be scored.
    """
    refuse_named_configuration(name)
    model_type = read_settings(name).get("model_type")
    if not any(config_class.model_type == model_type for config_class in classes_made_by(auto_class)):
        raise ValueError(f"{name} has `model_type` {model_type!r}, which has no {what}; {remedy}.")


def find_scored(
    model: str | Path | PreTrainedModel,
    auto_class: AutoClass,
    suffix: str,
    what: str,
    dtype: str | torch.dtype | None,
    device: str | None,
) -> tuple[PreTrainedModel, str]:
    """
    The model to be scored, a live one as it is, and where it came from.

    Args:
        auto_class, suffix, what: as in [`load_with_head`].
        device: of a checkpoint; `None`: the default one.
    """
    if isinstance(model, PreTrainedModel):
        return model, model.name_or_path or ""
    return to_device(load_with_head(model, auto_class, suffix, what, dtype), device), str(model)


def load_with_head(
    name: str | Path, auto_class: AutoClass, suffix: str, what: str, dtype: str | torch.dtype | None
) -> PreTrainedModel:
    """
    A checkpoint in evaluation; a ValueError for one that was saved without the head, which would begin anew.

    Args:
        suffix: of the classes that have it, such as "ForImageClassification".
        what: it is, such as "image classifier".
    """
    config = load_config(name)
    saved = config.architectures or []
    if saved and not any(suffix in architecture for architecture in saved):
        raise ValueError(
            f"{name} holds a {', '.join(saved)}, which has no classifier: it is no {what} yet. Fine-tune it first."
        )
    options: dict[str, Any] = {"config": config, "dtype": dtype or "auto", "use_safetensors": None}
    return load_model(auto_class, name, None, **options)[0].eval()


def mean_score(values: torch.Tensor) -> Metric:
    """The mean of a number per sample, with its standard error."""
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return Metric(values.mean().item(), error)


def require_numbers(logits: torch.Tensor) -> None:
    if not logits.isfinite().all():
        raise ValueError("Logits are not numbers (NaN or infinite): the weights are broken or overflow.")
