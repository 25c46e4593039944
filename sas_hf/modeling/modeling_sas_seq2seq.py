"""The SAS encoder–decoder: one text in, another out, with any attention of this package in each of its places."""

import functools
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .annotations import ForwardKwargs
from .attention import SASAttention
from .cache_name import CACHE_NAME, both_cache_names, either_cache_name, takes_both_cache_names
from .configuration_attention import require_choice
from .configuration_sas_seq2seq import SASSeq2SeqConfig
from .embeddings import SASTextEmbeddings
from .encoder_stack import SASEncoderStack
from .kinds import as_boolean, initialize_attention, with_boolean_masks
from .layers import SASDecoderLayer, SASEncoderLayer, final_norm
from .older_transformers import slice_logits_to_keep
from .parallel_plans import seq2seq_parallel_plans
from .positions import SASRotaryEmbedding
from .quantisation import QuantisableMixin
from .registration import register
from .sequence import check_positions, layer_inputs, row_positions
from .sharing import CodeTravelsMixin


class SASSeq2SeqPreTrainedModel(CodeTravelsMixin, QuantisableMixin, PreTrainedModel):
    """Loading, saving, initialisation and tied embeddings shared by the SAS encoder–decoder and its head."""

    config: SASSeq2SeqConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SASTextEmbeddings", "SASEncoderLayer", "SASDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_attention(module, self.config)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in Transformers; where encoder and decoder have vocabularies apart, the encoder's alone."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.config.share_encoder_decoder_embeddings:
            self.config.decoder_vocab_size = self.config.vocab_size
        return embeddings

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor([[3, 4, 5, 6], [4, 5, 6, 3]], device=self.device)
        return {"input_ids": input_ids, "decoder_input_ids": input_ids}


