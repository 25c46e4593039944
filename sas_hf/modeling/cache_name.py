"""The cache under both of its names: Transformers 5.24 calls `cache` what was `past_key_values` before.

Can go, for plain `cache`, when 5.23 is no longer supported.
"""

import functools
from collections.abc import Callable
from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg


# What the installed version calls it in outputs, and looks for among a checkpointed layer's arguments.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# For a `forward` with the parameter `cache`: takes the old name, too, and warns of it where Transformers' models do.
either_cache_name = deprecate_kwarg(
    "past_key_values", "5.40.0" if CACHE_NAME == "cache" else "5.0.0", new_name="cache"
)


def both_cache_names(inputs: dict) -> dict:
    """The inputs of a step of generation, their cache under its old name, too: for peft's prompt learning, which puts
    its prefix there (peft 0.21)."""
    if CACHE_NAME in inputs:
        inputs["past_key_values"] = inputs[CACHE_NAME]
    return inputs


def takes_both_cache_names(forward: Callable) -> Callable:
    """Lets a `forward` of [`either_cache_name`] take what came of `both_cache_names`: the cache that holds more."""

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        if kwargs.get("cache") is not None and kwargs.get("past_key_values") is not None:
            old = kwargs.pop("past_key_values")
            if old.get_seq_length() > kwargs["cache"].get_seq_length():
                kwargs["cache"] = old
        return forward(*args, **kwargs)

    return wrapped
