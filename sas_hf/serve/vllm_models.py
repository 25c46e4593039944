"""The SAS models as vLLM runs them, on its Transformers backend. vLLM imports this when it makes one."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.seqwise import pooler_for_classify
from vllm.model_executor.models.adapters import as_embedding_model, as_seq_cls_model
from vllm.model_executor.models.transformers import TransformersEmbeddingModel, TransformersForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from ..modeling.attention import SASAttention
from ..modeling.key_store import STATE_ATTENTION
from .vllm_states import StateAttention


if TYPE_CHECKING:
    Backend = Any  # what this is mixed into
else:
    Backend = object


def can_hold_states(config: PreTrainedConfig) -> bool:
    """Whether keys and values are made of something else, which can be cached in their place."""
    return config.is_causal and (config.simulates or not config.projects_to_cached_heads)


class SASLayers(Backend):
    """Gives each layer what attends for it. (vLLM itself would take the width of MLA's heads before simulation.)"""

    def _create_attention_instances(self, prefix: str = "") -> None:
        layers = {name: layer for name, layer in self.named_modules() if isinstance(layer, SASAttention)}
        if self.config.simulation_cache == "base" and can_hold_states(self.config):
            for name, layer in layers.items():
                rotary = self.model.rotary_emb if self.config.rotates(layer.layer_idx) else None
                layer.attn = StateAttention(layer, rotary, self.vllm_config, maybe_prefix(prefix, f"{name}.attn"))
            self.config._attn_implementation = STATE_ATTENTION
            return
        sizes = self.model_config.model_arch_config
        for name, layer in layers.items():
            layer.attn = (Attention if layer.is_causal else EncoderOnlyAttention)(
                num_heads=self.model_config.get_num_attention_heads(self.parallel_config, sizes),
                num_kv_heads=self.model_config.get_num_kv_heads(self.parallel_config, sizes),
                head_size=sizes.head_size,
                scale=layer.scaling,
                cache_config=self.cache_config,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, f"{name}.attn"),
            )
            refuse_width(self.config, layer.attn)


def refuse_width(config, attention: Attention) -> None:
    """Raise a `ValueError` for heads that vLLM's kernel on this device is not written for."""
    backend, width = attention.attn_backend, attention.head_size
    if not backend.supports_head_size(width):
        field = "simulated_head_dim" if config.simulated_head_dim else "head_dim"
        widths = ", ".join(map(str, backend.get_supported_head_sizes()))
        raise ValueError(
            f"vLLM's attention kernel here ({backend.get_name()}) has no heads of {width} features (`{field}`), but "
            f"of {widths}." + " `simulation_cache='base'` does without it." * can_hold_states(config)
        )


class SASGPTForCausalLM(SASLayers, TransformersForCausalLM):
    """The SAS GPT."""


# As vLLM would make them of it; named, so that it does not take its own for a class that it finds in Transformers.
SASGPTEmbeddings = as_embedding_model(SASGPTForCausalLM)
SASGPTClassifier = as_seq_cls_model(SASGPTForCausalLM)


class SASEncoderLayers(SASLayers):
    """Tells the model the types of all tokens at every step, in one place of memory. vLLM itself gives them only where
    a text is one of a pair, and code compiled without them would leave them out and say nothing."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        size = vllm_config.scheduler_config.max_num_batched_tokens
        types = torch.zeros(1, size, dtype=torch.long, device=self.device_config.device)
        self.register_buffer("token_types", types, persistent=False)

    def _decorate_cls_for_torch_compile(self, cls, dynamic_arg_dims, **kwargs) -> None:
        super()._decorate_cls_for_torch_compile(cls, dynamic_arg_dims | {"token_type_ids": 1}, **kwargs)

    def forward(self, input_ids, positions, token_type_ids: torch.Tensor | None = None, **kwargs):
        """`token_type_ids` `[T]`, of which the engine may pad the other arguments beyond T."""
        types = self.token_types[:, : len(positions)].zero_()
        if token_type_ids is not None:
            if token_type_ids.max() >= max(self.config.type_vocab_size, 1):
                raise ValueError(
                    f"`token_type_ids` tell texts apart, but `type_vocab_size` is {self.config.type_vocab_size}."
                )
            types[0, : len(token_type_ids)] = token_type_ids
        return super().forward(input_ids, positions, token_type_ids=types, **kwargs)


class SASEncoderEmbeddings(SASEncoderLayers, TransformersEmbeddingModel):
    """The SAS encoder, whose hidden states vLLM pools: without its own pooler, and without a head for masked words."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.model.pooler = None
        self.ignore_unexpected_prefixes += ["model.pooler.", "lm_head."]


class SASEncoderClassifier(SASEncoderLayers, TransformersEmbeddingModel):
    """The SAS encoder with its classifier of texts, which reads what the encoder's pooler makes of the pooled."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        options = {"dtype": self.model_config.head_dtype, "device": self.device_config.device}
        self.classifier = nn.Linear(self.config.hidden_size, self.config.num_labels, **options)
        classify = pooler_for_classify(self.model_config.pooler_config, classifier=self.classify)
        self.pooler = DispatchPooler({"classify": classify})

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        """`[B, C]` to `[B, num_labels]`; the pooler is of the model's type, the classifier may be of another."""
        pooler = self.model.pooler
        if pooler is not None:
            pooled = pooler(pooled.to(next(pooler.parameters()).dtype)).to(pooled.dtype)
        return self.classifier(pooled)
