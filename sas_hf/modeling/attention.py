"""The attention layer: base projection, simulation, rotation, cache, scores and aggregation, in that order.

What a base projection computes is in base_projections.py, what simulation does in simulation.py.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .blocked_attention import BlockedAttention, serves
from .cache_name import either_cache_name
from .fast_simulation import is_plain, simulate_all, simulation_weights
from .positions import rotate_leading_features
from .recomputation import RecomputedAttention, recompute_around_kernel
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
    Attention over queries, keys and values from a base projection, simulated where the configuration asks for it.

    A subclass is a base projection: it makes the parameters and says how hidden states become queries and a *state*,
    the pair of tensors `[B, T, n, width]` that is cached in its smallest form, and how it becomes keys and values.

    What is cached depends on the form: without simulation the state; with it, "expanded" the simulated, rotated keys
    and simulated values, "base" the state. A state is rotated before it is cached where `rotates_state` says so and
    nothing non-linear follows; otherwise keys are rotated when they are used, each at its own position.
    """

    rotates_state = False
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
        # Kept, as reading a configuration costs microseconds, which a decoded token has few of.
        self.simulates, self.simulates_heads = config.simulates, config.num_simulated_heads is not None
        self.is_causal = config.is_causal
        self.make_projections(config)

        kv_heads = config.num_key_value_heads
        self.num_key_value_groups = 1 if self.simulates_heads else self.num_heads // kv_heads
        output_width, output_bias = self.num_heads * self.value_head_dim, config.attention_output_bias
        self.o_proj = nn.Linear(output_width, config.hidden_size, bias=output_bias)
        self.q_simulation = make_simulation(config, self.num_heads, config.query_head_dim, "query")
        self.k_simulation = make_simulation(config, kv_heads, config.query_head_dim, "key")
        self.v_simulation = make_simulation(config, kv_heads, self.value_head_dim, "value")

    def make_projections(self, config: PreTrainedConfig) -> None:
        """Define the parameters of the base projection."""
        raise NotImplementedError

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[B, T, C]` to queries `[B, T, H, D]` and the state."""
        raise NotImplementedError

    def expand(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A state of S tokens to keys `[B, S, H_kv, D]` and values `[B, S, H_kv, D_v]`."""
        return first, second

    def rotate_state(
        self, first: torch.Tensor, second: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The state whose keys come out rotated."""
        return rotate_leading_features(first, position_embeddings), second

    def mix_tokens(
        self, first: torch.Tensor, cache: Cache | None, layer_idx: int, token_mixing: tuple[torch.Tensor, ...]
    ) -> list[torch.Tensor]:
        """The state of a kind that mixes tokens, from what `project` gave and the tokens already cached."""
        raise NotImplementedError

    @property
    def caches_state(self) -> bool:
        """Whether the state is cached, rather than simulated keys and values."""
        return not self.simulates or self.config.simulation_cache == "base"

    @property
    def rotates_at_use(self) -> bool:
        """Whether keys are cached before rotation, so that their positions must be known at every step."""
        return self.caches_state and (self.simulates or not self.rotates_state)

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, T, C]`.
            position_embeddings: cos and sin `[B, T, R]` of the tokens, `None` without RoPE.
            key_position_embeddings: cos and sin `[B, S, R]` of all keys; differs from `position_embeddings` only where
                keys are rotated at use.
            attention_mask: as `create_causal_mask` makes it.
            cache: to read and extend, also the pool of continuous batching.
            token_mixing: for kinds that mix tokens: positions `[B, T]` of the tokens and `[B, S]` of all keys, and
                which key each token may see, boolean `[B, 1, T, S]`.
            layer_idx: the layer's place in the cache; the one it was made with when `None`.

        Returns:
            `[B, T, C]`, and the attention weights `[B, Ĥ, T, S]` where the implementation gives them.

        Raises:
            ValueError: for continuous batching with a cache form that its pool cannot hold; for a cache that holds
                something of another form.
        """
        query, *state = self.project(hidden_states)
        layer_idx = self.layer_idx if layer_idx is None else layer_idx
        if self.mixes_tokens:
            state = self.mix_tokens(state[0], cache, layer_idx, token_mixing)
        rotated = self.rotates_state and not self.simulates
        if rotated:
            state = self.rotate_state(*state, position_embeddings)

        if not self.rotates_at_use:
            key_position_embeddings = position_embeddings
        elif kwargs.get("block_table") is not None:
            raise ValueError(
                "Continuous batching asks the attention kernel to read keys from its block table, but this model "
                "simulates them after the cache. Pass `ContinuousBatchingConfig(max_blocks_per_request=0)`."
            )
        if self.caches_state and cache is not None:
            # Caches hold heads before tokens, states tokens before heads.
            state = self.extend(cache, layer_idx, *(tensor.transpose(1, 2) for tensor in state), kwargs)
            state = [tensor.transpose(1, 2) for tensor in state]
            if self.simulates and can_shorten(cache, state[0], attention_mask):
                filled = int(cache.get_seq_length(layer_idx))
                state = [tensor[:, :filled] for tensor in state]
                attention_mask = None if attention_mask is None else attention_mask[..., :filled]
                if key_position_embeddings is not None:
                    key_position_embeddings = tuple(table[:, :filled] for table in key_position_embeddings)

        key, value = self.expand(*state)
        sides = (self.q_simulation, self.k_simulation, self.v_simulation)
        tables = (*(position_embeddings or (None, None)), *(key_position_embeddings or (None, None)))
        if self.simulates and all(is_plain(side) for side in sides) and not wants_gradient(tables):
            weights = [weight for side in sides for weight in simulation_weights(side)]
            tensors = (query, key, value, *tables, *weights)
            if self.recomputes(cache, tensors):
                output = self.attend_recomputing(tensors, attention_mask, **kwargs)
                return self.aggregate(output), None
            query, key, value = simulate_all(self.acts, *tensors)
        else:
            query = rotate_leading_features(self.q_simulation(query), position_embeddings).transpose(1, 2)
            key = self.k_simulation(key)
            key = (key if rotated else rotate_leading_features(key, key_position_embeddings)).transpose(1, 2)
            value = self.v_simulation(value).transpose(1, 2)
        if not self.caches_state and cache is not None:
            key, value = self.extend(cache, layer_idx, key, value, kwargs)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.aggregate(output), weights

    def extend(
        self, cache: Cache, layer_idx: int, first: torch.Tensor, second: torch.Tensor, kwargs: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache holds at `layer_idx` and the new `[B, heads, T, width]`, which it keeps, too.

        The pool of continuous batching takes what it needs from `kwargs`, and leaves there what attention needs.
        """
        layers = getattr(cache, "layers", ())  # a pool has none, and its form is checked when it is made
        layer = layers[layer_idx] if layer_idx < len(layers) else None
        if layer is not None and layer.keys is not None and layer.keys.numel():
            for held, new in ((layer.keys, first), (layer.values, second)):
                if held.shape[1] != new.shape[1] or held.shape[3] != new.shape[3]:
                    self.refuse_form(held, new, "keys" if new is first else "values")
        return cache.update(first, second, layer_idx, kwargs=kwargs)

    def refuse_form(self, held: torch.Tensor, new: torch.Tensor, what: str) -> None:
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

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores and their softmax over values by the implementation that is set: `[B, heads, T, width]` to
        `[B, T, heads, D_v]`, and the weights where it gives them."""
        if self.attends_in_blocks(query, query.shape[-1], attention_mask, kwargs):
            is_causal = self.masks_future(attention_mask, query.shape[2], kwargs)
            if is_causal:  # a static cache has empty slots behind
                key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            return BlockedAttention.apply(query, key, value, attention_mask, is_causal, self.scaling), None
        dropout = self.attention_dropout if self.training else 0.0
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager_attention_forward)
        return interface(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def aggregate(self, output: torch.Tensor) -> torch.Tensor:
        """`[B, T, heads, D_v]` to `[B, T, C]`."""
        if not self.simulates_heads:  # under tensor parallelism perhaps a part of the heads
            return self.o_proj(output.flatten(2))
        return self.o_proj(aggregate_heads(output, self.num_heads))

    def attend_recomputing(
        self, tensors: tuple[torch.Tensor | None, ...], attention_mask: torch.Tensor | None, **kwargs
    ) -> torch.Tensor:
        """`attend(*simulate_all(*tensors))`, simulated again in the backward pass."""
        query = tensors[0]
        if self.attends_in_blocks(query, self.config.simulated_head_dim or query.shape[-1], attention_mask, kwargs):
            is_causal = self.masks_future(attention_mask, query.shape[1], kwargs)
            simulate = partial(simulate_all, self.acts)
            return RecomputedAttention.apply(simulate, attention_mask, is_causal, self.scaling, *tensors)

        def attention(*tensors):
            return self.attend(*simulate_all(self.acts, *tensors), attention_mask, **kwargs)[0]

        return recompute_around_kernel(attention, *tensors)

    def recomputes(self, cache: Cache | None, tensors: tuple[torch.Tensor | None, ...]) -> bool:
        """Whether this call is a step of training whose simulation shall run again in the backward pass."""
        return (
            self.config.recompute_simulation
            and cache is None
            and self.implementation not in ("eager", "flex_attention")  # which keep, or compile, the scores
            and torch.is_grad_enabled()
            and wants_gradient(tensors)
        )

    def attends_in_blocks(
        self, query: torch.Tensor, query_width: int, attention_mask: torch.Tensor | None, kwargs: dict
    ) -> bool:
        """Whether `blocked_attention` computes what the implementation is asked for, faster."""
        return (
            query_width != self.value_head_dim
            and self.num_key_value_groups == 1
            and self.implementation == "sdpa"
            and not (self.training and self.attention_dropout)
            and not any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
            and not wants_gradient((attention_mask,))
            and serves(query)
        )

    def masks_future(self, attention_mask: torch.Tensor | None, length: int, kwargs: dict) -> bool:
        """Whether the kernel hides the future itself, as Transformers' SDPA has it: no mask, more than one query."""
        is_causal = kwargs.get("is_causal")
        return attention_mask is None and length > 1 and (self.is_causal if is_causal is None else is_causal)

    @property
    def acts(self) -> list[nn.Module]:
        """The non-linearities of the simulation of queries, keys and values."""
        sides = (self.q_simulation, self.k_simulation, self.v_simulation)
        return [side[0].act if len(side) else nn.Identity() for side in sides]

    @property
    def implementation(self) -> str:
        # Every cache was extended before, the pool of continuous batching too: "paged|" asks for nothing more.
        return self.config._attn_implementation.removeprefix("paged|")


def wants_gradient(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether any of `tensors` is to be derived by."""
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def can_shorten(cache: Cache, state: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether the empty slots of a static cache can be left out, whose simulation would be for nothing.

    Elsewhere their number would have to be fetched from the device, and shapes would change under a compiled graph.
    """
    return (
        getattr(cache, "is_compileable", False)
        and state.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and (attention_mask is None or isinstance(attention_mask, torch.Tensor))
    )
