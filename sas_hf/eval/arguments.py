"""Checks of what every evaluation is given, before anything is loaded."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ..configurations import NAMED_CONFIGS
from ..hub.dtypes import parse_dtype
from ..report.files import check_writable


def check_arguments(
    model: object,
    limit: int | float | None,
    batch_size: int | str,
    device: str | None,
    dtype: str | torch.dtype | None,
) -> None:
    """Raise a `ValueError` that names the field, its value and what would be right."""
    if limit is not None and not (0 < limit < 1 or (1 <= limit < math.inf and limit == int(limit))):
        raise ValueError(f"`limit` is {limit}; it must be a positive integer, a share between 0 and 1, or None.")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"`batch_size` is {batch_size!r}; it must be 'auto' or a positive integer.")
    if isinstance(model, torch.nn.Module):
        for field, value in (("device", device), ("dtype", dtype)):
            if value is not None:
                raise ValueError(f"`{field}` is {value!r}, but a live model stays as it is; use `model.to`.")
    if dtype not in (None, "auto"):
        parse_dtype(str(dtype).removeprefix("torch."))
    if device is not None:
        check_device(device)


def number_of_samples(limit: int | float | None, available: int) -> int:
    """How many samples a limit leaves of those there are: so many, or that share of them if it is below 1."""
    if limit is None:
        return available
    return min(available, max(1, round(limit * available)) if limit < 1 else int(limit))


def refuse_named_configuration(name: str | Path) -> None:
    """Raise a `ValueError` for the name of one of the papers' models, where a checkpoint is asked for."""
    if name in NAMED_CONFIGS:
        raise ValueError(f"{name!r} is a named configuration, which has no weights; train a model of it first.")


def refuse_unused(options: Mapping[str, object], reason: str) -> None:
    """Raise a `ValueError` for the first of these options that is given, though nothing would heed it.

    Args:
        options: by name; given are those that are neither `None` nor `False`.
        reason: ends the error, such as "there are no tasks".
    """
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"`{name}` is {value!r}, but {reason}; leave it out.")


def check_device(device: str) -> str:
    """The name by which the harness knows this device; a `ValueError` for one that cannot be used here."""
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` is {device!r}, which torch cannot use here: {error}") from error
    if kind == "meta":
        raise ValueError(f"`device` is {device!r}, which holds no numbers; it must be cpu, cuda, ...")
    return "cpu" if kind == "cpu" else str(device)  # of a "cpu:0" the harness would know nothing, and take a GPU


def check_output(output: str | Path) -> None:
    """Raise a `ValueError` for a folder and an `OSError` for a file that cannot be written, now rather than after the
    evaluation."""
    if Path(output).is_dir():
        raise ValueError(f"`output` is {str(output)!r}, a folder; give the name of a JSON file.")
    check_folder("output", Path(output).parent)


def check_folder(field: str, folder: str | Path) -> None:
    """Raise a `PermissionError` when no file can be written into a folder, now rather than after the evaluation."""
    check_writable(Path(folder), f"`{field}` is {str(folder)!r}")
