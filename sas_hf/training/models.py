"""The model and tokenizer of a recipe: looked over by configuration first, built when nothing is left to refuse."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..checkpoints import load_tokenizer as load_checkpoint_tokenizer
from ..checkpoints import read_settings
from ..configurations import named_config
from ..conversion import ConversionOptions, convert_model
from ..conversion.convert import find_family, sas_config
from ..text import python_reference, train_tokenizer
from .data import BUILT_IN
from .fields import build, check_names
from .recipe import ModelRecipe, TrainingRecipe


def load_config(recipe: ModelRecipe) -> PreTrainedConfig:
    """
    The configuration of a causal language model; of a checkpoint that is to be converted, before it is.

    Raises:
        ValueError: for an unknown name, an override that is no field of it, another kind of model, or a checkpoint
            that cannot be converted.
        FileNotFoundError: where there is no such checkpoint.
    """
    load = config_loader(recipe)
    config = load()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not getattr(config, "is_causal", True):
        name = recipe.config or recipe.checkpoint
        raise ValueError(f"{name} is a {config.model_type} that is no causal language model; the task needs one.")
    check_overrides(recipe.overrides, config)
    config = load(**recipe.overrides)
    if recipe.conversion is not None:
        _check_conversion(recipe, config)
    return config


def _check_conversion(recipe: ModelRecipe, config: PreTrainedConfig) -> None:
    options = conversion_options(recipe.conversion)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    try:
        sas_config(config, find_family(config.model_type), options, architecture)
    except ValueError as error:
        raise ValueError(f"`model.conversion`: {recipe.checkpoint} cannot be converted so: {error}") from error


def conversion_options(fields: dict[str, Any]) -> ConversionOptions:
    """
    Raises:
        ValueError: for a field that `ConversionOptions` does not have or a value of another type; for a lossy
            conversion, which must be fitted on a text.
    """
    options = build(ConversionOptions, fields, "model.conversion.", "no field of a conversion")
    if options.lossy is not None:
        raise ValueError(
            f"`model.conversion.lossy` is {options.lossy!r}, which is fitted on a text; convert by `sas-hf convert "
            f"--lossy {options.lossy}` first and give its folder as `model.checkpoint`."
        )
    return options


def config_loader(recipe: ModelRecipe) -> Callable[..., PreTrainedConfig]:
    """What gives the configuration of a recipe's model, with the fields that it is called with changed.

    Raises:
        FileNotFoundError: where there is no such checkpoint.
    """
    if recipe.checkpoint is None:
        return functools.partial(named_config, recipe.config)
    read_settings(recipe.checkpoint, recipe.revision)  # says what is missing
    return functools.partial(
        AutoConfig.from_pretrained, recipe.checkpoint, revision=recipe.revision, trust_remote_code=False
    )


def check_overrides(overrides: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise a ValueError for an override that is no field of the model, with the nearest one."""
    known = [*config.to_dict(), "attn_implementation"]
    check_names(overrides, known, "model.overrides.", "no field of the model")


def load_tokenizer(recipe: ModelRecipe) -> PreTrainedTokenizerBase:
    """
    Raises:
        ValueError: where there is no tokenizer, or one that marks neither the beginning nor the end of a text.
    """
    if recipe.tokenizer == BUILT_IN:
        return train_tokenizer(python_reference())
    place = recipe.tokenizer or recipe.checkpoint
    try:
        tokenizer = load_checkpoint_tokenizer(place, None if recipe.tokenizer else recipe.revision)
    except OSError as error:
        raise ValueError(f"`model.tokenizer` is {place!r}, where none can be loaded: {error}") from error
    if tokenizer is None:
        raise ValueError(f"`model.tokenizer` is {recipe.tokenizer!r}, and there is none at {place}; name another.")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {place} has neither a bos nor an eos token to part documents with.")
    return tokenizer


def check_match(recipe: TrainingRecipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError where model, tokenizer and sequences do not fit together."""
    text_config = config.get_text_config()
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the model's `vocab_size` is "
            f"{text_config.vocab_size:,}; they do not belong together: change `model.tokenizer`, or for a new model "
            "`model.overrides.vocab_size`."
        )
    length, longest = recipe.data.sequence_length, getattr(text_config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"`data.sequence_length` is {length}, but the model's `max_position_embeddings` is {longest}; shorten the "
            "one, or for a new model raise `model.overrides.max_position_embeddings`."
        )


def build_model(recipe: ModelRecipe, config: PreTrainedConfig) -> PreTrainedModel:
    """The model to train, in float32; training in bf16 casts as it computes."""
    if recipe.checkpoint is None:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = load_weights(AutoModelForCausalLM, recipe, config)
    return model if recipe.conversion is None else convert_model(model, conversion_options(recipe.conversion))


def load_weights(auto_class: type, recipe: ModelRecipe, config: PreTrainedConfig, **options) -> PreTrainedModel:
    """The recipe's checkpoint in float32, never by pickled weights or code of its own."""
    return auto_class.from_pretrained(
        recipe.checkpoint,
        config=config,
        revision=recipe.revision,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        **options,
    )
