"""The attention kinds: how hidden states become queries and a state, and how a state becomes keys and values.

One class per kind. Adding a kind is a class here, its name in `ATTENTION_CLASSES`, and its fields and checks
in configuration_attention.py. Any of them may be simulated, except "super".
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .attention import SASAttention
from .norm import SASRMSNorm
from .positions import rotate_leading_features
from .simulation import SIMULATION_LAYERS, initialize_simulation
from .transforms import part_features


class MultiHeadAttention(SASAttention):
    """
    Multi-head, grouped-query and multi-query attention ("Attention Is All You Need"; GQA, arXiv:2305.13245).

    Cached: H_kv keys and values, 2·H_kv·D numbers per token.
    """

    rotates_state = True

    def make_projections(self, config: PreTrainedConfig) -> None:
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.qk_norm = config.qk_norm
        self.q_norm = self.k_norm = None
        if self.qk_norm is not None:
            per_head = self.qk_norm == "per_head"
            self.q_norm = SASRMSNorm(self.head_dim if per_head else self.q_proj.out_features, config.rms_norm_eps)
            self.k_norm = SASRMSNorm(self.head_dim if per_head else kv_width, config.rms_norm_eps)

    def project_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.heads(hidden_states, self.q_proj, self.q_norm)

    def project_state(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.heads(source, self.k_proj, self.k_norm), self.heads(source, self.v_proj)

    def heads(self, states: torch.Tensor, projection: nn.Module, norm: nn.Module | None = None) -> torch.Tensor:
        """`[B, T, C]` to normed heads `[B, T, n, D]`."""
        states = projection(states)
        if self.qk_norm == "all_heads" and norm is not None:
            states = norm(states)
        states = states.unflatten(-1, (-1, self.head_dim))
        return norm(states) if self.qk_norm == "per_head" and norm is not None else states


class MultiHeadLatentAttention(SASAttention):
    """
    Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): low-rank latents for queries and for keys and values,
    and a RoPE part of the keys that all heads share.

    A head's features are its `qk_rope_head_dim` RoPE features, then its `qk_nope_head_dim` others. Cached: the normed
    key/value latent and the RoPE key, `kv_lora_rank + qk_rope_head_dim` numbers per token.
    """

    rotates_state = True

    def make_projections(self, config: PreTrainedConfig) -> None:
        hidden_size, heads, bias = config.hidden_size, self.num_heads, config.attention_bias
        self.rope_dim, self.nope_dim = config.qk_rope_head_dim, config.qk_nope_head_dim
        self.value_head_dim = config.v_head_dim
        self.q_a_proj = nn.Linear(hidden_size, config.q_lora_rank, bias=bias)
        self.q_a_layernorm = SASRMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (self.rope_dim + self.nope_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, config.kv_lora_rank + self.rope_dim, bias=bias)
        self.kv_a_layernorm = SASRMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (self.nope_dim + self.value_head_dim), bias=False)

    def project_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return query.unflatten(-1, (self.num_heads, -1))

    def project_state(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent, rope_key = part_features(self.kv_a_proj_with_mqa(source), self.config.kv_lora_rank)
        return self.kv_a_layernorm(latent).unsqueeze(2), rope_key.unsqueeze(2)

    def rotate_state(self, latent, rope_key, position_embeddings):
        return latent, rotate_leading_features(rope_key, position_embeddings)

    def expand(self, latent: torch.Tensor, rope_key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = self.kv_b_proj(latent.squeeze(2)).unflatten(-1, (self.num_heads, -1))
        nope_key, value = part_features(heads, self.nope_dim)
        return torch.cat((rope_key.expand(-1, -1, self.num_heads, -1), nope_key), dim=-1), value


class FactorProjection(nn.Linear):
    """Makes R factors of each token, whose outer products with R others are averaged.

    Attributes:
        rank: R.
    """

    rank: int

    def initialize(self, std: float) -> None:
        """Start so that the mean of products has the size that a plain projection with N(0, std) gives.

        With N(0, std) for the factors themselves, queries and keys would be products of small numbers and attention
        uniform.
        """
        init.normal_(self.weight, mean=0.0, std=(std**2 * self.rank / self.in_features) ** 0.25)


class TensorProductAttention(SASAttention):
    """
    Tensor product attention (TPA, arXiv:2501.06425): per token, queries, keys and values are each the mean over R
    ranks of an outer product of head factors `[H]` and feature factors `[D]`.

    Cached: the factors of keys and of values, (R_k + R_v)·(H + D) numbers per token; rotating the feature factors
    rotates the keys.
    """

    rotates_state = True

    def make_projections(self, config: PreTrainedConfig) -> None:
        hidden_size, bias = config.hidden_size, config.attention_bias
        self.ranks = {"q": config.q_rank, "k": config.k_rank, "v": config.v_rank}
        for side, rank in self.ranks.items():
            for name, width in (("head", self.num_heads), ("feature", self.head_dim)):
                projection = FactorProjection(hidden_size, rank * width, bias=bias)
                projection.rank = rank
                setattr(self, f"{side}_{name}_proj", projection)

    def factors(self, hidden_states: torch.Tensor, side: str) -> torch.Tensor:
        """`[B, T, C]` to `[B, T, R, H + D]`: head factors, then feature factors."""
        shape = (self.ranks[side], -1)
        heads = getattr(self, f"{side}_head_proj")(hidden_states).unflatten(-1, shape)
        features = getattr(self, f"{side}_feature_proj")(hidden_states).unflatten(-1, shape)
        return torch.cat((heads, features), dim=-1)

    def contract(self, factors: torch.Tensor) -> torch.Tensor:
        """`[B, T, R, H + D]` to `[B, T, H, D]`."""
        heads, features = part_features(factors, self.num_heads)
        return heads.transpose(-1, -2) @ features / factors.shape[-2]

    def project_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.contract(self.factors(hidden_states, "q"))

    def project_state(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.factors(source, "k"), self.factors(source, "v")

    def rotate_state(self, key, value, position_embeddings):
        heads, features = part_features(key, self.num_heads)
        return torch.cat((heads, rotate_leading_features(features, position_embeddings)), dim=-1), value

    def expand(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.contract(key), self.contract(value)


class OptimisedAttention(SASAttention):
    """
    Optimised attention ("You Need to Pay Better Attention", arXiv:2403.01643, equations 9-12): no value projection;
    the i-th head's values are the i-th slice of the layer's input (in cross-attention, of the source).

    Cached: keys and input, 2·C numbers per token.
    """

    rotates_state = True

    def make_projections(self, config: PreTrainedConfig) -> None:
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def project_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))

    def project_state(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(states.unflatten(-1, (-1, self.head_dim)) for states in (self.k_proj(source), source))


class EfficientAttention(SASAttention):
    """
    Efficient attention (arXiv:2403.01643, equations 13-16): neither key nor value projection; both are slices of the
    layer's input.

    Cached: the input, C numbers per token; keys are rotated at use.
    """

    state_is_single = True

    def make_projections(self, config: PreTrainedConfig) -> None:
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def project_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))

    def project_state(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slices = source.unflatten(-1, (-1, self.head_dim))
        return slices, slices[..., :0]

    def expand(self, slices: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return slices, slices


class TokenMixing(nn.Module):
    """W^A (arXiv:2403.01643, equation 22): an affine map along the tokens, one for all heads.

    Stored in full for ℓ = `max_position_embeddings` positions; which rows, columns and entries count is decided by
    positions and mask at each call.
    """

    def __init__(self, length: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, length))
        self.bias = nn.Parameter(torch.empty(length))

    def forward(
        self, values: torch.Tensor, position_ids: torch.Tensor, key_positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            values: `[B, S, H, D]` of all tokens seen.
            position_ids: `[B, T]`, positions of the tokens to mix for.
            key_positions: `[B, S]`.
            mask: boolean `[B, 1, T, S]`, which tokens each may see.

        Returns:
            `[B, T, H, D]`.
        """
        rows = self.weight[position_ids.unsqueeze(-1), key_positions.unsqueeze(-2)]
        mixed = torch.matmul(rows.masked_fill(~mask.squeeze(1), 0.0), values.flatten(2))
        return (mixed + self.bias[position_ids].unsqueeze(-1)).unflatten(-1, values.shape[2:])

    def initialize(self, method: str, std: float) -> None:
        """ "identity": Super attention starts as Efficient attention; "normal": N(0, std)."""
        if method == "identity":
            init.eye_(self.weight)
        else:
            init.normal_(self.weight, mean=0.0, std=std)
        init.zeros_(self.bias)


