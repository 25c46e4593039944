"""The key store: what a layer caches of its keys and values, how it comes back, and when keys are rotated.

One class for each form. *Plain*: without simulation, the state of the base projection, the smallest thing that keys
and values can be made of. With simulation, *expanded*: simulated, rotated keys and simulated values; or *base*: the
state, simulated anew at every use. `CachePlace` is all that they know of Transformers' caches.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.utils.import_utils import is_cuda_stream_capturing

from .annotations import AttentionLayer
from .fused_simulation import simulate
from .positions import rotate_leading_features
from .transforms import is_at_hand


Angles = tuple[torch.Tensor, torch.Tensor] | None  # cos and sin [B, S, R]
Pair = tuple[torch.Tensor, torch.Tensor]  # as caches hold it, [B, n, S, width] each


class CachePlace:
    """
    A layer's place in a cache, or no place where there is no cache.

    Args:
        attention: the layer.
        cache: dynamic, static or sliding, one for encoder and decoder, or the pool of continuous batching.
        layer_idx: the layer's place in it; the one the layer was made with when `None`.
        kwargs: of the layer's `forward`: the pool takes what it needs there, and leaves what attention needs.
        is_source: whether it is the other side of cross-attention that is cached, once and in full.
    """

    def __init__(
        self,
        attention: AttentionLayer,
        cache: Cache | None,
        layer_idx: int | None,
        kwargs: dict,
        is_source: bool = False,
    ):
        self.config = attention.config
        self._attention, self._layer_idx = attention, layer_idx
        self.in_halves = attention.state_is_single and key_store(attention.config) is not EXPANDED
        self.updated = None
        if isinstance(cache, EncoderDecoderCache):
            if is_source:
                self.updated = cache.is_updated
            cache = cache.cross_attention_cache if is_source else cache.self_attention_cache
        self.cache, self.kwargs = cache, kwargs

    @property
    def layer_idx(self) -> int:
        """Not read where there is no cache: what `torch.compile` makes of a layer would serve that one alone."""
        return self._attention.layer_idx if self._layer_idx is None else self._layer_idx

    @property
    def held(self) -> Pair | None:
        """What the cache holds here, once it holds something."""
        layers = getattr(self.cache, "layers", ())  # a pool has none, and its form is checked when it is made
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        return None if layer is None or layer.keys is None else (layer.keys, layer.values)

    @property
    def complete(self) -> Pair | None:
        """What an earlier step cached of the source, in full."""
        if self.updated is None or not self.updated.get(self.layer_idx) or self.held is None:
            return None
        return self._whole(*self.held)

    def _whole(self, first: torch.Tensor, second: torch.Tensor) -> Pair:
        return (torch.cat((first, second), dim=-1), second[..., :0]) if self.in_halves else (first, second)

    def extend(self, first: torch.Tensor, second: torch.Tensor) -> Pair:
        """What is held and the new, which is kept, too.

        Raises:
            ValueError: where something of another form is held.
        """
        if self.cache is None:
            return first, second
        if self.in_halves:  # runtimes of exported programs have no tensors without width
            first, second = first.tensor_split(2, dim=-1)
        if self.held is not None and self.held[0].numel():
            self._check(self.held[0], first, "keys")
            self._check(self.held[1], second, "values")
        pair = self.cache.update(first, second, self.layer_idx, kwargs=self.kwargs)
        if self.updated is not None:
            self.updated[self.layer_idx] = True
        return self._whole(*pair)

    def _check(self, held: torch.Tensor, new: torch.Tensor, what: str) -> None:
        if held.shape[1] == new.shape[1] and held.shape[3] == new.shape[3]:
            return
        remedy = "need `simulation_cache='base'`, and the form must not change during a generation."
        if not self.config.projects_to_cached_heads:
            remedy = (
                f"do not fit `attention_type={self.config.attention_type!r}`, whose cache holds no such keys and "
                "values; prompt tuning, p-tuning and LoRA do."
            )
        raise ValueError(
            f"The cache holds {held.shape[1]} heads of {held.shape[3]} features as {what}, but this model caches "
            f"{new.shape[1]} of {new.shape[3]}. Caches that are made from the configuration alone (prefix tuning, "
            f"ExecuTorch) {remedy}"
        )

    def with_held(self, new: torch.Tensor) -> torch.Tensor:
        """The first of the pair for all tokens `[B, n, S, width]`, held and new, in the cache's slots; the cache stays
        as it is."""
        if self.cache is None or (self.held is None and not self.cache.is_compileable):
            return new
        layer: Any = self.cache.layers[self.layer_idx]  # one of many kinds
        held = None if self.held is None else self.held[0]
        if self.cache.is_compileable and not layer.is_sliding:  # fixed slots
            slots = torch.arange(new.shape[2], device=new.device) + layer.get_seq_length()
            empty = (*new.shape[:2], layer.get_max_length(), new.shape[3])
            return (new.new_zeros(empty) if held is None else held).index_copy(2, slots, new)
        seen = new if held is None else torch.cat((held[:, :, : layer.get_seq_length()], new), dim=2)
        return _as_handed_out(seen, layer, new.shape[2])

    def filled(self, tensor: torch.Tensor, attention_mask: torch.Tensor | None) -> int | None:
        """How many slots of a static cache hold something, where the others can be left out, whose simulation would
        be for nothing.

        Elsewhere their number would have to be fetched from the device, and shapes would change under a compiled
        graph.
        """
        known = (
            getattr(self.cache, "is_compileable", False)
            and is_at_hand(tensor)
            and not tensor.is_meta
            and not torch.compiler.is_compiling()
            and (attention_mask is None or isinstance(attention_mask, torch.Tensor))
        )
        return int(self.cache.get_seq_length(self.layer_idx)) if known and self.cache is not None else None

    def refuse_block_table(self) -> None:
        if self.kwargs.get("block_table") is not None:
            raise ValueError(
                "Continuous batching asks the attention kernel to read keys from its block table, but this model "
                "makes them after the cache. Pass `ContinuousBatchingConfig(max_blocks_per_request=0)`."
            )


class KeyStore:
    """What a form says of itself. `attention` is the layer, whose kind gives states and makes keys and values of
    them."""

    def rotates_at_use(self, attention: AttentionLayer) -> bool:
        """Whether keys are cached before rotation, so that their positions must be known at every step."""
        raise NotImplementedError

    def keys_and_values(
        self,
        attention: AttentionLayer,
        source: torch.Tensor,
        place: CachePlace,
        angles: Angles,
        attention_mask: torch.Tensor | None,
        token_mixing: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values `[B, heads, S, width]` of what is cached and of `source` `[B, T, C]`, which is cached, and
        the mask that fits them; arguments as in [`SASAttention.forward`].

        Raises:
            ValueError: for continuous batching by block tables, and for a cache that holds something else.
        """
        if self.rotates_at_use(attention):
            place.refuse_block_table()
        pair = place.complete
        if pair is None:
            pair = place.extend(*self.to_cache(attention, source, place, angles, token_mixing))
        return self.from_cache(attention, pair, place, angles, attention_mask)

    def to_cache(self, attention, source, place, angles, token_mixing) -> Pair:
        """What is cached of `source`."""
        return _transposed(attention.project_state(source))

    def from_cache(self, attention, pair, place, angles, attention_mask):
        """Keys, values and mask of what the cache gave back."""
        raise NotImplementedError


