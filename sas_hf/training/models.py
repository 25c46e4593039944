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
    for name, token in _special_tokens(tokenizer).items():
        wanted = recipe.model.overrides.get(name)
        if None not in (wanted, token) and token not in (wanted if isinstance(wanted, list) else [wanted]):
            raise ValueError(
                f"`model.overrides.{name}` is {wanted}, but the tokenizer trains the model with {token} "
                f"({tokenizer.convert_ids_to_tokens(token)!r}) there; drop it."
            )
    length, longest = recipe.data.sequence_length, getattr(text_config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"`data.sequence_length` is {length}, but the model's `max_position_embeddings` is {longest}; shorten the "
            "one, or for a new model raise `model.overrides.max_position_embeddings`."
        )


def take_special_tokens(recipe: ModelRecipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a new model begin, end and pad texts as its tokenizer does, in `config`.

    A checkpoint keeps what it says, and the Trainer adds what its tokenizer says otherwise, with a warning.
    """
    for name, token in _special_tokens(tokenizer).items():
        if recipe.checkpoint is None and token is not None and recipe.overrides.get(name) is None:
            setattr(config.get_text_config(), name, token)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """As [`pack_documents`] and TRL use them; padding that is a token of the text too would leave that untrained."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return {"bos_token_id": start, "eos_token_id": end, "pad_token_id": None if pad in (start, end) else pad}


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
