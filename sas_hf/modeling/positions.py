"""Rotary positions: the angles, and their application to the leading features."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .transforms import part_features


class SASRotaryEmbedding(nn.Module):
    """Cosines and sines `[B, T, R]` of the rotary angles; R = `config.rotary_dim`, whatever the simulated width is."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        if config.attention_type == "mla":  # the rotary functions read the rotated width from `head_dim`
            config = copy.copy(config)
            config.head_dim = config.qk_rope_head_dim
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: PreTrainedConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[R/2]` of plain RoPE over `head_dim * partial_rotary_factor` features, and 1.0."""
        dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((frequencies, frequencies), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_leading_features(
    x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """Turn the leading R features of `x` `[B, T, heads, width]` by cos and sin `[B, T, R]`; the rest have no position.

    Pairs are (i, i + R/2), as in Llama. `None` (learned positions) leaves `x` as it is.
    """
    if position_embeddings is None:
        return x
    return turn(x, *(table.unsqueeze(-2) for table in position_embeddings))


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same for any layout with features last, by cos and sin that fit its other axes."""
    width = cos.shape[-1]
    rotary, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    first, second = part_features(rotary, width // 2)
    rotary = rotary * cos + torch.cat((-second, first), dim=-1) * sin
    return rotary if rest is None else torch.cat((rotary, rest), dim=-1)
