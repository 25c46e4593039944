"""Multi-head latent attention from a multi-head source: a shared RoPE key, and the rest by a joint SVD.

MLA rotates one key for all heads, whose pairs have one frequency each, and nothing else. At each frequency the keys of
all heads are numbers of the complex plane, and RoPE turns them alike, so any complex combination of them can be
rotated in their place. The combination kept is their first principal component, weighted by the energy of the queries
they meet. What it misses becomes a part of the unrotated keys, with its rotation replaced by the mean rotation of the
attended distances: right for slow frequencies, nearly nothing for fast ones. So the conversion of one key/value head
is exact at full rank, of more it is not, at any rank; in layers without RoPE it is exact at full rank.

Unrotated keys and values are one affine function of the input, reduced by PCA over the calibration text (the SVD that
is best on data). The norms of the latents would scale every token by its own number. They are disarmed by one feature
of the latent that holds a large constant: the root mean square is then that constant's, and the feature itself serves
as the bias that MLA's second projections lack. The price is one of the rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..modeling.attention import SASAttention
from ..modeling.attention_functions import repeat_kv
from ..modeling.kinds import MultiHeadLatentAttention
from ..modeling.norm import SASRMSNorm
from ..modeling.positions import rotate_leading_features


CONSTANT = 1024.0  # times the latent's usual length: the norm is constant to half of 1024⁻², 5e-7


@dataclass
class Moments:
    """Means `[n]` and second moments `[n, n]` of vectors, in float64."""

    count: int = 0
    sum: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    products: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: torch.Tensor) -> None:
        x = x.flatten(0, -2).double()
        self.count += len(x)
        self.sum = self.sum + x.sum(0)
        self.products = self.products + x.T @ x

    @property
    def mean(self) -> torch.Tensor:
        return self.sum / self.count

    @property
    def second(self) -> torch.Tensor:
        return self.products / self.count

    @property
    def covariance(self) -> torch.Tensor:
        return self.second - torch.outer(self.mean, self.mean)


def fit_latents(
    old: SASAttention, new: MultiHeadLatentAttention, texts: Sequence[tuple[torch.Tensor, torch.Tensor]], rotation
) -> None:
    """Set all of `new`, an MLA layer, but W^O.

    Args:
        texts: pairs of the inputs `[1, T, C]` of `old` and of `new` for the same tokens.
        rotation: hidden states → cos and sin, or `None` in layers without RoPE.
    """
    heads, kv_heads, width = old.num_heads, old.config.num_key_value_heads, old.head_dim
    queries, keys_and_values, turns = Moments(), Moments(), torch.zeros(())
    for _, own in texts:
        query, (key, value) = old.project_queries(own), old.project_state(own)
        queries.add(query.flatten(2))
        keys_and_values.add(torch.cat((key, value), dim=2).flatten(2))
        turns = turns + mean_rotation(old, query, key, rotation(own), new.rope_dim)
    turns = turns / len(texts)  # [H, R / 2], complex
    turns = turns.unflatten(0, (kv_heads, -1)).mean(dim=1)

    # Root mean square of each query feature, over the heads that a key/value head serves; of both in a pair alike.
    energy = queries.second.diagonal().view(kv_heads, heads // kv_heads, width).mean(dim=1)
    first, second = slice(0, new.rope_dim // 2), slice(new.rope_dim // 2, new.rope_dim)
    energy[:, first] = energy[:, second] = (energy[:, first] + energy[:, second]) / 2
    energy = energy.clamp(min=1e-12 * energy.max()).sqrt()

    keys = kv_heads * width
    share, spread = shared_key(keys_and_values.second[:keys, :keys], energy[:, first], kv_heads, width)
    rest = torch.eye(keys, dtype=share.dtype, device=share.device) - spread @ share
    size = energy.clone()
    size[:, first] = size[:, second] = energy[:, first] * turns.abs().clamp(min=1e-9)
    rest = size.flatten()[:, None] * rest

    project_queries(old, new, queries, spread, turns, size)
    project_keys_and_values(old, new, keys_and_values, share, rest)


def mean_rotation(old: SASAttention, query, key, tables, width: int) -> torch.Tensor:
    """Mean over queries and over what they attend to of the rotation e^{iω(m-n)}, complex `[H, width / 2]`."""
    heads = query.shape[2]
    if tables is None:
        return torch.ones(heads, width // 2, dtype=torch.complex128, device=query.device)
    rotated_query, rotated_key = (rotate_leading_features(x, tables).transpose(1, 2) for x in (query, key))
    scores = (rotated_query @ repeat_kv(rotated_key, heads // key.shape[2]).transpose(2, 3))[0] * old.scaling
    unseen = torch.ones_like(scores[0], dtype=torch.bool).triu(1) & old.is_causal
    weights = scores.masked_fill(unseen, float("-inf")).softmax(-1).double()
    cos, sin = (table[0, :, : width // 2].double() for table in tables)
    turn = torch.complex(cos, sin)  # e^{iωm}, times the scaling that some types of RoPE have
    return (turn * (weights.to(turn.dtype) @ turn.conj())).mean(dim=1)


def shared_key(
    second: torch.Tensor, energy: torch.Tensor, heads: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared RoPE key as a map of all heads' keys `[R, heads·width]`, and the keys as a map of it, its converse.

    Args:
        second: second moments of the keys `[heads·width, heads·width]`.
        energy: root mean square of the queries that meet a head at each frequency `[heads, R / 2]`.
    """
    half = energy.shape[1]
    share = second.new_zeros(2 * half, heads * width)
    spread = second.new_zeros(heads * width, 2 * half)
    for j in range(half):
        real, imaginary = (torch.arange(heads, device=second.device) * width + j + part for part in (0, half))
        table = {
            (a, b): second[rows][:, columns]
            for a, rows in enumerate((real, imaginary))
            for b, columns in enumerate((real, imaginary))
        }
        products = torch.complex(table[0, 0] + table[1, 1], table[1, 0] - table[0, 1])
        scale = energy[:, j]
        principal = torch.linalg.eigh(products * torch.outer(scale, scale))[1][:, -1]
        _place(share, torch.tensor([j]), real, (principal.conj() * scale)[None], half)
        _place(spread, real, torch.tensor([j]), (principal / scale)[:, None], half)
    return share, spread