class PlainForm(KeyStore):
    """The state, mixed along the tokens by the kind that does, and rotated before it is cached by those that can."""

    def rotates_at_use(self, attention: AttentionLayer) -> bool:
        return not attention.rotates_state

    def to_cache(self, attention, source, place, angles, token_mixing) -> Pair:
        state = attention.project_state(source)
        if attention.mixes_tokens:
            seen = place.with_held(state[0].transpose(1, 2)).transpose(1, 2)
            state = state[0], attention.mix_tokens(seen, token_mixing)
        if attention.rotates_state:
            state = attention.rotate_state(*state, angles)
        return _transposed(state)

    def from_cache(self, attention, pair, place, angles, attention_mask):
        key, value = attention.expand(*_transposed(pair))
        if not attention.rotates_state:
            key = rotate_leading_features(key, angles)
        return *_transposed((key, value)), attention_mask


class ExpandedForm(KeyStore):
    """Simulated, rotated keys and simulated values: large, and nothing is left to do when they are used."""

    def rotates_at_use(self, attention: AttentionLayer) -> bool:
        return False

    def to_cache(self, attention, source, place, angles, token_mixing) -> Pair:
        key, value = attention.expand(*attention.project_state(source))
        return simulate(attention.k_simulation, key, angles), simulate(attention.v_simulation, value)

    def from_cache(self, attention, pair, place, angles, attention_mask):
        return *pair, attention_mask


