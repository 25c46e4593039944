"""What newer versions of Transformers have, for the older ones that are supported, too (from 5.16 on).

Can go piece by piece as the lower bound in pyproject.toml rises. (What the cache is called is in cache_name.py.)
"""

import torch


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # up to 5.19

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Of hidden states `[B, T, C]`, the last so many positions (0: all) or those of the indices `[N]`."""
        if isinstance(logits_to_keep, int):
            return hidden_states[:, slice(-logits_to_keep, None), :]
        return hidden_states[:, logits_to_keep, :]
