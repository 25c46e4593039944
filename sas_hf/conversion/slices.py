"""Optimised and efficient attention from a multi-head source: what takes over from the projections that they lack.

Their values (and efficient attention's keys) are slices of the layer's input. W^O is fitted in lossy.py, as for every
lossy conversion; here are the queries and keys.
"""

from collections.abc import Iterable

import torch

from ..modeling.attention import SASAttention
from ..modeling.attention_functions import repeat_kv
from ..modeling.kinds import EfficientAttention
from ..modeling.positions import rotate_leading_features
from .least_squares import split_bias, with_ones, with_ridge


QUERIES_AT_ONCE = 32  # of a text, whose keys' covariances are averaged


def keep_queries_and_keys(old: SASAttention, new: SASAttention, texts: Iterable, rotation) -> None:
    """Optimised attention has the source's queries and keys, each key/value head repeated for the heads it serves."""
    for side, groups in (("q_proj", 1), ("k_proj", old.num_heads // old.config.num_key_value_heads)):
        for name, parameter in getattr(new, side).named_parameters():
            weight = getattr(getattr(old, side), name)
            heads = weight.unflatten(0, (-1, old.head_dim)).repeat_interleave(groups, dim=0)
            parameter.copy_(heads.flatten(0, 1))


def fit_queries(
    old: SASAttention, new: EfficientAttention, texts: Iterable[tuple[torch.Tensor, torch.Tensor]], rotation
) -> None:
    """Efficient attention's queries, such that their scores with slices of the input are the source's scores.

    The softmax ignores what all scores of a query share, and to second order its KL divergence from the source's
    attention a is ½ Σ_n a_mn (Δs_mn - mean)². For the query q'_m = x_m W of one head that is q'ᵀ F_m q' - 2 q'ᵀ g_m,
    where F_m is the covariance under a of the keys (slices, rotated, as seen from position m) and g_m that of keys and
    scores. With F_m replaced by its mean F over queries, the one approximation, the minimum is closed:
    W = (XᵀX)⁻¹ (Xᵀ g) F⁻¹.

    Args:
        texts: pairs of the inputs `[1, T, C]` of `old` and of `new` for the same tokens.
        rotation: hidden states → cos and sin, or `None` in layers without RoPE.
    """
    bias = new.q_proj.bias is not None
    gram = moment = covariance = torch.zeros(())
    queries = 0
    for source, own in texts:
        tables = rotation(source)
        back = None if tables is None else (tables[0], -tables[1])
        query, (key, _) = old.project_queries(source), old.project_state(source)
        query, key = (rotate_leading_features(side, tables).transpose(1, 2) for side in (query, key))
        scores = (query @ repeat_kv(key, query.shape[1] // key.shape[1]).transpose(2, 3))[0]
        length = scores.shape[-1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        weights = (scores * old.scaling).masked_fill(hidden & old.is_causal, float("-inf")).softmax(-1)

        slices = own.unflatten(-1, (old.num_heads, -1))
        keys = rotate_leading_features(slices, tables)[0].transpose(0, 1)  # [H, T, d]
        mean_key, mean_score = weights @ keys, (weights * scores).sum(-1, keepdim=True)
        shared = (weights * scores) @ keys - mean_score * mean_key
        shared, mean_key = (
            rotate_leading_features(side.transpose(0, 1)[None], back)[0] for side in (shared, mean_key)
        )  # [T, H, d], as seen from each query's own position
        x = with_ones(own[0].double(), bias)
        gram = gram + x.T @ x
        moment = moment + torch.einsum("tc,thd->hcd", x, shared.double())

        for place in range(length // (2 * QUERIES_AT_ONCE), length, max(1, length // QUERIES_AT_ONCE)):
            at_place = None if back is None else tuple(table[:, place : place + 1] for table in back)
            seen = rotate_leading_features(keys.transpose(0, 1)[None], at_place)[0].transpose(0, 1)
            second = (seen * weights[:, place, :, None]).transpose(1, 2) @ seen
            covariance = covariance + (second - mean_key[place, :, :, None] * mean_key[place, :, None, :]).double()
            queries += 1
    towards = torch.linalg.solve(with_ridge(gram), moment)  # [H, C, d]
    ridged = torch.stack([with_ridge(head) for head in covariance / queries])
    weight, constant = split_bias(torch.linalg.solve(ridged, towards.transpose(1, 2)).flatten(0, 1).T, bias)
    new.q_proj.weight.copy_(weight)
    if constant is not None:
        new.q_proj.bias.copy_(constant)
