"""Marian checkpoints (opus-mt): BART without a norm of the embeddings, and with sinusoidal positions.

The positions are in the source's weights, though they are never trained and not saved; here they are computed. A table
that says something else is refused.
"""

from collections.abc import Iterable, Sequence

import torch
from transformers import MarianConfig
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from .bart import BART_FIELDS, BART_NAMES, seq2seq_architectures
from .bart import derive as derive_as_bart
from .bart import join as join_as_bart
from .bart import tensors as tensors_as_bart
from .family import ConversionError, SourceFamily, same


def derive(config: MarianConfig) -> dict:
    # Shared tables are one only where matrices are tied at all.
    return derive_as_bart(config) | {
        "share_encoder_decoder_embeddings": config.share_encoder_decoder_embeddings and config.tie_word_embeddings
    }


def sinusoids(config: MarianConfig) -> torch.Tensor:
    with torch.device("cpu"):
        return MarianSinusoidalPositionalEmbedding(config.max_position_embeddings, config.d_model).create_weight()


def tensors(name: str, weight: torch.Tensor, config: MarianConfig) -> Iterable[torch.Tensor]:
    if ".embed_positions." not in name:
        return tensors_as_bart(name, weight, config)
    expected = sinusoids(config).to(weight)
    # Of libraries that round sines in another way.
    if (weight - expected).abs().max() > 1e-6 + torch.finfo(weight.dtype).eps:
        raise ConversionError(
            f"{name} holds other numbers than Marian's sinusoidal positions, which the SAS model computes: "
            f"{(weight - expected).abs().max().item():.3g} apart; take it out of the source's weights if they were "
            "not trained."
        )
    return ()


def join(name: str, weights: Sequence[torch.Tensor], config: MarianConfig) -> torch.Tensor:
    return join_as_bart(name, weights, config) if weights else sinusoids(config)


MARIAN = SourceFamily(
    model_type="marian",
    architectures=seq2seq_architectures("Marian", "MTModel"),
    fields=BART_FIELDS | same("decoder_vocab_size"),
    constants={
        "position_embedding_type": "sinusoidal",
        "padding_takes_positions": True,
        "embedding_norm": False,
        "norm_position": "post_residual",
        "layer_norm_eps": 1e-5,
        "lm_head_bias": True,
    },
    derive=derive,
    names=BART_NAMES | {"embed_positions": ()},
    tensors=tensors,
    join=join,
)
