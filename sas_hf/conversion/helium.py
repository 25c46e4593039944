"""Helium checkpoints: Llama's weights, whose RoPE turns neighbours instead of halves of a head."""

from collections.abc import Iterable, Sequence

import torch
from transformers import HeliumConfig

from .family import LLAMA_FIELDS, SourceFamily, same, text_architectures


def is_rotated(name: str) -> bool:
    return ".q_proj." in name or ".k_proj." in name


def tensors(name: str, weight: torch.Tensor, config: HeliumConfig) -> Iterable[torch.Tensor]:
    if not is_rotated(name):
        return (weight,)
    pairs = weight.unflatten(0, (-1, config.head_dim // 2, 2))
    return (pairs.transpose(1, 2).flatten(0, 2),)


def join(name: str, weights: Sequence[torch.Tensor], config: HeliumConfig) -> torch.Tensor:
    if not is_rotated(name):
        return weights[0]
    halves = weights[0].unflatten(0, (-1, 2, config.head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


HELIUM = SourceFamily(
    model_type="helium",
    architectures=text_architectures("Helium", without=("ForQuestionAnswering",)),
    fields=LLAMA_FIELDS | same("attention_bias", "mlp_bias"),
    constants={"attention_output_bias": False},
    tensors=tensors,
    join=join,
)