class BaseForm(KeyStore):
    """The state, unrotated: small, and simulated anew at every use."""

    def rotates_at_use(self, attention: AttentionLayer) -> bool:
        return True

    def from_cache(self, attention, pair, place, angles, attention_mask):
        filled = place.filled(pair[0], attention_mask)
        if filled is not None:
            pair = pair[0][:, :, :filled], pair[1][:, :, :filled]
            attention_mask = None if attention_mask is None else attention_mask[..., :filled]
            angles = None if angles is None else (angles[0][:, :filled], angles[1][:, :filled])
        key, value = attention.expand(*_transposed(pair))
        return simulate(attention.k_simulation, key, angles), simulate(attention.v_simulation, value), attention_mask


class HeldElsewhere(KeyStore):
    """What another form caches, for an engine that holds it itself: the attention function named `STATE_ATTENTION`
    gets it as it is, and makes keys and values of all that is held, by that form."""

    def __init__(self, form: KeyStore):
        self.form = form

    def rotates_at_use(self, attention: AttentionLayer) -> bool:
        return self.form.rotates_at_use(attention)

    def to_cache(self, attention, source, place, angles, token_mixing) -> Pair:
        return self.form.to_cache(attention, source, place, angles, token_mixing)

    def from_cache(self, attention, pair, place, angles, attention_mask):
        return *pair, attention_mask


