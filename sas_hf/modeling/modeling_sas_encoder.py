"""The SAS encoder: reads text in both directions with any attention of this package; base model and heads."""

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .annotations import ForwardKwargs
from .attention import SASAttention
from .attention_functions import refuse_pooling_of_vllm
from .configuration_sas_encoder import SASEncoderConfig
from .encoder_stack import SASEncoderStack
from .kinds import initialize_attention
from .layers import SASEncoderLayer
from .losses import choice_loss, classification_loss
from .quantisation import QuantisableMixin
from .registration import register
from .sharing import CodeTravelsMixin


class SASEncoderPooler(nn.Module):
    """A dense layer and an activation on what was pooled: `[B, C]` to `[B, C]`."""

    def __init__(self, config: SASEncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(pooled))


class SASEncoderPreTrainedModel(CodeTravelsMixin, QuantisableMixin, PreTrainedModel):
    """Loading, saving and initialisation shared by the SAS encoder and its heads."""

    config: SASEncoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SASTextEmbeddings", "SASEncoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SASEncoderLayer, "attentions": SASAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_attention(module, self.config)


class SASEncoderModel(SASEncoderPreTrainedModel, SASEncoderStack):
    """
    The encoder without a head: token ids `[B, T]` in, hidden states `[B, T, C]` out.

    Args:
        add_pooling_layer: also return `pooler_output` `[B, C]`, where the configuration has a pooler.
    """

    def __init__(self, config: SASEncoderConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.build_stack(config, config.num_hidden_layers, config.type_vocab_size)
        self.pooler = SASEncoderPooler(config) if add_pooling_layer and config.pooler_act is not None else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids: `[B, T]`; or give `inputs_embeds` `[B, T, C]`.
            attention_mask: `[B, T]`, 0 for padding; or a prepared 4-D mask.
            token_type_ids: `[B, T]`, which text of a pair a token is of.
            position_ids: `[B, T]`. Without a mask, a position that does not follow its neighbour starts a new packed
                document, which sees only itself.

        Raises:
            ValueError: when not exactly one of `input_ids` and `inputs_embeds` is given; for positions beyond
                `max_position_embeddings` with learned or sinusoidal positions or token mixing.
        """
        hidden_states = self.run_stack(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(pool_tokens(self.config, hidden_states, attention_mask))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


def pool_tokens(
    config: SASEncoderConfig, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """`[B, T, C]` to `[B, C]`: the first token of each row, or the mean of its real tokens.

    Padding on the left is passed over, unless `padding_takes_positions` (as BERT, which reads the first slot).
    """
    real = None if attention_mask is None or attention_mask.ndim != 2 else attention_mask.to(hidden_states.device) != 0
    if config.classifier_pooling == "first":
        if real is None or config.padding_takes_positions:
            return hidden_states[:, 0]
        return hidden_states[torch.arange(hidden_states.shape[0], device=real.device), real.int().argmax(-1)]
    if real is None:
        return hidden_states.mean(dim=1)
    weights = real.unsqueeze(-1).to(hidden_states.dtype)
    return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class SASEncoderLMHead(nn.Module):
    """BERT's head for masked tokens: a dense layer, an activation, a norm, and the (tied) embeddings with a bias."""

    def __init__(self, config: SASEncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.lm_head_act or config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.layer_norm(self.act_fn(self.dense(hidden_states))))


class SASEncoderForMaskedLM(SASEncoderPreTrainedModel):
    """The SAS encoder with a head for masked tokens: logits `[B, T, vocab_size]`."""

    _tied_weights_keys = {"lm_head.decoder.weight": "model.embeddings.embed_tokens.weight"}
    _tp_plan = {"lm_head.decoder": "colwise_gather_output"}

    def __init__(self, config: SASEncoderConfig):
        super().__init__(config)
        self.model = SASEncoderModel(config, add_pooling_layer=False)
        self.lm_head = SASEncoderLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> MaskedLMOutput:
        """
        Args (see [`SASEncoderModel.forward`] for the others):
            labels: `[B, T]`, token ids, or -100 where nothing is to be guessed.
        """
        outputs: BaseModelOutputWithPooling = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SASEncoderForSequenceClassification(SASEncoderPreTrainedModel):
    """The SAS encoder with a linear classifier of whole texts, or of pairs: logits `[B, num_labels]`."""

    def __init__(self, config: SASEncoderConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SASEncoderModel(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
        refuse_pooling_of_vllm(self)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> SequenceClassifierOutput:
        """
        Args (see [`SASEncoderModel.forward`] for the others):
            labels: `[B]` class indices or regression targets, or `[B, num_labels]`.
        """
        outputs: BaseModelOutputWithPooling = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(pooled_output(self.config, outputs, attention_mask)))
        loss = None
        if labels is not None:
            loss = classification_loss(self, logits, labels, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def classifier_dropout(config: SASEncoderConfig) -> nn.Module:
    rate = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if rate is None else rate)


def pooled_output(
    config: SASEncoderConfig, outputs: BaseModelOutputWithPooling, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """What a classifier of texts reads `[B, C]`: the pooler's, or where there is none, what it would have read."""
    if outputs.pooler_output is not None:
        return outputs.pooler_output
    return pool_tokens(config, outputs[0], attention_mask)


class SASEncoderForTokenClassification(SASEncoderPreTrainedModel):
    """The SAS encoder with a linear classifier of every token: logits `[B, T, num_labels]`."""

    def __init__(self, config: SASEncoderConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SASEncoderModel(config, add_pooling_layer=False)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> TokenClassifierOutput:
        """
        Args (see [`SASEncoderModel.forward`] for the others):
            labels: `[B, T]` class indices or -100.
        """
        outputs: BaseModelOutputWithPooling = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SASEncoderForQuestionAnswering(SASEncoderPreTrainedModel):
    """The SAS encoder with start and end scores for extractive question answering: two logits `[B, T]`."""

    def __init__(self, config: SASEncoderConfig):
        super().__init__(config)
        self.model = SASEncoderModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> QuestionAnsweringModelOutput:
        """
        Args (see [`SASEncoderModel.forward`] for the others):
            start_positions, end_positions: `[B]`, the answer's first and last token; both, for a loss.
        """
        outputs: BaseModelOutputWithPooling = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SASEncoderForMultipleChoice(SASEncoderPreTrainedModel):
    """The SAS encoder with a score for each choice, a text or pair of its own: logits `[B, choices]`."""

    def __init__(self, config: SASEncoderConfig):
        super().__init__(config)
        self.model = SASEncoderModel(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> MultipleChoiceModelOutput:
        """
        Args (see [`SASEncoderModel.forward`] for the others, which all have an axis more here):
            input_ids: `[B, choices, T]`; or give `inputs_embeds` `[B, choices, T, C]`.
            labels: `[B]`, the right choice.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or given.ndim < 3:
            raise ValueError("`input_ids` must be [batch, choices, tokens], or `inputs_embeds` those with features.")
        num_choices = given.shape[1]

        def flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.flatten(0, 1)

        attention_mask = flat(attention_mask)
        outputs: BaseModelOutputWithPooling = self.model(
            flat(input_ids),
            attention_mask=attention_mask,
            token_type_ids=flat(token_type_ids),
            position_ids=flat(position_ids),
            inputs_embeds=flat(inputs_embeds),
            return_dict=True,
            **kwargs,
        )
        scores = self.classifier(self.dropout(pooled_output(self.config, outputs, attention_mask)))
        logits = scores.view(-1, num_choices)
        loss = None
        if labels is not None:
            loss = choice_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


register(
    "bert",
    {
        AutoModel: SASEncoderModel,
        AutoModelForMaskedLM: SASEncoderForMaskedLM,
        AutoModelForSequenceClassification: SASEncoderForSequenceClassification,
        AutoModelForTokenClassification: SASEncoderForTokenClassification,
        AutoModelForQuestionAnswering: SASEncoderForQuestionAnswering,
        AutoModelForMultipleChoice: SASEncoderForMultipleChoice,
    },
)

__all__ = [
    "SASEncoderForMaskedLM",
    "SASEncoderForMultipleChoice",
    "SASEncoderForQuestionAnswering",
    "SASEncoderForSequenceClassification",
    "SASEncoderForTokenClassification",
    "SASEncoderModel",
    "SASEncoderPreTrainedModel",
]
