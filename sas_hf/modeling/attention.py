"""The attention layer: base projection, simulation, rotation, cache, scores and aggregation, in that order."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .positions import rotate_leading_features
from .simulation import aggregate_heads, make_simulation


def repeat_kv(states: torch.Tensor, repeats: int) -> torch.Tensor:
    """`[B, H_kv, S, D]` to `[B, H_kv·repeats, S, D]`, each head repeated in place."""
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out: `[B, heads, T, width]` in, `[B, T, heads, D_v]` and the weights out."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    # At least float32, as everywhere in the ecosystem, but never less than the inputs.
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, query.dtype))
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SASAttention(nn.Module):
    """
    Multi-head, grouped-query or multi-query attention, simulated where the configuration asks for it.

    What is cached depends on the form: without simulation the rotated keys and the values; "expanded" the simulated,
    rotated keys and simulated values; "base" keys and values as projected, to be simulated and rotated at use.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.num_key_value_groups = (
            self.num_heads // config.num_key_value_heads if config.num_simulated_heads is None else 1
        )
        self.scaling = config.query_pre_attn_scalar**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal

        hidden_size, kv_heads = config.hidden_size, config.num_key_value_heads
        bias = config.attention_bias
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden_size, bias=bias)
        self.q_simulation = make_simulation(config, self.num_heads, self.head_dim, "query")
        self.k_simulation = make_simulation(config, kv_heads, self.head_dim, "key")
        self.v_simulation = make_simulation(config, kv_heads, self.head_dim, "value")

    @property
    def caches_base(self) -> bool:
        """Whether keys and values are cached before simulation."""
        return self.config.simulates and self.config.simulation_cache == "base"

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        key_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, T, C]`.
            position_embeddings: cos and sin `[B, T, R]` of the tokens, `None` without RoPE.
            key_position_embeddings: cos and sin `[B, S, R]` of all keys; differs from `position_embeddings` only for
                the base cache, whose S keys are rotated at use.
            attention_mask: as `create_causal_mask` makes it.
            past_key_values: cache to read and extend.

        Returns:
            `[B, T, C]`, and the attention weights `[B, Ĥ, T, S]` where the implementation gives them.

        Raises:
            ValueError: for continuous batching with a cache form that its pool cannot hold.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads)
        key = self.k_proj(hidden_states).view(heads)
        value = self.v_proj(hidden_states).view(heads)

        implementation = self.config._attn_implementation
        if self.caches_base:
            key, value = self._update_base(key, value, past_key_values, kwargs)
            implementation = implementation.removeprefix("paged|")
        else:
            key_position_embeddings = position_embeddings

        query = rotate_leading_features(self.q_simulation(query), position_embeddings).transpose(1, 2)
        key = rotate_leading_features(self.k_simulation(key), key_position_embeddings).transpose(1, 2)
        value = self.v_simulation(value).transpose(1, 2)

        if past_key_values is not None and not self.caches_base:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(aggregate_heads(output, self.num_heads)), weights

    def _update_base(
        self, key: torch.Tensor, value: torch.Tensor, past_key_values: Cache | None, kwargs: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Extend the cache by base keys and values `[B, T, H_kv, D]` and return all of them.

        Continuous batching passes its pool as `cache` for the attention function to write to; what that function
        would receive are simulated heads, which do not fit the pool, so the pool is served here.
        """
        pool = kwargs.pop("cache", None)
        if pool is None and past_key_values is None:
            return key, value
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if pool is None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        elif kwargs.get("block_table") is None:
            key, value = pool.update(key_states=key, value_states=value, layer_idx=self.layer_idx, kwargs=kwargs)
        else:
            raise ValueError(
                "Continuous batching asks the attention kernel to read keys from its block table, but this model "
                "simulates them after the cache. Pass `ContinuousBatchingConfig(max_blocks_per_request=0)`."
            )
        return key.transpose(1, 2), value.transpose(1, 2)