class SASSeq2SeqEncoder(SASSeq2SeqPreTrainedModel, SASEncoderStack):
    """The encoder: source `[B, S]` in, hidden states `[B, S, C]` out."""

    _can_record_outputs = {"hidden_states": SASEncoderLayer, "attentions": SASAttention}

    def __init__(self, config: SASSeq2SeqConfig):
        super().__init__(config)
        self.build_stack(config.place("encoder"), config.encoder_layers)
        self.post_init()
        self._tp_plan = seq2seq_parallel_plans(config)["encoder"]  # not the whole's, which the configuration has

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: `[B, S]`; or give `inputs_embeds` `[B, S, C]`.
            attention_mask: `[B, S]`, 0 for padding; or a prepared 4-D mask.
        """
        return BaseModelOutput(
            last_hidden_state=self.run_stack(input_ids, attention_mask, inputs_embeds, **kwargs),
        )


class SASSeq2SeqDecoder(SASSeq2SeqPreTrainedModel):
    """The decoder: target `[B, T]` and the encoder's output `[B, S, C]` in, hidden states `[B, T, C]` out."""

    _can_record_outputs = {
        "hidden_states": SASDecoderLayer,
        "attentions": OutputRecorder(SASAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(SASAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: SASSeq2SeqConfig):
        super().__init__(config)
        place, cross = config.place("decoder"), config.place("cross")
        self.embeddings = SASTextEmbeddings(place, place.decoder_vocab_size)
        self.rotary_emb = SASRotaryEmbedding(place) if config.position_embedding_type == "rope" else None
        self.layers = nn.ModuleList([SASDecoderLayer(place, cross, index) for index in range(place.decoder_layers)])
        self.norm = final_norm(config)
        self.gradient_checkpointing = False
        self.post_init()
        self._tp_plan = seq2seq_parallel_plans(config)["decoder"]  # not the whole's, which the configuration has

    @either_cache_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            input_ids: `[B, T]`; or give `inputs_embeds` `[B, T, C]`.
            attention_mask: `[B, past + T]`, 0 for padding; or a prepared 4-D mask.
            encoder_hidden_states: `[B, S, C]`.
            encoder_attention_mask: `[B, S]`, 0 for padding of the source.
            position_ids: `[B, T]`.
            cache: to read and extend.

        Raises:
            ValueError: without `encoder_hidden_states`; otherwise as [`SASGPTModel.forward`].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `decoder_input_ids` or `decoder_inputs_embeds`.")
        if encoder_hidden_states is None:
            raise ValueError("`encoder_hidden_states` are missing: the decoder attends to the encoder's output.")
        require_choice(self.config, "simulation_cache", "expanded", "base")  # meant to be changed on a live model
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.embed_tokens(input_ids)
        first: SASDecoderLayer = self.layers[0]  # type: ignore[assignment]  # a list without a type
        attention, source_attention = first.self_attn, first.encoder_attn
        given_position_ids, most = position_ids, None
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            most = past + inputs_embeds.shape[1] - 1 if isinstance(past, int) else None
            mask = None if attention_mask is None or attention_mask.ndim != 2 else attention_mask
            position_ids = row_positions(self.config, inputs_embeds, mask, past)
        if self.embeddings.embed_positions is not None or attention.mixes_tokens:
            check_positions(self.config, position_ids, most)

        cache, for_layers = layer_inputs(
            attention.config,
            attention,
            self.rotary_emb,
            inputs_embeds,
            attention_mask,
            position_ids,
            given_position_ids,
            cache,
            (lambda: EncoderDecoderCache(DynamicCache(), DynamicCache())) if use_cache else None,
        )
        source = (inputs_embeds, encoder_attention_mask, encoder_hidden_states)
        source_mask, source_mixing = create_bidirectional_mask(source_attention.config, *source), None
        if source_attention.mixes_tokens:
            positions = row_positions(self.config, encoder_hidden_states, encoder_attention_mask)
            check_positions(self.config, positions, positions.shape[1] - 1)
            whole = create_bidirectional_mask(
                with_boolean_masks(source_attention.config),
                encoder_hidden_states,
                encoder_attention_mask,
                allow_is_bidirectional_skip=False,
            )
            source_mixing = (positions, positions, as_boolean(whole))

        hidden_states = self.embeddings(inputs_embeds, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                encoder_attention_mask=source_mask,
                encoder_token_mixing=source_mixing,
                use_cache=use_cache,
                **for_layers,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        # Not one that was only to be read: `generate` would hand it in again beside the tokens it holds.
        returned: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states if self.norm is None else self.norm(hidden_states), **returned
        )


class SASSeq2SeqModel(SASSeq2SeqPreTrainedModel):
    """Encoder and decoder without a head: source `[B, S]` and target `[B, T]` in, hidden states `[B, T, C]` out."""

    _tied_weights_keys = {"decoder.embeddings.embed_tokens.weight": "encoder.embeddings.embed_tokens.weight"}

    def __init__(self, config: SASSeq2SeqConfig):
        super().__init__(config)
        self.encoder = SASSeq2SeqEncoder(config)
        self.decoder = SASSeq2SeqDecoder(config)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As in Transformers, whatever `tie_word_embeddings`, which is about the head."""
        return dict(self._tied_weights_keys) if self.config.share_encoder_decoder_embeddings else {}

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embeddings.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embeddings.embed_tokens = value
        if self.config.share_encoder_decoder_embeddings:
            self.decoder.embeddings.embed_tokens = value

    @either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> Seq2SeqModelOutput:
        """
        Args:
            input_ids, attention_mask: the source `[B, S]`, and 0 where it is padded.
            decoder_input_ids: the target `[B, T]`; the source, moved to the right, when it is missing (as in BART).
            decoder_attention_mask: `[B, past + T]`, 0 for padding.
            encoder_outputs: of a source that was encoded before.
            cache: keys and values to read and extend.
            inputs_embeds, decoder_inputs_embeds: `[B, S, C]` and `[B, T, C]`, instead of token ids.
            decoder_position_ids: `[B, T]`; from `decoder_attention_mask` when `None`.

        Raises:
            ValueError: when a side is missing, or given twice; for positions beyond `max_position_embeddings` with
                learned or sinusoidal positions or token mixing.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Without `decoder_input_ids` or `decoder_inputs_embeds`, `input_ids` cannot be None.")
            decoder_input_ids = shift_tokens_right(input_ids, self.config)
        encoded: BaseModelOutput
        if encoder_outputs is None:
            encoded = self.encoder(
                input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
            )
        elif isinstance(encoder_outputs, BaseModelOutput):
            encoded = encoder_outputs
        else:
            encoded = BaseModelOutput(*encoder_outputs)
        outputs: BaseModelOutputWithPastAndCrossAttentions = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoded[0],
            encoder_attention_mask=attention_mask,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )


def shift_tokens_right(input_ids: torch.Tensor, config: SASSeq2SeqConfig) -> torch.Tensor:
    """
    What the decoder reads where it shall write `input_ids` `[B, T]`: these, moved to the right by one, behind the
    start. What a loss ignores (-100) becomes padding.

    Raises:
        ValueError: if the configuration lacks `pad_token_id`, or `decoder_start_token_id` where that is the start.
    """
    for name in ("pad_token_id", "decoder_start_token_id"):
        if getattr(config, name) is None and not (name[0] == "d" and config.decoder_starts_with_last_label):
            raise ValueError(
                f"`{name}` of the configuration is None, but the decoder's inputs are made of labels with it; set it, "
                "or give `decoder_input_ids`."
            )
    padding, beginning = cast(int, config.pad_token_id), cast(int, config.decoder_start_token_id)
    tokens = input_ids.masked_fill(input_ids == -100, padding)
    if config.decoder_starts_with_last_label:
        last = tokens.ne(padding).sum(-1, keepdim=True) - 1
        start = tokens.gather(1, last.clamp(min=0))
    else:
        start = tokens.new_full((tokens.shape[0], 1), beginning)
    return torch.cat((start, tokens[:, :-1]), dim=1)


class SASSeq2SeqForConditionalGeneration(SASSeq2SeqPreTrainedModel, GenerationMixin):
    """The SAS encoder–decoder with a language-modelling head: logits `[B, T, decoder_vocab_size]`."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embeddings.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: SASSeq2SeqConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # by the class's name, labels would be shifted, which the decoder's inputs are
        self.model = SASSeq2SeqModel(config)
        self.lm_head = nn.Linear(
            config.hidden_size, config.decoder_vocab_size or config.vocab_size, bias=config.lm_head_bias
        )
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As in Transformers; whether encoder and decoder share their embeddings is not for `tie_word_embeddings` to
        say."""
        tied = {f"model.{key}": f"model.{value}" for key, value in self.model.get_expanded_tied_weights_keys().items()}
        if self.config.tie_word_embeddings:
            embeddings = "model.decoder.embeddings.embed_tokens.weight"
            tied["lm_head.weight"] = tied.get(embeddings, embeddings)
        return tied

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in Transformers, the head with them where it has the same vocabulary."""
        if not self.config.share_encoder_decoder_embeddings:
            return self.model.resize_token_embeddings(*args, **kwargs)
        return super().resize_token_embeddings(*args, **kwargs)

    def resize_decoder_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As Marian's: the decoder's embeddings and the head, where the encoder has others.

        Raises:
            ValueError: if encoder and decoder share their embeddings.
        """
        if self.config.share_encoder_decoder_embeddings:
            raise ValueError(
                "`resize_decoder_token_embeddings` is for vocabularies apart, but `share_encoder_decoder_embeddings` "
                "is True; use `resize_token_embeddings`."
            )
        decoder = self.model.decoder.embeddings
        decoder.embed_tokens = self._get_resized_embeddings(
            decoder.embed_tokens, new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        size = decoder.embed_tokens.weight.shape[0]
        self.lm_head = self._get_resized_lm_head(self.lm_head, size, mean_resizing=mean_resizing)
        self.config.decoder_vocab_size = size
        self.tie_weights()
        return decoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """What the decoder reads for labels `[B, T]`; collators call it."""
        return shift_tokens_right(labels, self.config)

    @takes_both_cache_names
    @either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[ForwardKwargs],
    ) -> Seq2SeqLMOutput:
        """
        Args (see [`SASSeq2SeqModel.forward`] for the others):
            labels: `[B, T]`, token ids or -100; the decoder's inputs are made of them where none are given. No cache
                is kept beside them.
            logits_to_keep: how many of the last positions get logits (0: all), or their indices.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = shift_tokens_right(labels, self.config)
        outputs: Seq2SeqModelOutput = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs[0], logits_to_keep))
        loss = None
        if labels is not None:
            size = self.config.decoder_vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads its parameters
    def prepare_inputs_for_generation(self, input_ids, *args, decoder_attention_mask=None, **kwargs):
        if decoder_attention_mask is not None and decoder_attention_mask.ndim == 2:
            # For a static cache, the mask is made 4-D, which does not tell where a row begins.
            positions = row_positions(self.config, decoder_attention_mask[..., None], decoder_attention_mask)
            kwargs["decoder_position_ids"] = positions.expand(input_ids.shape[0], -1)
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, decoder_attention_mask=decoder_attention_mask, **kwargs
        )
        # Where another stands in its place, as peft's does, this is asked by it.
        return both_cache_names(inputs) if "prepare_inputs_for_generation" in vars(self) else inputs


register("bart", {AutoModel: SASSeq2SeqModel, AutoModelForSeq2SeqLM: SASSeq2SeqForConditionalGeneration})

__all__ = ["SASSeq2SeqForConditionalGeneration", "SASSeq2SeqModel", "SASSeq2SeqPreTrainedModel"]
