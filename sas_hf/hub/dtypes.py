"""Data types by name, as options of commands and functions give them."""

import torch


def parse_dtype(name: str) -> torch.dtype:
    """torch's floating-point dtype of that name; a `ValueError` if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` is {name!r}; it must be a floating-point type such as float32 or bfloat16.")
    return dtype
