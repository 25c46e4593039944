"""What every layer is told about the sequence: who sees whom, where each token stands, and how far it is turned."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.utils.generic import is_flash_attention_requested

from .attention import SASAttention
from .key_store import paged_key_positions, record_key_positions
from .kinds import as_boolean, with_boolean_masks
from .transforms import is_at_hand


def layer_inputs(
    config: PreTrainedConfig,
    attention: SASAttention,
    rotary_emb: nn.Module | None,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    given_position_ids: torch.Tensor | None,
    cache: Cache | None = None,
    new_cache: Callable[[], Cache] | None = None,
    **kwargs,
) -> tuple[Cache | None, dict]:
    """
    Args:
        config: of the layers' own attention.
        attention: one of them, whose kind is all the layers'.
        rotary_emb: `None` without RoPE.
        inputs_embeds: `[B, T, C]`.
        attention_mask: `[B, S]`, 0 for padding; or a prepared 4-D mask.
        position_ids: `[B, T]` or `[1, T]`.
        given_position_ids: those that the caller gave: packed documents show in them.
        cache: to read and extend.
        new_cache: makes one where there is none.
        kwargs: of the model's forward: the pool of continuous batching finds in it what it needs.

    Returns:
        The cache, and the arguments of every layer's self-attention.
    """
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    mask_inputs = (inputs_embeds, attention_mask, given_position_ids, own)
    packed: dict[str, Any] = {"position_ids": position_ids}
    if is_flash_attention_requested(config):  # which would look for documents in them anew in every layer
        packed = {"position_ids": None}
        alone = own is None and attention_mask is None and kwargs.get("cu_seq_lens_q") is None
        if alone and given_position_ids is not None:
            packed["documents"] = packed_documents(given_position_ids.expand(inputs_embeds.shape[0], -1))
    mask, mixing_mask = make_mask(config, *mask_inputs), None
    if attention.mixes_tokens:
        # Who mixes with whom is who may attend to whom, wanted as a boolean mask whatever the implementation.
        mixing_mask = as_boolean(make_mask(with_boolean_masks(config), *mask_inputs, skip=False))
    # After the masks: beside a cache, Transformers would not look for packed documents.
    if cache is None and new_cache is not None:
        cache = new_cache()
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache

    key_positions = position_ids
    rotates_at_use = attention.rotates_at_use and rotary_emb is not None
    if rotates_at_use or attention.mixes_tokens:
        if isinstance(own, Cache):
            key_positions = record_key_positions(own, position_ids.expand(inputs_embeds.shape[0], -1))
        elif own is not None:  # the pool of continuous batching
            key_positions = paged_key_positions(position_ids, **kwargs)

    position_embeddings = key_position_embeddings = None
    if rotary_emb is not None:
        position_embeddings = key_position_embeddings = rotary_emb(inputs_embeds, position_ids=position_ids)
        if key_positions is not position_ids:
            key_position_embeddings = rotary_emb(inputs_embeds, position_ids=key_positions)
    return cache, packed | {
        "attention_mask": mask,
        "position_embeddings": position_embeddings,
        "key_position_embeddings": key_position_embeddings,
        "token_mixing": None if mixing_mask is None else (position_ids, key_positions, mixing_mask),
    }


def make_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    skip: bool = True,
):
    """The mask for the attention implementation of `config`; without `skip`, never `None`."""
    rows, length = inputs_embeds.shape[:2]
    telling = position_ids if attention_mask is None else None  # of documents
    documents = None
    if config.is_causal:
        if not is_at_hand(inputs_embeds):
            # Whether there are several documents, or there is any padding, would be asked of the device. A mask for
            # one token costs nothing; for many, that question does less than a mask without need.
            if telling is not None and cache is None:
                documents, position_ids = document_numbers(telling.expand(rows, -1)), None
            skip = skip and (attention_mask is None or length > 1)
        return create_causal_mask(
            config,
            inputs_embeds,
            attention_mask,
            cache if isinstance(cache, Cache) else None,  # the pool of continuous batching comes with its masks
            position_ids=position_ids,
            and_mask_function=None if documents is None else packed_sequence_mask_function(documents),
            allow_is_causal_skip=skip,
        )
    # `create_causal_mask` would fall back to a bidirectional mask, but then forgets packed documents.
    if telling is not None:
        number = find_packed_sequence_indices if is_at_hand(inputs_embeds) else document_numbers
        documents = number(telling.expand(rows, -1))
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        and_mask_function=None if documents is None else packed_sequence_mask_function(documents),
        allow_is_bidirectional_skip=skip,
    )


def document_numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """Which document of its row each token `[B, T]` is of, from 1."""
    return _begins(position_ids).cumsum(-1)


def _begins(position_ids: torch.Tensor) -> torch.Tensor:
    """Where documents begin `[B, T]`: with each row, and where a position does not follow the last."""
    return position_ids.diff(dim=-1, prepend=position_ids[:, :1]) != 1


def packed_documents(position_ids: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """Where the documents of all rows `[B, T]` begin, one after the other, by the names that FlashAttention knows:
    asked once for all layers."""
    bounds = nn.functional.pad(
        _begins(position_ids).flatten().nonzero().flatten(), (0, 1), value=position_ids.numel()
    ).int()
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def row_positions(
    config: PreTrainedConfig, embeds: torch.Tensor, attention_mask: torch.Tensor | None, past: int = 0
) -> torch.Tensor:
    """Positions `[B, T]` or `[1, T]` of the tokens `[B, T, C]`, `past` of which came before.

    Padding before or between real tokens takes none, unless `padding_takes_positions`.

    Args:
        attention_mask: `[B, past + T]`, 0 for padding; others are not looked at.
    """
    length = embeds.shape[1]
    if config.padding_takes_positions or attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(length, device=embeds.device)[None] + past
    real = attention_mask.to(embeds.device) != 0
    slots = torch.arange(real.shape[1], device=embeds.device)
    passed_over = ~real & (slots < (slots * real).amax(-1, keepdim=True))
    return (slots - passed_over.cumsum(-1)).clamp(min=0)[:, -length:]


def check_positions(config: PreTrainedConfig, position_ids: torch.Tensor, most: int | None = None) -> None:
    """Raise a `ValueError` for positions that learned positions or token mixing have no parameters for.

    Args:
        most: no position is larger, if that is known. Otherwise a CUDA device looks at them itself, and an error shows
            when its results are asked for.
    """
    limit, unknown = config.max_position_embeddings, torch.compiler.is_compiling() or position_ids.is_meta
    if unknown or (most is not None and most < limit):
        return
    if most is None and not is_at_hand(position_ids) and position_ids.device.type in ("cuda", "cpu"):
        torch._assert_async(
            (position_ids < limit).all(), f"a position is not below `max_position_embeddings` = {limit}"
        )
    elif position_ids.max() >= limit:
        raise ValueError(
            f"The input reaches position {position_ids.max().item()}, but this model has parameters for "
            f"`max_position_embeddings` = {limit} positions. Shorten or truncate the input to {limit} tokens, "
            "or train a model with a larger `max_position_embeddings`."
        )
