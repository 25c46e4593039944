"""The SAS GPT: a decoder-only Transformer with simulated attention, its base model and its heads."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import (
    ContinuousBatchingConfig,
    ContinuousBatchingManager,
    GenerationConfig,
    GenerationMixin,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
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
from .cache_name import CACHE_NAME, both_cache_names, either_cache_name, takes_both_cache_names
from .configuration_attention import require_choice
from .configuration_sas_gpt import SASGPTConfig
from .kinds import initialize_attention, make_attention
from .layers import SASMLP, make_norm
from .losses import classification_loss
from .older_transformers import slice_logits_to_keep
from .positions import SASRotaryEmbedding
from .quantisation import QuantisableMixin
from .registration import register
from .sequence import check_positions, layer_inputs
from .sharing import CodeTravelsMixin, came_with_its_checkpoint


class SASGPTDecoderLayer(GradientCheckpointingLayer):
    """Residual block: attention and the feed-forward block. Hidden states in and out: `[B, T, C]`.

    Pre-norm, one after the other or both on the same input (`use_parallel_residual`); or post-norm, with OLMo 2's
    names, where `post_attention_layernorm` norms what attention wrote.
    """

    def __init__(self, config: SASGPTConfig, layer_idx: int):
        super().__init__()
        self.self_attn = make_attention(config, layer_idx)
        self.mlp = SASMLP(config)
        self.post_norm, self.parallel = config.norm_position == "post", config.use_parallel_residual
        self.rotates = config.rotates(layer_idx)  # kept here, so that a copy of the layer does, wherever it stands
        if not self.post_norm:
            self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        if self.post_norm:
            self.post_feedforward_layernorm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not self.rotates:
            kwargs |= {"position_embeddings": None, "key_position_embeddings": None}
        if self.post_norm:
            attention_output, _ = self.self_attn(hidden_states, **kwargs)
            hidden_states = hidden_states + self.dropout(self.post_attention_layernorm(attention_output))
            return hidden_states + self.dropout(self.post_feedforward_layernorm(self.mlp(hidden_states)))
        attention_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        attended = hidden_states + self.dropout(attention_output)
        mlp_input = hidden_states if self.parallel else attended
        return attended + self.dropout(self.mlp(self.post_attention_layernorm(mlp_input)))


class SASGPTPreTrainedModel(CodeTravelsMixin, QuantisableMixin, PreTrainedModel):
    """Loading, saving and initialisation shared by the SAS GPT and its heads."""

    config: SASGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SASGPTDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SASGPTDecoderLayer, "attentions": SASAttention}

    def __init__(self, config: SASGPTConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # Transformers' generic heads make their body by AutoModel, which no `import sas_hf` has told of it here.
        if came_with_its_checkpoint(type(self)):
            AutoModel.register(type(config), SASGPTModel, exist_ok=True)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_attention(module, self.config)


def without_cache_in_training(forward: Callable) -> Callable:
    """A step of training that asks for no cache gets none: expanded keys and values would be most of what it holds."""

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        if self.training and torch.is_grad_enabled() and kwargs.get("use_cache") is None and len(args) < 6:
            kwargs["use_cache"] = False
        return forward(self, *args, **kwargs)

    return wrapped


def _is_here(layer: nn.Module) -> TypeGuard[SASGPTDecoderLayer]:
    """Whether it is a layer, compiled or wrapped perhaps, and no stand-in for one of another pipeline stage."""
    return hasattr(layer, "self_attn")


class SASGPTModel(SASGPTPreTrainedModel):
    """The decoder without a head: token ids `[B, T]` in, hidden states `[B, T, C]` out."""

    def __init__(self, config: SASGPTConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        learned = config.position_embedding_type == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.rotary_emb = None if learned else SASRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([SASGPTDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @either_cache_name
    @without_cache_in_training
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `[B, T]`; or give `inputs_embeds` `[B, T, C]`.
            attention_mask: `[B, S]`, 0 for padding, S counting cached tokens too; or a prepared 4-D mask.
            position_ids: `[B, T]`. Without mask and cache, a position that does not follow its neighbour starts a
                new packed document, which sees only itself.
            cache: keys and values to read and extend.
            use_cache: return a cache; `None` is the configuration's choice, and no in a step of training.

        Raises:
            ValueError: when not exactly one of `input_ids` and `inputs_embeds` is given; for positions beyond
                `max_position_embeddings` with learned positions or token mixing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        length = inputs_embeds.shape[1]

        require_choice(self.config, "simulation_cache", "expanded", "base")  # meant to be changed on a live model
        # Under pipeline parallelism a stage holds some of the layers, the first one also the embeddings.
        attention = self._any_attention()
        absolute = self.embed_positions is not None or attention.mixes_tokens
        # Packed documents show in positions that were given alone; without, compiled code needs no mask either.
        given_position_ids, most = position_ids, None
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            most = past + length - 1 if isinstance(past, int) else None
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)
            if absolute and attention_mask is not None and attention_mask.ndim == 2:
                # Count real tokens only, so that padding on the left does not move them.
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if absolute:
            check_positions(self.config, position_ids, most)

        cache, for_layers = layer_inputs(
            self.config,
            attention,
            self.rotary_emb,
            inputs_embeds,
            attention_mask,
            position_ids,
            given_position_ids,
            cache,
            (lambda: DynamicCache(config=self.config)) if use_cache and self.config.is_causal else None,
            **kwargs,
        )
        if self.embed_positions is not None and _is_here(self.layers[0]):
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)

        hidden_states = self.dropout(inputs_embeds)
        for index, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(
                hidden_states,
                layer_idx=None if cache is None else index,  # a layer that was copied still bears another's
                use_cache=use_cache,
                **for_layers,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        # Not one that was only to be read: `generate` would hand it in again beside the tokens it holds.
        returned: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **returned)

    def _any_attention(self) -> SASAttention:
        for layer in self.layers:
            if _is_here(layer):
                return layer.self_attn
        raise ValueError(
            f"This pipeline stage holds none of the `num_hidden_layers` ({self.config.num_hidden_layers}) layers; use "
            "at most as many stages as layers."
        )


class SASGPTForCausalLM(SASGPTPreTrainedModel, GenerationMixin):
    """The SAS GPT with a language-modelling head: logits `[B, T, vocab_size]`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # in the form of Llama's
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: SASGPTConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # else by the class's name, also of one made of this
        self.model = SASGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def _get_name(self) -> str:
        # By this name the Trainer knows that the labels of a smoothed loss are to be shifted: for a class made of
        # this one, too, as users and FSDP2 make them.
        return SASGPTForCausalLM.__name__

    @takes_both_cache_names
    @either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[ForwardKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args (see [`SASGPTModel.forward`] for the others):
            labels: `[B, T]`, token ids or -100; shifted inside.
            logits_to_keep: how many of the last positions get logits (0: all), or their indices.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs[0], logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads its parameters
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        # Where another stands in its place, as peft's does, this is asked by it.
        return both_cache_names(inputs) if "prepare_inputs_for_generation" in vars(self) else inputs

    if not TYPE_CHECKING:  # for editors it has the signature of Transformers' own

        def generate(self, *args, **kwargs):
            if not self.config.is_causal:
                raise ValueError("`generate` needs a causal model, but `is_causal` is False in this configuration.")
            return super().generate(*args, **kwargs)

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *args,
        **kwargs,
    ) -> ContinuousBatchingManager:
        """As in Transformers. Its pool holds `num_key_value_heads` x `head_dim` keys and values per token: what
        fits is the cache of "mha" (and "mqa", "gqa") and "optimised", under simulation in its "base" form and without
        block tables; the rest is refused with a `ValueError`."""
        if not self.config.projects_to_cached_heads:
            raise ValueError(
                "Continuous batching caches `num_key_value_heads` x `head_dim` keys and values per token, not "
                f"what `attention_type` {self.config.attention_type!r} caches; use `generate`."
            )
        if self.config.simulates:
            if self.config.simulation_cache != "base":
                raise ValueError(
                    "Continuous batching caches `num_key_value_heads` x `head_dim` numbers per token, which cannot "
                    "hold simulated heads. Set `model.config.simulation_cache = 'base'` first."
                )
            continuous_batching_config = continuous_batching_config or ContinuousBatchingConfig()
            if continuous_batching_config.max_blocks_per_request:
                raise ValueError(
                    f"`max_blocks_per_request` is {continuous_batching_config.max_blocks_per_request}, but simulated "
                    "keys cannot be read from a block table; set it to 0."
                )
            continuous_batching_config.max_blocks_per_request = 0
        return super().init_continuous_batching(generation_config, continuous_batching_config, *args, **kwargs)


