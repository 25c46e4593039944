"""Fewer key/value heads: neighbours are averaged ("GQA", arXiv:2305.13245, §2.1)."""

from collections.abc import Iterable

from ..modeling.attention import SASAttention


def pool_heads(old: SASAttention, new: SASAttention, texts: Iterable, rotation) -> None:
    """Queries are the source's, keys and values (weights, biases and norms) the means of those that are merged."""
    for name, parameter in new.named_parameters():
        if not name.startswith(("q_", "k_", "v_")) or "_simulation." in name:
            continue
        weight = old.get_parameter(name)
        if weight.shape != parameter.shape:
            heads = weight.float().unflatten(0, (new.config.num_key_value_heads, -1, old.head_dim))
            weight = heads.mean(dim=1).flatten(0, 1)
        parameter.copy_(weight)