def _transposed(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Kinds have tokens before heads, `[B, S, n, width]`, caches and attention functions heads before tokens."""
    return pair[0].transpose(1, 2), pair[1].transpose(1, 2)


PLAIN, EXPANDED, BASE = PlainForm(), ExpandedForm(), BaseForm()
STATE_ATTENTION = "sas_state"
HELD_ELSEWHERE: dict[KeyStore, KeyStore] = {form: HeldElsewhere(form) for form in (PLAIN, BASE)}


def key_store(config: PreTrainedConfig) -> KeyStore:
    """The form in which a model of this configuration caches; `simulation_cache` may change between generations."""
    form = state_form(config) if not config.simulates or config.simulation_cache == "base" else EXPANDED
    return HELD_ELSEWHERE[form] if config._attn_implementation == STATE_ATTENTION else form


def state_form(config: PreTrainedConfig) -> KeyStore:
    """The form that caches the state, the smallest thing that keys and values can be made of."""
    return BASE if config.simulates else PLAIN


def record_key_positions(cache: Cache, position_ids: torch.Tensor) -> torch.Tensor:
    """Remember the positions of the new keys in `cache` and return those of all keys it will hand out `[B, S]`.

    Keys cached before rotation are turned when they are used, each at its own position, which neither padding nor
    a restart of `position_ids` lets one compute from the slot. Call it once per forward, before the layers update
    the cache. The record is kept by the cache's first layer and follows a cropped, repeated, reordered, reset, copied
    or saved cache; for keys that came without a record, consecutive positions up to the first new one are assumed.

    Args:
        cache: dynamic or static, holding S_past keys.
        position_ids: `[B, T]` of the tokens of this forward.

    Raises:
        ValueError: where a CUDA graph is captured by hand, but there is no record yet that it could write to:
            replayed, it would find the positions as they were then.
    """
    past = cache.get_seq_length()
    if not cache.layers:  # they are made as they are needed
        assert cache.layer_class_to_replicate is not None  # or there would be layers
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[0]  # one of many kinds
    if not hasattr(type(layer), "key_positions") and not torch.compiler.is_dynamo_compiling():
        layer.__class__ = with_key_positions(type(layer))  # type: ignore[arg-type]  # mypy doubts that types can be keys
    recorded = getattr(layer, "key_positions", None)
    batch, new = position_ids.shape
    if recorded is not None and recorded.shape[0] != batch:
        repeats, remainder = divmod(batch, recorded.shape[0])
        recorded = recorded.repeat_interleave(repeats, dim=0) if remainder == 0 else None

    if cache.is_compileable and not layer.is_sliding:  # fixed slots, written in place
        slots = torch.arange(cache.get_max_length(), device=position_ids.device)
        before = position_ids[:, :1] - past + slots if recorded is None else recorded
        # Empty slots are zero: the scaled rotary types look at the largest position.
        positions = torch.where(slots < past, before, 0).index_copy(1, slots[:new] + past, position_ids)
        if recorded is not None and recorded is layer.key_positions and not torch.compiler.is_exporting():
            return recorded.copy_(positions)  # what a CUDA graph reads and writes stays where it is
        _refuse_capture(position_ids)
        layer.key_positions = positions
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(positions)
        return positions

    _refuse_capture(position_ids)
    if recorded is None or recorded.shape[1] < past:
        recorded = position_ids[:, :1] - past + torch.arange(past, device=position_ids.device)
    layer.key_positions = torch.cat((recorded[:, :past].to(position_ids.device), position_ids), dim=1)
    return _as_handed_out(layer.key_positions[:, None, :, None], layer, new)[:, 0, :, 0]


def _refuse_capture(position_ids: torch.Tensor) -> None:
    if not torch.compiler.is_compiling() and position_ids.is_cuda and is_cuda_stream_capturing():
        raise ValueError(
            "A CUDA graph of a step is captured by hand, but where keys are cached before rotation it needs a record "
            "of their positions to write to: use a static cache, and run a step with it before the capture."
        )


def _as_handed_out(seen: torch.Tensor, layer: CacheLayerMixin, new: int) -> torch.Tensor:
    """Of what belongs to all tokens seen `[B, n, tokens, width]`, `new` of them new, that of the slots which a layer
    will hand out: a sliding one forgets, or has empty slots behind."""
    length = layer.get_mask_sizes(new)[0]
    missing = length - seen.shape[2]
    return nn.functional.pad(seen, (0, 0, 0, missing)) if missing > 0 else seen[:, :, -length:]


@functools.cache
def with_key_positions(layer_class: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    """The kind of cache layer that `layer_class` is, which keeps the positions of all keys, row by row beside them."""

    class LayerWithKeyPositions(layer_class):  # type: ignore[valid-type,misc]  # which mypy cannot follow
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

    LayerWithKeyPositions.__qualname__ = layer_class.__name__ + WITH_KEY_POSITIONS
    return LayerWithKeyPositions


WITH_KEY_POSITIONS = "WithKeyPositions"


def __getattr__(name: str) -> type[CacheLayerMixin]:
    """Exported programs name the kinds of layers that their caches have, and look for them here."""
    layer_class = getattr(cache_utils, name.removesuffix(WITH_KEY_POSITIONS), None)
    if layer_class is None or not name.endswith(WITH_KEY_POSITIONS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return with_key_positions(layer_class)


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
