"""The cache under both of its names: Transformers 5.24 calls `cache` what was `past_key_values` before.

Can go, for plain `cache`, when 5.23 is no longer supported.
"""

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg


# What the installed version calls it in outputs, and looks for among a checkpointed layer's arguments.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# For a `forward` with the parameter `cache`: takes the old name, too, and warns of it where Transformers' models do.
either_cache_name = deprecate_kwarg(
    "past_key_values", "5.40.0" if CACHE_NAME == "cache" else "5.0.0", new_name="cache"
)
