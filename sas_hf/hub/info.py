"""What a configuration costs: parameters, cached numbers and floating-point operations, without allocating memory."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ADAPTER_CONFIG_NAME

from .. import modeling
from ..configurations import NAMED_CONFIGS, named_config
from ..modeling import SASEncoderConfig, SASEncoderForMultipleChoice, SASGPTConfig, SASSeq2SeqConfig, SASViTConfig
from ..modeling.attention import SASAttention
from ..modeling.key_store import CachePlace, key_store
from ..modeling.kinds import make_attention
from ..modeling.modeling_sas_gpt import SASGPTDecoderLayer
from .checkpoints import load_config, optional_file, read_adapter, read_object, read_settings, required_file
from .merge import saved_class
from .places import nearest_folder


SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"  # of peft
LONGEST = 10**8  # tokens; torch cannot measure a mask of many more
Config = SASEncoderConfig | SASGPTConfig | SASSeq2SeqConfig | SASViTConfig
# Whose parameters are counted, by `model_type`.
COUNTED = {
    SASGPTConfig.model_type: AutoModelForCausalLM,
    SASEncoderConfig.model_type: AutoModelForSequenceClassification,
    SASSeq2SeqConfig.model_type: AutoModelForSeq2SeqLM,
    SASViTConfig.model_type: AutoModelForImageClassification,
}
# Constant of equation 24 of "You Need to Pay Better Attention", by attention type.
EQUATION_24 = {"mha": 15, "optimised": 12, "efficient": 9, "super": 12}


@dataclass(frozen=True)
class ModelInfo:
    """
    Attributes:
        parameters: of the model that the checkpoint holds; of a configuration alone, of the language model (tied
            weights counted once), or the classifier of texts or images.
        attention_parameters, simulation_parameters: of all layers; the second are part of the first.
        simulation_overhead: simulation's share of all other parameters.
        cache_numbers: cached per token and layer; of an encoder–decoder, per token of the source and of the target.
        cache_bytes: cached per token, all layers, in the dtype asked for.
        context: tokens that the following refer to, of source and target alike; those of an image of `image_size` for
            a ViT.
        forward_flops: per token, multiplications and additions, attention over the whole context counted.
        equation_24: work of one attention layer's forward and backward pass over the context by the second paper's
            equation; `None` for kinds that it does not cover.
    """

    parameters: int
    attention_parameters: int
    simulation_parameters: int
    simulation_overhead: float
    cache_numbers: int
    cache_bytes: int
    context: int
    forward_flops: int
    equation_24: int | None


def find_config(name: str) -> Config:
    """The configuration of that name, or of the checkpoint in that folder or at that Hub id.

    Raises:
        ValueError: for an unknown name, or a checkpoint of another architecture.
        FileNotFoundError: for a folder or Hub id that has no configuration.
    """
    if not is_place(name):
        try:
            return named_config(name)
        except ValueError as error:
            raise ValueError(
                f"{error} There is no folder of that name here either{nearest_folder(Path(name))}."
            ) from error
    model_type = read_settings(name).get("model_type")
    if model_type not in COUNTED:
        raise ValueError(f"{name} has `model_type` {model_type!r}; only SAS models are described.")
    return cast(Config, load_config(name))


def describe_adapter(place: str) -> dict[str, str] | None:
    """What the peft adapter in that folder or at that Hub id is, in words by figure; `None` for a whole model.

    Raises:
        FileNotFoundError, ValueError: as [`~sas_hf.hub.checkpoints.read_adapter`]; if its weights are damaged.
    """
    if not is_place(place) or (named := read_adapter(place)) is None:
        return None
    trained = read_object(required_file(place, ADAPTER_CONFIG_NAME))
    figures = {"adapter": str(trained.get("peft_type")), "base": named[0]}
    if trained.get("r"):
        figures["rank"] = str(trained["r"])
    if (file := optional_file(place, SAFETENSORS_WEIGHTS_NAME)) is not None:
        try:
            with safe_open(file, framework="pt") as tensors:
                sizes = [math.prod(tensors.get_slice(name).get_shape()) for name in list(tensors.keys())]
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); download or save it again.") from error
        figures["parameters of the adapter"] = f"{sum(sizes):,}"
    return figures


def describe_foreign(place: str) -> dict[str, str]:
    """What a checkpoint of any architecture of Transformers is, in words by figure; no weights are read.

    Raises:
        ValueError: if Transformers does not know it. Other errors are of configurations that it cannot build.
    """
    model_class, config = saved_class(place), load_config(place)
    with torch.device("meta"):
        model = AutoModel.from_config(config) if model_class is AutoModel else model_class._from_config(config)
    return {"model": type(model).__name__, "parameters": f"{model.num_parameters():,}"}


def is_described(name: str) -> bool:
    """Whether [`find_config`] gives it a configuration, or tells what is wrong with the name; it does not of a
    checkpoint of another architecture."""
    return not is_place(name) or read_settings(name).get("model_type") in COUNTED


def is_place(name: str) -> bool:
    """Whether it names a folder or a repository of the Hub, no configuration of ours."""
    return name not in NAMED_CONFIGS and (Path(name).exists() or "/" in name)


def describe(
    config: Config,
    context: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelInfo:
    """Count what a model of this configuration costs, on the meta device.

    Args:
        context: tokens; `max_position_embeddings` by default, and the most there can be where positions are learned;
            for a ViT the only possible value.
        dtype: of the cache.

    Raises:
        ValueError: for a context that the model cannot have.
    """
    images = isinstance(config, SASViTConfig)
    if images and context not in (None, config.max_position_embeddings):
        raise ValueError(
            f"`context` is {context}, but an image has {config.max_position_embeddings} tokens; leave it out."
        )
    longest = LONGEST if getattr(config, "position_embedding_type", "") == "rope" else config.max_position_embeddings
    context = config.max_position_embeddings if context is None else context
    if not 1 <= context <= longest:
        raise ValueError(f"`context` is {context}; it must be a number of tokens from 1 to {longest:,}.")
    with torch.device("meta"):
        made = getattr(modeling, (config.architectures or [""])[0], None)
        model = COUNTED[config.model_type].from_config(config) if made is None else made(config)
    named = list(model.named_parameters())
    total = sum(parameter.numel() for _, parameter in named)
    layers = [module for module in model.modules() if isinstance(module, SASAttention)]
    attention = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    simulation = sum(parameter.numel() for name, parameter in named if "_simulation." in name)
    cached = cache_numbers_per_token(config)
    return ModelInfo(
        parameters=total,
        attention_parameters=attention,
        simulation_parameters=simulation,
        simulation_overhead=simulation / (total - simulation),
        cache_numbers=cached,
        cache_bytes=cached * getattr(config, "decoder_layers", config.num_hidden_layers) * dtype.itemsize,
        context=context,
        forward_flops=_forward_flops(model, config, context) // context,
        equation_24=equation_24(config, context),
    )


def cache_numbers_per_token(config: Config) -> int:
    """Numbers that one layer caches per token: the tensors that its attention layer would hand to the cache.

    A bidirectional model caches nothing. A layer of a decoder with an encoder does so of both.
    """
    if isinstance(config, SASSeq2SeqConfig):
        return sum(_state_numbers(config.place(name)) for name in ("decoder", "cross"))
    return _state_numbers(config) if config.is_causal else 0


def _state_numbers(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        layer = make_attention(config, layer_idx=0)
        token, position = torch.empty(1, 1, config.hidden_size), torch.zeros(1, 1, dtype=torch.long)
        token_mixing = (position, position, torch.ones(1, 1, 1, 1, dtype=torch.bool))
        nowhere = CachePlace(layer, None, None, {})
        pair = key_store(config).to_cache(layer, token, nowhere, None, token_mixing)
    return sum(tensor.numel() for tensor in pair)


def equation_24(config: Config, context: int) -> int | None:
    """C_attn·ℓ·C + 15·h·ℓ², for the four kinds that the second paper compares; not for attention in several places."""
    if isinstance(config, SASSeq2SeqConfig):
        return None
    standard = config.num_key_value_heads == config.num_attention_heads and not config.simulates
    if config.attention_type not in EQUATION_24 or not standard:
        return None
    return by_equation_24(config.attention_type, context, config.hidden_size, config.num_attention_heads)


def by_equation_24(attention_type: str, length: int, width: int, heads: int) -> int:
    """The equation itself, for ℓ tokens of C features."""
    return EQUATION_24[attention_type] * length * width + 15 * heads * length**2


def _forward_flops(model: PreTrainedModel, config: Config, context: int) -> int:
    """Of one image, of one text, or of one source and a target as long."""
    if isinstance(config, SASViTConfig):
        return _whole_flops(model, torch.empty(1, config.num_channels, *config.image_shape, device="meta"))
    if isinstance(config, SASEncoderConfig | SASSeq2SeqConfig):
        tokens = torch.empty(1, context, dtype=torch.long, device="meta")
        return _whole_flops(model, tokens[None] if isinstance(model, SASEncoderForMultipleChoice) else tokens)
    with torch.device("meta"):  # a layer alone, for contexts whose mask would be too large to name
        layer = SASGPTDecoderLayer(config, layer_idx=0)
        layer.self_attn.config._attn_implementation = "sdpa"
        hidden_states = torch.empty(1, context, config.hidden_size)
        rotary = tuple(torch.empty(1, context, config.rotary_dim) for _ in range(2)) if config.rotary_dim else None
        positions = torch.empty(1, context, dtype=torch.long)
        mixing = (positions, positions, torch.empty(1, 1, context, context, dtype=torch.bool))
        with FlopCounterMode(display=False) as counter:
            layer(hidden_states, position_embeddings=rotary, token_mixing=mixing)
    return config.num_hidden_layers * counter.get_total_flops() + 2 * context * config.hidden_size * config.vocab_size


def _whole_flops(model: PreTrainedModel, inputs: torch.Tensor) -> int:
    model.config._attn_implementation = "sdpa"
    with FlopCounterMode(display=False) as counter:
        model(inputs, **({"use_cache": False} if model.config.is_encoder_decoder else {}))
    return counter.get_total_flops()