def _place(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, factors: torch.Tensor, half: int) -> None:
    """Write complex factors into the real matrix of pairs (i, i + half)."""
    matrix[rows[:, None], columns] = factors.real
    matrix[rows[:, None], columns + half] = -factors.imag
    matrix[rows[:, None] + half, columns] = factors.imag
    matrix[rows[:, None] + half, columns + half] = factors.real


def project_queries(old, new, queries: Moments, spread: torch.Tensor, turns: torch.Tensor, size: torch.Tensor) -> None:
    """Each head's RoPE queries meet the shared key in place of its own, its others the unrotated rest."""
    heads, kv_heads, width, half = old.num_heads, old.config.num_key_value_heads, old.head_dim, new.rope_dim // 2
    maps = []
    for head in range(heads):
        kv_head = head * kv_heads // heads
        plain = torch.eye(width, dtype=spread.dtype, device=spread.device)
        pairs = torch.arange(half, device=spread.device)
        turn = torch.diag(turns[kv_head])
        plain[: 2 * half, : 2 * half] = 0
        _place(plain, pairs, pairs, turn, half)
        rotated = spread[kv_head * width : (kv_head + 1) * width].T
        maps.append(torch.cat((rotated, plain / size[kv_head][:, None])))
    rank = new.q_a_proj.out_features
    values, directions = torch.linalg.eigh(queries.covariance)
    kept = directions[:, -(rank - 1) :]
    set_latent(new.q_a_proj, new.q_a_layernorm, rank, old.q_proj, kept, queries.mean, values[-(rank - 1) :])
    affine = torch.cat((kept, queries.mean[:, None]), dim=1).unflatten(0, (heads, width))
    parts = torch.stack([head_map @ part for head_map, part in zip(maps, affine, strict=True)])
    new.q_b_proj.weight.copy_(_padded(parts.flatten(0, 1), rank))


def project_keys_and_values(old, new, keys_and_values: Moments, share: torch.Tensor, rest: torch.Tensor) -> None:
    heads, kv_heads, width = old.num_heads, old.config.num_key_value_heads, old.head_dim
    keys = len(rest)
    both = nn.Linear(old.k_proj.in_features, 2 * keys)
    both.weight.data = torch.cat((old.k_proj.weight, old.v_proj.weight)).double()
    biases = [side.weight.new_zeros(keys) if side.bias is None else side.bias for side in (old.k_proj, old.v_proj)]
    both.bias.data = torch.cat(biases).double()

    # Unrotated keys weigh as much as values in what the latent keeps.
    covariance = keys_and_values.covariance
    key_energy = (rest @ covariance[:keys, :keys] * rest).sum()
    value_energy = covariance[keys:, keys:].diagonal().sum()
    nothing = key_energy <= 1e-9 * covariance[:keys, :keys].diagonal().sum()
    balance = 0.0 if nothing else (value_energy / key_energy).sqrt()
    change = torch.block_diag(balance * rest, torch.eye(keys, dtype=rest.dtype, device=rest.device))
    rank = new.config.kv_lora_rank
    values, directions = torch.linalg.eigh(change @ covariance @ change.T)
    kept = directions[:, -(rank - 1) :]

    mean = keys_and_values.mean
    set_latent(new.kv_a_proj_with_mqa, new.kv_a_layernorm, rank, both, change.T @ kept, mean, values[-(rank - 1) :])
    new.kv_a_proj_with_mqa.weight[rank:].copy_(share @ both.weight[:keys])
    new.kv_a_proj_with_mqa.bias[rank:].copy_(share @ both.bias[:keys])
    affine = torch.cat((kept, (change @ mean)[:, None]), dim=1)
    unrotated = affine[:keys] * (0.0 if nothing else 1 / balance)
    parts = torch.cat([part.unflatten(0, (kv_heads, width)) for part in (unrotated, affine[keys:])], dim=1)
    new.kv_b_proj.weight.copy_(_padded(parts.repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1), rank))


def set_latent(
    projection: nn.Linear,
    norm: SASRMSNorm,
    rank: int,
    inner: nn.Linear,
    kept: torch.Tensor,
    mean: torch.Tensor,
    variances: torch.Tensor,
) -> None:
    """Let the first `rank` outputs of `projection`, normed by `norm`, be keptᵀ(inner(x) - mean), zeros, and a one."""
    used = kept.shape[1]
    inner_bias = 0.0 if inner.bias is None else inner.bias.double()
    projection.weight[:rank].zero_()
    projection.bias[:rank].zero_()
    projection.weight[:used].copy_(kept.T @ inner.weight.double())
    projection.bias[:used].copy_(kept.T @ (inner_bias - mean))
    constant = CONSTANT * max(variances.clamp(min=0).sum().sqrt().item(), 1e-3)
    projection.bias[rank - 1] = constant
    norm.weight.fill_(constant / rank**0.5)
    norm.weight[rank - 1] = rank**-0.5


def _padded(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """`[n, used + 1]` to `[n, rank]`: zeros for unused features of the latent, before the constant one."""
    return torch.cat((weight[:, :-1], weight.new_zeros(len(weight), rank - weight.shape[1]), weight[:, -1:]), dim=1)
