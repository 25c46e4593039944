"""An attention backend for vLLM that holds states instead of keys and values.

A state (modeling/kinds.py) is the smallest thing that keys and values can be made of. vLLM's pages hold those of all
texts, and at every step the keys and values of each text are made anew of its pages, simulated and rotated: the base
form of modeling/key_store.py, with vLLM in the place of Transformers' cache. Written in PyTorch, for any device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from ..modeling.attention import SASAttention
from ..modeling.attention_functions import ALL_ATTENTION_FUNCTIONS, sdpa_attention_forward
from ..modeling.key_store import STATE_ATTENTION, CachePlace, state_form
from ..modeling.kinds import make_attention
from ..modeling.positions import SASRotaryEmbedding


def state_attention_forward(
    module: nn.Module, query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, attention_mask=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """The attention function `STATE_ATTENTION`: queries `[1, Ĥ, T, D̂]` and a state `[1, n, T, width]` of the tokens of
    all texts, one after the other, to `[T, Ĥ·D_v]`."""
    state = torch.cat([half[0].transpose(0, 1).flatten(1) for half in (first, second)], dim=-1)
    attend: StateAttention = module.attn  # type: ignore[assignment]  # which vLLM's model puts there
    return attend(query[0].transpose(0, 1).contiguous(), state), None


ALL_ATTENTION_FUNCTIONS[STATE_ATTENTION] = state_attention_forward


class StateAttention(nn.Module, AttentionLayerBase):
    """
    What attends for a layer: its states in vLLM's pages, `[pages, 1, tokens, width]`.

    Args:
        layer: makes keys and values of states.
        rotary: gives the angles of positions; `None` where this layer's keys are not rotated.
        prefix: its name in vLLM, of which there is one.
    """

    supports_dcp = False

    def __init__(self, layer: SASAttention, rotary: nn.Module | None, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        if vllm_config.cache_config.cache_dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(
                f"`kv_cache_dtype` is {vllm_config.cache_config.cache_dtype!r}, but with `simulation_cache='base'` "
                "the cache holds states in the model's own type; use 'auto'."
            )
        self.layer_name = prefix
        self.kv_cache = torch.tensor([])  # until vLLM binds its pages
        self.shapes = state_shapes(layer.config)
        self.width = layer.value_head_dim
        self.dtype = torch.get_default_dtype()
        self.impl = StateImpl(layer, rotary, self.shapes, vllm_config.model_config.max_model_len)
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, query: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """`[T, Ĥ, D̂]` and `[T, width]` to `[T, Ĥ·D_v]`."""
        output = query.new_empty(*query.shape[:2], self.width)
        torch.ops.vllm.unified_attention_with_output(query, state, state, output, _encode_layer_name(self.layer_name))
        return output.flatten(1)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        (heads, width), (other_heads, other_width) = self.shapes
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=heads * width,
            head_size_v=other_heads * other_width,
            dtype=self.dtype,
        )


def state_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """`n` and width of both halves of a token's state."""
    with torch.device("meta"):
        state = make_attention(config, 0).project_state(torch.empty(1, 1, config.hidden_size))
    return [(half.shape[2], half.shape[3]) for half in state]


@dataclass
class Texts(AttentionMetadata):
    """Of the texts of a step: where the new tokens of each begin and end, how many it has with those held, and where
    they are held."""

    starts: list[int]
    lengths: list[int]
    pages: torch.Tensor
    slots: torch.Tensor

    def __iter__(self) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        for (start, end), length, pages in zip(pairwise(self.starts), self.lengths, self.pages, strict=False):
            yield start, end, length, pages


class StateMetadataBuilder(AttentionMetadataBuilder):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False):
        common = common_attn_metadata
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        lengths = common.seq_lens[: common.num_reqs].tolist()
        return Texts(starts, lengths, common.block_table_tensor, common.slot_mapping[: starts[-1]])


class StateImpl(AttentionImpl):
    """Keeps the new states and attends; arguments as of [`StateAttention`]."""

    def __init__(self, layer: SASAttention, rotary: nn.Module | None, shapes: list[tuple[int, int]], max_length: int):
        self.layer, self.rotary, self.shapes, self.max_length = layer, rotary, shapes, max_length

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        """`key` is the state of all new tokens, and so is `value`."""
        if attn_metadata is None:  # vLLM warms up
            return output.zero_()
        texts, size = attn_metadata, kv_cache.shape[2]
        kv_cache[texts.slots // size, 0, texts.slots % size] = key[: len(texts.slots)]
        for start, end, length, pages in texts:
            held = kv_cache[pages[: -(-length // size)], 0].flatten(0, 1)[:length]
            output[start:end] = self.attend(query[start:end], held)
        return output

    def attend(self, query: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Of a text: queries `[T, Ĥ, D̂]` of its last tokens and the states `[S, width]` of all to `[T, Ĥ, D_v]`."""
        new, length = len(query), len(held)
        halves = held.split([heads * width for heads, width in self.shapes], dim=-1)
        pair = [
            half.unflatten(-1, shape)[None].transpose(1, 2) for half, shape in zip(halves, self.shapes, strict=True)
        ]
        angles = self.rotary and tuple(
            part[:, :length] for part in angles_of(self.rotary, query.dtype, self.max_length)
        )
        place = CachePlace(self.layer, None, None, {})
        key, value, _ = state_form(self.layer.config).from_cache(self.layer, pair, place, angles, None)
        mask = None
        if 1 < new < length:
            mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)[None, None]
        query = query[None].transpose(1, 2)
        return sdpa_attention_forward(self.layer, query, key, value, mask, scaling=self.layer.scaling)[0][0]


@cache
def angles_of(rotary: SASRotaryEmbedding, dtype: torch.dtype, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[1, length, R]` of the positions from 0 on."""
    device = rotary.inv_freq.device
    return rotary(torch.empty(0, dtype=dtype, device=device), torch.arange(length, device=device)[None])


class StateBackend(AttentionBackend):
    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[StateImpl]:
        return StateImpl

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        return StateMetadataBuilder
