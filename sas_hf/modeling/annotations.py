"""What signatures of the model files name for type checkers and editors, where Transformers has no name that fits."""

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs


class ForwardKwargs(FlashAttentionKwargs, total=False):
    """What each `forward` hands on: Transformers' `TransformersKwargs` but for what is a parameter of its own here."""

    num_items_in_batch: torch.Tensor | None
    output_hidden_states: bool | None
    output_attentions: bool | None


if TYPE_CHECKING:
    ModelMixin = PreTrainedModel  # what a mixin of models may call of itself

    class AttentionLayer(torch.nn.Module):
        """What attention functions and key stores read of a layer."""

        config: PreTrainedConfig
        layer_idx: int
        is_causal: bool
        num_key_value_groups: int
        state_is_single: bool
        rotates_state: bool
        mixes_tokens: bool

else:
    ModelMixin, AttentionLayer = object, torch.nn.Module
