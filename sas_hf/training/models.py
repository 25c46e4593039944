"""The model and tokenizer of a recipe: looked over by configuration first, built when nothing is left to refuse."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configurations import named_config
from ..conversion import ConversionOptions
from ..conversion.convert import find_family, sas_config
from ..data.text import python_reference, train_tokenizer
from ..data.tokenized_text import longest_text
from ..hub.checkpoints import AutoClass, classes_made_by, load_model, read_settings
from ..hub.checkpoints import load_tokenizer as load_checkpoint_tokenizer
from .data import BUILT_IN
from .fields import build, check_names
from .recipe_fields import ModelRecipe, TrainingRecipe


def load_config(recipe: ModelRecipe, auto_class: AutoClass = AutoModelForCausalLM) -> PreTrainedConfig:
    """
    The configuration of the model that is trained; of a checkpoint that is to be converted, after it.

    Args:
        auto_class: that loads the model.

    Raises:
        ValueError: for an unknown name, an override that is no field of it, another kind of model, or a checkpoint
            that cannot be converted.
        FileNotFoundError: where there is no such checkpoint.
    """
    load = config_loader(recipe)
    config = load()
    is_causal = auto_class is AutoModelForCausalLM
    classes = classes_made_by(auto_class)
    if type(config) not in classes or (is_causal and not getattr(config, "is_causal", True)):
        name, kind = recipe.config or recipe.checkpoint, "is no causal language model; the task needs one"
        kind = kind if is_causal else f"has no {auto_class.__name__}, which the task needs"
        raise ValueError(f"{name} is a {config.model_type} that {kind}.")
    if recipe.conversion is not None:
        config = _converted_config(recipe, config, classes[type(config)].__name__)
        load = functools.partial(type(config).from_dict, config.to_dict())
    check_overrides(recipe.overrides, config)
    return load(**recipe.overrides)


def _converted_config(recipe: ModelRecipe, config: PreTrainedConfig, architecture: str) -> PreTrainedConfig:
    options = conversion_options(recipe.conversion or {})
    try:
        return sas_config(config, find_family(config.model_type), options, architecture)
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
        return functools.partial(named_config, cast(str, recipe.config))  # one of the two is given
    read_settings(recipe.checkpoint, recipe.revision)  # says what is missing
    return functools.partial(
        AutoConfig.from_pretrained, recipe.checkpoint, revision=recipe.revision, trust_remote_code=False
    )


def check_overrides(overrides: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise a ValueError for an override that is no field of the model, with the nearest one."""
    known = [*config.to_dict(), "attn_implementation"]
    check_names(overrides, known, "model.overrides.", "no field of the model")


def load_tokenizer(recipe: ModelRecipe, parts_documents: bool = True) -> PreTrainedTokenizerBase:
    """
    Args:
        parts_documents: it must have a token that begins or ends a text.

    Raises:
        ValueError: where there is no tokenizer, or one that marks neither the beginning nor the end of a text.
    """
    if recipe.tokenizer == BUILT_IN:
        return train_tokenizer(python_reference())
    place = cast(str, recipe.tokenizer or recipe.checkpoint)
    try:
        tokenizer = load_checkpoint_tokenizer(place, None if recipe.tokenizer else recipe.revision)
    except OSError as error:
        raise ValueError(f"`model.tokenizer` is {place!r}, where none can be loaded: {error}") from error
    if tokenizer is None:
        raise ValueError(f"`model.tokenizer` is {recipe.tokenizer!r}, and there is none at {place}; name another.")
    if parts_documents and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {place} has neither a bos nor an eos token to part documents with.")
    return tokenizer


def check_match(recipe: TrainingRecipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError where model, tokenizer and sequences do not fit together."""
    check_tokenizer(recipe, config, tokenizer)
    length, longest = recipe.data.sequence_length, longest_text(config)
    if longest is not None and length > longest:
        raise ValueError(
            f"`data.sequence_length` is {length}, but the model's `max_position_embeddings` is {longest}; shorten the "
            "one, or for a new model raise `model.overrides.max_position_embeddings`."
        )


def check_tokenizer(recipe: TrainingRecipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError where model and tokenizer do not fit together."""
    text_config = config.get_text_config()
    if recipe.training.get("use_liger_kernel") and config.model_type.startswith("sas_"):
        raise ValueError("`training.use_liger_kernel` is true, but Liger has no kernels for SAS models; leave it out.")
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the model's `vocab_size` is "
            f"{text_config.vocab_size:,}; they do not belong together: change `model.tokenizer`, or for a new model "
            "`model.overrides.vocab_size`."
        )
    for name, token in _special_tokens(tokenizer).items():
        wanted = recipe.model.overrides.get(name)
        if (
            wanted is not None
            and token is not None
            and token not in (wanted if isinstance(wanted, list) else [wanted])
        ):
            raise ValueError(
                f"`model.overrides.{name}` is {wanted}, but the tokenizer trains the model with {token} "
                f"({tokenizer.convert_ids_to_tokens(token)!r}) there; drop it."
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


def build_model(
    recipe: ModelRecipe, config: PreTrainedConfig, auto_class: AutoClass = AutoModelForCausalLM, new_head: bool = False
) -> PreTrainedModel:
    """The model to train, in float32; training in bf16 casts as it computes.

    Args:
        auto_class: that loads the model.
        new_head: as of [`load_model`].

    Raises:
        ValueError, OSError: as [`load_weights`].
    """
    if recipe.checkpoint is None:
        return auto_class.from_config(config, dtype=torch.float32)
    return load_weights(auto_class, recipe, config, new_head)


def load_weights(
    auto_class: AutoClass, recipe: ModelRecipe, config: PreTrainedConfig, new_head: bool = False
) -> PreTrainedModel:
    """The recipe's checkpoint in float32, never by pickled weights or code of its own.

    Weights that the model has no place for are left out with a warning where they are a head or what `overrides` cut
    off.

    Args:
        new_head: as of [`load_model`].

    Raises:
        ValueError: if weights are damaged, missing, misshapen, not finite, or inside of layers that have no place for
            them.
        OSError: if there are no safetensors weights.
    """
    place, overrides = cast(str, recipe.checkpoint), recipe.overrides.keys() - {"attn_implementation"}
    blame = f" (`model.overrides` changes {', '.join(sorted(overrides))}.)" if overrides else ""
    try:
        model, unknown = load_model(
            auto_class, place, recipe.revision, new_head=new_head, config=config, dtype=torch.float32
        )
    except ValueError as error:
        raise ValueError(f"`model.checkpoint`: {error}{blame}") from error
    inside = [name for name in unknown if _holder(model, name) not in ("", model.base_model_prefix)]
    if inside and not overrides:
        raise ValueError(
            f"`model.checkpoint`: {place} holds weights for which its config.json has no place: "
            f"{', '.join(inside[:5])}; without them it would not be the model that was saved."
        )
    if unknown:
        names = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        warnings.warn(
            f"Of {place}, {len(unknown)} weights are not used by {type(model).__name__}: {names}{blame}", stacklevel=2
        )
    return model


def _holder(model: PreTrainedModel, weight: str) -> str:
    """The innermost module of the model that a weight's name begins with."""
    modules = dict(model.named_modules())
    while weight and (weight := weight.rpartition(".")[0]) not in modules:
        pass
    return weight
