"""A checkpoint as it was written, loaded again as a user will load it, beside the model that it was made from."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..hub.belongings import find_licences
from ..hub.checkpoints import load_model, save_model
from ..hub.sentence_modules import copy_sentence_modules
from ..modeling.sharing import auto_class_name
from .family import ConversionError
from .fidelity import Fidelity, Sample, compare_models, outputs_in_float32, outputs_in_own_dtype
from .live import pooler_arguments
from .sources import read_stored_weights


@dataclass
class Verification:
    """How far a written checkpoint is from its source.

    Args:
        fidelity: in float32; against the source with its weights rounded to the written dtype, if they had to be.
        unrounded: the same against the source as it is, if it was rounded for `fidelity`.
        in_saved_dtype: on the first sample, largest differences to the source in float32 when computing in the dtype
            of the weights: the checkpoint's, and the source's own if that is its dtype; `None` for float32 and more.
        parameters: of the checkpoint.
    """

    fidelity: Fidelity
    unrounded: Fidelity | None
    in_saved_dtype: dict | None
    parameters: int


def check_rounding(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise a [`ConversionError`] for a weight that becomes infinite in this dtype, or all zeros."""
    for name, weight in model.named_parameters():
        if torch.promote_types(weight.dtype, dtype) == dtype:
            continue
        largest = max(weight.detach().aminmax(), key=abs)
        rounded = largest.to(dtype)
        kind = str(dtype).removeprefix("torch.")
        if not rounded.isfinite():
            raise ConversionError(
                f"`dtype` {kind} holds numbers up to {torch.finfo(dtype).max:.5g}, but {name} has {largest.item():.5g}"
                "; choose bfloat16 or float32."
            )
        if largest != 0 and rounded == 0:
            raise ConversionError(
                f"`dtype` {kind} would make all of {name} zero (its largest number is {largest.item():.3g}); choose "
                "bfloat16 or float32."
            )


def write_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    processor: PreTrainedTokenizerBase | BaseImageProcessor | None,
    source: str | Path,
    revision: str | None,
) -> None:
    """Write `model` in this dtype (its weights are changed) with what belongs to it of its source."""
    save_model(own_weights(model, dtype), folder, source, revision)
    if processor is not None:
        processor.save_pretrained(folder)
    copy_sentence_modules(source, revision, folder)
    for file in find_licences(source, revision):
        shutil.copyfile(file, folder / file.name)


def verify_written(
    folder: Path,
    model_class: type[PreTrainedModel],
    source: PreTrainedModel,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    exact: bool = True,
    rounded: PreTrainedModel | None = None,
) -> Verification:
    """Compare the checkpoint in `folder`, which is to be of this class and dtype, with `source`.

    Its weights are read from its files as they are used, so that it takes no memory that the system could not free.

    Args:
        exact: `False` compares with the source as it is, whatever was rounded.
        rounded: what was written, if its weights are not the source's, rounded: it takes the source's place where the
            source would be rounded.

    Raises:
        ConversionError: if another model is loaded, or one whose outputs in its own dtype are not finite.
    """
    auto_class = getattr(transformers, auto_class_name(model_class), model_class)
    # Auto classes would make a pooler that is not there.
    arguments = pooler_arguments(model_class, not read_stored_weights(folder, None).has_pooler)
    written, unexpected = load_model(auto_class, folder, None, ConversionError, **arguments)
    dtypes = {weight.dtype for weight in written.parameters()}
    if type(written) is not model_class or dtypes != {dtype} or unexpected:
        raise ConversionError(
            f"{auto_class.__name__} makes a {type(written).__name__} in {dtypes} of what was written (without "
            f"{unexpected[:5]}), not a {model_class.__name__} in {dtype}; nothing was kept."
        )
    if rounded is None:
        rounds = exact and torch.promote_types(source.dtype, dtype) != dtype
        fidelity = compare_models(source, written, samples, dtype if rounds else None)
    else:
        rounds = True
        fidelity = compare_models(rounded, written, samples)
    return Verification(
        fidelity,
        compare_models(source, written, samples) if rounds else None,
        None if dtype.itemsize >= 4 else _differences_in_own_dtype(source, written, samples[0]),
        written.num_parameters(),
    )


def _differences_in_own_dtype(source: PreTrainedModel, written: PreTrainedModel, sample: Sample) -> dict:
    expected, found = outputs_in_float32(source, sample), outputs_in_own_dtype(written, sample)
    own = outputs_in_own_dtype(source, sample) if source.dtype == written.dtype else None
    if not found.isfinite().all() and (own is None or own.isfinite().all()):
        raise ConversionError(
            f"Computing in {str(written.dtype).removeprefix('torch.')}, the checkpoint gives outputs that are not "
            "finite (the source's numbers are too large for it); choose `dtype` bfloat16 or float32. Nothing was "
            "written."
        )
    return {
        "max_abs_difference": _largest_difference(found, expected),
        "source_max_abs_difference": None if own is None else _largest_difference(own, expected),
    }


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float | None:
    """`None` where one is not finite, which JSON has no number for."""
    difference = (found.float() - expected).abs().max()
    return difference.item() if difference.isfinite() else None


def own_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give each weight that is a part or a transposed view of another tensor memory of its own, one after the other:
    saving would copy them all at once."""
    for parameter in model.parameters():
        weight = parameter.data.to(dtype)
        parts = weight.untyped_storage().nbytes() != weight.nbytes
        parameter.data = weight.clone(memory_format=torch.contiguous_format) if parts else weight.contiguous()
    model.config.dtype = dtype
    return model
