"""The attention layer: queries from one side, a state from the other, simulated, cached, attended to and aggregated.

A sentence whose words have rooms of their own: kinds.py (queries, state, expansion), simulation.py and
fused_simulation.py, key_store.py (what is cached and how it comes back), attention_functions.py (how scores are
computed).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .annotations import AttentionLayer
from .attention_functions import ALL_ATTENTION_FUNCTIONS, eager_attention_forward
from .cache_name import either_cache_name
from .fused_simulation import simulate
from .key_store import CachePlace, key_store
from .positions import rotate_leading_features
from .recomputation import recomputing
from .simulation import Simulation, aggregate_heads, concatenate_heads


class SASAttention(AttentionLayer):
    """
    Attention over queries, keys and values from a base projection, simulated where the configuration asks for it.

    A subclass is an attention kind: it makes the parameters and says how hidden states become queries `[B, T, H, D]`
    and a *state*, the pair of tensors `[B, S, n, width]` that is the smallest thing to cache, and how a state becomes
    keys and values.

    Attributes:
        rotates_state: whether a state can be rotated before it is cached, so that its keys come out rotated.
        state_is_single: whether the second of the state is empty, and caches hold halves of the first.
        mixes_tokens: whether the state depends on the tokens before, too.
    """

    rotates_state = False
    state_is_single = False
    mixes_tokens = False

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.value_head_dim = self.head_dim
        self.scaling = config.query_pre_attn_scalar**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal
        self.make_projections(config)

        kv_heads, simulated_heads = config.num_key_value_heads, config.num_simulated_heads
        self.num_key_value_groups = self.num_heads // kv_heads if simulated_heads is None else 1
        self.num_simulated_groups = 1 if simulated_heads is None else simulated_heads // self.num_heads
        self.concatenates = config.head_aggregation == "concat"
        output_heads = simulated_heads if self.concatenates else self.num_heads
        output_width, output_bias = output_heads * self.value_head_dim, config.attention_output_bias
        self.o_proj = nn.Linear(output_width, config.hidden_size, bias=output_bias)
        self.q_simulation = Simulation(config, self.num_heads, config.query_head_dim, "query")
        self.k_simulation = Simulation(config, kv_heads, config.query_head_dim, "key")
        self.v_simulation = Simulation(config, kv_heads, self.value_head_dim, "value")

    def make_projections(self, config: PreTrainedConfig) -> None:
        """Define the parameters of the base projection."""
        raise NotImplementedError

    def project_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, T, C]` to queries `[B, T, H, D]`."""
        raise NotImplementedError

    def project_state(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, S, C]` to the state."""
        raise NotImplementedError

    def expand(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A state of S tokens to keys `[B, S, H_kv, D]` and values `[B, S, H_kv, D_v]`."""
        return first, second

    def rotate_state(
        self, first: torch.Tensor, second: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The state whose keys come out rotated."""
        return rotate_leading_features(first, position_embeddings), second

    def mix_tokens(self, first: torch.Tensor, token_mixing: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        """What the kind that mixes tokens has as the second of its state, of the first for all tokens seen."""
        raise NotImplementedError

    @property
    def rotates_at_use(self) -> bool:
        """Whether `forward` needs the positions of all keys, not of the new ones alone."""
        return key_store(self.config).rotates_at_use(self)

    def aggregate(self, heads: torch.Tensor) -> torch.Tensor:
        """Attended heads `[B, T, Ĥ, D_v]` to what the output projection reads: `[B, T, H·D_v]`, or `[B, T, Ĥ·D_v]`."""
        join = concatenate_heads if self.concatenates else aggregate_heads
        return join(heads, self.num_simulated_groups)

    @either_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        key_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        token_mixing: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        layer_idx: int | None = None,
        key_value_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, T, C]`.
            position_embeddings: cos and sin `[B, T, R]` of the queries, `None` without RoPE.
            key_position_embeddings: cos and sin of the keys: `[B, S, R]` of all where `rotates_at_use`, of the new
                ones otherwise. In self-attention those of the queries when `None`, in cross-attention no RoPE.
            attention_mask: as `create_causal_mask` or `create_bidirectional_mask` makes it.
            cache: to read and extend; also one for encoder and decoder, and the pool of continuous batching.
            token_mixing: for kinds that mix tokens: positions `[B, T]` of the tokens and `[B, S]` of all keys, and
                which key each token may see, boolean `[B, 1, T, S]`; in cross-attention, all of them the source's.
            layer_idx: the layer's place in the cache; the one it was made with when `None`.
            key_value_states: the source `[B, S, C]` that keys and values are made of: cross-attention. An
                `EncoderDecoderCache` keeps what is made of it, and it is not read again.

        Returns:
            `[B, T, C]`, and the attention weights `[B, Ĥ, T, S]` where the implementation gives them.

        Raises:
            ValueError: for continuous batching with a cache form that its pool cannot hold; for a cache that holds
                something of another form; for a kind that mixes tokens without `token_mixing`.
        """
        source, place = hidden_states, CachePlace(self, cache, layer_idx, kwargs, key_value_states is not None)
        if key_value_states is not None:
            source, kwargs["is_causal"] = key_value_states, False
        elif key_position_embeddings is None:
            key_position_embeddings = position_embeddings

        query = simulate(self.q_simulation, self.project_queries(hidden_states), position_embeddings)
        key, value, attention_mask = key_store(self.config).keys_and_values(
            self, source, place, key_position_embeddings, attention_mask, token_mixing
        )

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        with recomputing(query, key, value):
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
        if output.ndim != 4:  # some give tokens x features
            output = output.reshape(*hidden_states.shape[:-1], -1, self.value_head_dim)
        return self.o_proj(self.aggregate(output)), weights
