"""What an encoder is, alone or as one half of an encoder–decoder: embeddings, layers, and how a text goes through."""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.processing_utils import Unpack

from .annotations import ForwardKwargs, ModelMixin
from .attention import SASAttention
from .embeddings import SASTextEmbeddings
from .layers import SASEncoderLayer, final_norm
from .positions import SASRotaryEmbedding
from .sequence import check_positions, layer_inputs, row_positions


class SASEncoderStack(ModelMixin):
    """Embeddings, layers and norm of an encoder: a model of its own, and one half of an encoder–decoder."""

    def build_stack(self, config: PreTrainedConfig, num_layers: int, type_vocab_size: int = 0) -> None:
        """
        Args:
            config: of the layers and their attention.
        """
        self.embeddings = SASTextEmbeddings(config, config.vocab_size, type_vocab_size)
        self.rotary_emb = SASRotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        self.layers = nn.ModuleList([SASEncoderLayer(config, index) for index in range(num_layers)])
        self.norm = final_norm(config)
        self.gradient_checkpointing = False

    def run_stack(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> torch.Tensor:
        """Hidden states `[B, T, C]`; arguments as in [`SASEncoderModel.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.embed_tokens(input_ids)
        attention: SASAttention = self.layers[0].self_attn  # type: ignore[assignment]  # a list without a type
        given_position_ids, most = position_ids, None
        if position_ids is None:
            most = inputs_embeds.shape[1] - 1
            position_ids = row_positions(attention.config, inputs_embeds, attention_mask)
        if self.embeddings.embed_positions is not None or attention.mixes_tokens:
            check_positions(self.config, position_ids, most)

        _, for_layers = layer_inputs(
            attention.config,
            attention,
            self.rotary_emb,
            inputs_embeds,
            attention_mask,
            position_ids,
            given_position_ids,
            cu_seq_lens_q=kwargs.get("cu_seq_lens_q"),
        )
        hidden_states = self.embeddings(inputs_embeds, position_ids, token_type_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **for_layers, **kwargs)
        return hidden_states if self.norm is None else self.norm(hidden_states)