class SASGPTForSequenceClassification(GenericForSequenceClassification, SASGPTPreTrainedModel):
    """The SAS GPT with a linear classifier on the last token or the mean of each row: logits `[B, num_labels]`."""

    def __init__(self, config: SASGPTConfig):
        super().__init__(config)
        refuse_pooling_of_vllm(self)

    @either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """
        Args (see [`SASGPTModel.forward`] for the others):
            labels: `[B]` class indices or regression targets, or `[B, num_labels]`.

        Raises:
            ValueError: for more than one row when neither `attention_mask` nor `pad_token_id` tells where rows end.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self._pool(outputs.last_hidden_state, input_ids, attention_mask))

        loss = None
        if labels is not None:
            loss = classification_loss(self, logits, labels, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pool(self, hidden_states, input_ids, attention_mask) -> torch.Tensor:
        """`[B, T, C]` to `[B, C]`: the mean of the tokens that are not padding, or the last of them."""
        batch_size, length = hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -length:]
        elif self.config.pad_token_id is not None and input_ids is not None:
            real = input_ids != self.config.pad_token_id
        elif batch_size == 1 or self.config.pad_token_id is not None:
            real = hidden_states.new_ones(batch_size, length)
        else:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined and no mask is given.")
        real = (real != 0).to(hidden_states.device)
        if self.config.classifier_pooling == "mean":
            weights = real.to(hidden_states.dtype).unsqueeze(-1)
            return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        last = (torch.arange(length, device=hidden_states.device) * real).argmax(dim=-1)
        return hidden_states[torch.arange(batch_size, device=hidden_states.device), last]


class SASGPTForTokenClassification(GenericForTokenClassification, SASGPTPreTrainedModel):
    """The SAS GPT with a linear classifier on every token: logits `[B, T, num_labels]`."""

    @either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> TokenClassifierOutput:
        """
        Args (see [`SASGPTModel.forward`] for the others):
            labels: `[B, T]` class indices or -100.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SASGPTForQuestionAnswering(GenericForQuestionAnswering, SASGPTPreTrainedModel):
    """The SAS GPT with start and end scores for extractive question answering: two logits `[B, T]`."""


register(
    "llama",
    {
        AutoModel: SASGPTModel,
        AutoModelForCausalLM: SASGPTForCausalLM,
        AutoModelForSequenceClassification: SASGPTForSequenceClassification,
        AutoModelForTokenClassification: SASGPTForTokenClassification,
        AutoModelForQuestionAnswering: SASGPTForQuestionAnswering,
    },
)

__all__ = [
    "SASGPTForCausalLM",
    "SASGPTForQuestionAnswering",
    "SASGPTForSequenceClassification",
    "SASGPTForTokenClassification",
    "SASGPTModel",
    "SASGPTPreTrainedModel",
]
