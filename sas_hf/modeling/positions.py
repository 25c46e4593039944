"""Rotary positions: the angles, their application to the leading features, and the positions of cached keys."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


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
    cos, sin = (table.unsqueeze(-2) for table in position_embeddings)
    width = cos.shape[-1]
    rotary, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    first, second = rotary.chunk(2, dim=-1)
    rotary = rotary * cos + torch.cat((-second, first), dim=-1) * sin
    return rotary if rest is None else torch.cat((rotary, rest), dim=-1)


def record_key_positions(cache: Cache, position_ids: torch.Tensor) -> torch.Tensor:
    """Remember the positions of the new keys in `cache` and return those of all keys it will hand out `[B, S]`.

    Keys cached before rotation are turned when they are used, each at its own position, which neither padding nor
    a restart of `position_ids` lets one compute from the slot. Call it once per forward, before the layers update
    the cache. The record is kept by the cache's first layer and follows a cropped, repeated, reordered, reset, copied
    or saved cache; for keys that came without a record, consecutive positions up to the first new one are assumed.

    Args:
        cache: dynamic or static, holding S_past keys.
        position_ids: `[B, T]` of the tokens of this forward.
    """
    past = cache.get_seq_length()
    if not cache.layers:  # they are made as they are needed
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[0]
    if not hasattr(type(layer), "key_positions") and not torch.compiler.is_compiling():
        layer.__class__ = with_key_positions(type(layer))
    recorded = getattr(layer, "key_positions", None)
    batch, new = position_ids.shape
    if recorded is not None and recorded.shape[0] != batch:
        repeats, remainder = divmod(batch, recorded.shape[0])
        recorded = recorded.repeat_interleave(repeats, dim=0) if remainder == 0 else None

    if cache.is_compileable:  # static: fixed slots, written in place
        slots = torch.arange(cache.get_max_length(), device=position_ids.device)
        if recorded is None:
            recorded = position_ids[:, :1] - past + slots
        # Empty slots are zero: the scaled rotary types look at the largest position.
        recorded = torch.where(slots < past, recorded, 0)
        layer.key_positions = recorded.index_copy(1, slots[:new] + past, position_ids)
        return layer.key_positions

    if recorded is None or recorded.shape[1] < past:
        recorded = position_ids[:, :1] - past + torch.arange(past, device=position_ids.device)
    layer.key_positions = torch.cat((recorded[:, :past].to(position_ids.device), position_ids), dim=1)
    return layer.key_positions


@functools.cache
def with_key_positions(layer_class: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    """The kind of cache layer that `layer_class` is, which keeps the positions of all keys, row by row beside them."""

    class LayerWithKeyPositions(layer_class):
        _layer_type = None  # by which Transformers would make such layers for everyone
        key_positions: torch.Tensor | None = None  # [B, S]

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._change_rows(lambda positions: positions.index_select(0, beam_idx.to(positions.device)))

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            self._change_rows(lambda positions: positions[torch.as_tensor(indices, device=positions.device)])

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._change_rows(lambda positions: positions.repeat_interleave(repeats, dim=0))

        def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
            if self.key_positions is not None and self.get_seq_length() > 0:  # as the keys, which an empty one lacks
                self.key_positions = change(self.key_positions)

        def __repr__(self):
            return layer_class.__name__

        def __reduce__(self):
            return empty_layer_with_key_positions, (layer_class,), vars(self)

    return LayerWithKeyPositions


def empty_layer_with_key_positions(layer_class: type[CacheLayerMixin]) -> CacheLayerMixin:
    """What a copied or saved layer is filled into."""
    layer_class = with_key_positions(layer_class)
    return layer_class.__new__(layer_class)


def paged_key_positions(position_ids: torch.Tensor, read_index: list, cu_seq_lens_k: dict, **_) -> torch.Tensor:
    """Positions `[1, S]` of the keys that continuous batching hands out: every request from its first token on.

    Args:
        position_ids: `[1, T]` of the new tokens of all requests.
        read_index: per cache allocator, the pool slots that will be read; empty when nothing was cached yet.
        cu_seq_lens_k: per layer type, where each request's keys begin among the keys read.
    """
    length = read_index[0].numel()
    if length == 0:
        return position_ids
    starts = next(iter(cu_seq_lens_k.values())).to(position_ids.device, torch.long)
    slots = torch.arange(length, device=position_ids.device)
    return (slots - starts[torch.searchsorted(starts, slots, right=True) - 1]).unsqueeze(0)
