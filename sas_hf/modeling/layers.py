"""What layers of text models are made of: norms, the feed-forward block, and residual branches with their norms."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack

from .annotations import ForwardKwargs
from .kinds import make_attention
from .norm import SASRMSNorm


def make_norm(config: PreTrainedConfig) -> nn.Module:
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return SASRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def final_norm(config: PreTrainedConfig) -> nn.Module | None:
    """The norm behind the last layer; none where every layer ends in one."""
    return None if config.norm_position == "post_residual" else make_norm(config)


class SASMLP(nn.Module):
    """Feed-forward block: `down(act(gate(x)) * up(x))` (gated) or `down(act(up(x)))` (plain)."""

    def __init__(self, config: PreTrainedConfig, activation_dropout: float = 0.0):
        super().__init__()
        hidden_size, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden_size, width, bias=bias) if config.mlp_type == "gated" else None
        self.up_proj = nn.Linear(hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(activation_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            activations = self.act_fn(self.up_proj(hidden_states))
        else:
            activations = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.dropout(activations))


class SASEncoderLayer(GradientCheckpointingLayer):
    """
    Attention in both directions, then the feed-forward block. Hidden states in and out: `[B, T, C]`.

    `norm_position` says where each branch f has its norm: `"post_residual"` norm(x + f(x)) ("Attention Is All You
    Need"; BERT, BART), `"pre"` x + f(norm(x)), `"post"` x + norm(f(x)) (OLMo 2).
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.norm_position = config.norm_position
        self.self_attn = make_attention(config, layer_idx)
        self.self_attn_layer_norm = make_norm(config)
        self.mlp = SASMLP(config, config.activation_dropout)
        self.final_layer_norm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def add(
        self, hidden_states: torch.Tensor, norm: nn.Module, branch: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The hidden states and a branch of them, normed where `norm_position` says."""
        if self.norm_position == "pre":
            return hidden_states + self.dropout(branch(norm(hidden_states)))
        if self.norm_position == "post":
            return hidden_states + self.dropout(norm(branch(hidden_states)))
        return norm(hidden_states + self.dropout(branch(hidden_states)))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[ForwardKwargs]) -> torch.Tensor:
        hidden_states = self.add(hidden_states, self.self_attn_layer_norm, lambda x: self.self_attn(x, **kwargs)[0])
        return self.add(hidden_states, self.final_layer_norm, self.mlp)


class SASDecoderLayer(SASEncoderLayer):
    """
    As [`SASEncoderLayer`], and between its two branches attention to a source: hidden states `[B, T, C]` in and out,
    source `[B, S, C]`.

    Args:
        config, cross_config: of its attention to what was decoded, and to the source.
    """

    def __init__(self, config: PreTrainedConfig, cross_config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.encoder_attn = make_attention(cross_config, layer_idx)
        self.encoder_attn_layer_norm = make_norm(config)

    def forward(  # type: ignore[override]  # it reads a source, too
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,  # by its place: re-entrant checkpoints have gradients of such alone
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_token_mixing: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        key_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        token_mixing: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        documents: dict[str, torch.Tensor | int] | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> torch.Tensor:
        own = {
            "position_ids": position_ids,
            "documents": documents,
            "position_embeddings": position_embeddings,
            "key_position_embeddings": key_position_embeddings,
            "attention_mask": attention_mask,
            "token_mixing": token_mixing,
        }
        source = {
            "key_value_states": encoder_hidden_states,
            "attention_mask": encoder_attention_mask,
            "token_mixing": encoder_token_mixing,
        }
        hidden_states = self.add(
            hidden_states, self.self_attn_layer_norm, lambda x: self.self_attn(x, **own, **kwargs)[0]
        )
        hidden_states = self.add(
            hidden_states, self.encoder_attn_layer_norm, lambda x: self.encoder_attn(x, **source, **kwargs)[0]
        )
        return self.add(hidden_states, self.final_layer_norm, self.mlp)