class SuperAttention(EfficientAttention):
    """
    Super attention (arXiv:2403.01643, equations 19-23): Efficient attention whose values are mixed along the tokens.

    Cached: the input and the mixed values, 2·C numbers per token. In causal use a token's mixed value depends on
    earlier tokens only, so it is computed once.
    """

    state_is_single = False
    mixes_tokens = True

    def make_projections(self, config: PreTrainedConfig) -> None:
        super().make_projections(config)
        self.token_mixing = TokenMixing(config.max_position_embeddings)

    def mix_tokens(self, slices: torch.Tensor, token_mixing: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        if token_mixing is None:
            raise ValueError(
                "`attention_type='super'` mixes values along the tokens, each position with its own parameters: give "
                "the layer `token_mixing`, the source's positions and who may see whom."
            )
        return self.token_mixing(slices, *token_mixing)

    def expand(self, slices: torch.Tensor, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return slices, mixed


def with_boolean_masks(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration under which Transformers makes boolean masks, whatever the attention implementation: who mixes
    with whom is wanted so."""
    config = copy.copy(config)
    config._attn_implementation = "sdpa"
    return config


def as_boolean(mask: torch.Tensor) -> torch.Tensor:
    """True where one may see the other, also for a mask that the caller prepared to be added to scores."""
    return mask if mask.dtype == torch.bool else mask == 0


ATTENTION_CLASSES: dict[str, type[SASAttention]] = {
    "mha": MultiHeadAttention,
    "mqa": MultiHeadAttention,
    "gqa": MultiHeadAttention,
    "mla": MultiHeadLatentAttention,
    "tpa": TensorProductAttention,
    "optimised": OptimisedAttention,
    "efficient": EfficientAttention,
    "super": SuperAttention,
}


def make_attention(config: PreTrainedConfig, layer_idx: int) -> SASAttention:
    """The attention layer that `config.attention_type` names."""
    return ATTENTION_CLASSES[config.attention_type](config, layer_idx)


def initialize_attention(module: nn.Module, config: PreTrainedConfig) -> None:
    """Start a layer of attention that needs a start of its own; to be called after the base class's `_init_weights`,
    which gives convolutions and linear maps N(0, `initializer_range`)."""
    if isinstance(module, SIMULATION_LAYERS):
        initialize_simulation(module, config.simulation_init)
    elif isinstance(module, FactorProjection):
        module.initialize(config.initializer_range)
    elif isinstance(module, TokenMixing):
        module.initialize(config.token_mixing_init, config.initializer_range)
