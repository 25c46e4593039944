"""What encoders and encoder–decoders make hidden states of: tokens, their positions, and whose text they are of."""

import torch
from torch import nn
from transformers import PreTrainedConfig

from .layers import make_norm


class SASScaledEmbedding(nn.Embedding):
    """Embeddings times √C, as in "Attention Is All You Need" (§3.4), Marian and mBART."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embedding_dim**0.5


class SASSinusoidalPositions(nn.Module):
    """
    Sines, then cosines of each position ("Attention Is All You Need", §3.5; in Marian's order): `[B, T]` to
    `[B, T, C]`.

    Computed where they are used, in float64 as Marian's table is: nothing is stored.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if position_ids.device.type == "mps" else torch.float64  # Apple's have no float64
        exponent = torch.arange(0, self.hidden_size, 2, device=position_ids.device, dtype=dtype) / self.hidden_size
        angles = position_ids[..., None].to(dtype) / 10000**exponent
        return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


class SASTextEmbeddings(nn.Module):
    """
    Token ids `[B, T]` to hidden states `[B, T, C]`: the embeddings of tokens, positions and token types, normed where
    `embedding_norm` says.

    Args:
        vocab_size: rows of the table of tokens.
        type_vocab_size: how many token types there are; 0: none.
    """

    def __init__(self, config: PreTrainedConfig, vocab_size: int, type_vocab_size: int = 0):
        super().__init__()
        hidden_size = config.hidden_size
        table = SASScaledEmbedding if config.scale_embedding else nn.Embedding
        self.embed_tokens: nn.Module = table(vocab_size, hidden_size, config.pad_token_id)
        self.embed_positions: nn.Embedding | SASSinusoidalPositions | None = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, hidden_size)
        elif config.position_embedding_type == "sinusoidal":
            self.embed_positions = SASSinusoidalPositions(hidden_size)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size) if type_vocab_size else None
        self.norm = make_norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            inputs_embeds: `[B, T, C]`, of the tokens.
            position_ids: `[B, T]` or `[1, T]`.
            token_type_ids: `[B, T]`; the first type for all when `None`.

        Raises:
            ValueError: for token types of a model that has none.
        """
        hidden_states = inputs_embeds
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(position_ids)
            hidden_states = hidden_states + self.token_type_embeddings(token_type_ids)
        elif token_type_ids is not None and not torch.compiler.is_compiling() and token_type_ids.any():
            raise ValueError("`token_type_ids` tell texts apart, but `type_vocab_size` of this model is 0.")
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids).to(hidden_states.dtype)
        return self.dropout(hidden_states if self.norm is None else self.norm(hidden_states))
