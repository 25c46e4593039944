"""Which parameters a recipe trains: all, those whose names match, or low-rank adapters (peft's LoRA)."""

import dataclasses
import difflib
import re
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .recipe_fields import ModelRecipe


def prepare_parameters(
    model: PreTrainedModel, recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel | PeftModel:
    """
    The model to train: with adapters where the recipe has `lora`, else itself, with `trainable` obeyed. What is not
    saved is not trained.

    Args:
        tokenizer: of a language model; there is a warning where the base of adapters ends otherwise.

    Raises:
        ValueError: as [`add_lora`] and [`choose_trainable`].
    """
    if recipe.lora is not None:
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        if tokenizer is not None and tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
            warnings.warn(
                "Adapters are loaded with their base's generation configuration, which does not end at "
                f"{tokenizer.eos_token!r}; set the loaded model's `generation_config` to what is saved beside them "
                "(`GenerationConfig.from_pretrained`).",
                stacklevel=2,
            )
        return add_lora(model, recipe.lora, recipe.revision if model.name_or_path == recipe.checkpoint else None)
    if recipe.trainable is not None:
        choose_trainable(model, recipe.trainable)
    freeze_unsaved(model)
    return model


def freeze_unsaved(model: PreTrainedModel) -> None:
    """Train no parameter that a checkpoint leaves out: what Marian computes anew when it is loaded, its sinusoids, the
    stock Trainer changes, and the model that is loaded is another than the one that was trained."""
    left_out = set(model._keys_to_ignore_on_save or ())
    named = list(model.named_parameters(remove_duplicate=False))
    saved = {id(weight) for name, weight in named if name not in left_out}
    for _, weight in named:
        if id(weight) not in saved:
            weight.requires_grad_(False)


def lora_config(fields: dict[str, Any]) -> LoraConfig:
    """
    The fields as peft's configuration; needs no model, so that a recipe can be checked first.

    Raises:
        ValueError: for a field that `LoraConfig` does not have (with the nearest one), for values that it refuses, or
            without `target_modules`.
    """
    known = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}."
            raise ValueError(f"`model.lora` has no field {name!r}{hint}")
    if not fields.get("target_modules"):
        raise ValueError(
            "`model.lora.target_modules` is missing; name the layers, such as [q_proj, v_proj], or all-linear."
        )
    try:
        return LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`model.lora` is {fields}, which peft refuses: {error}") from error


def add_lora(model: PreTrainedModel, fields: dict[str, Any], revision: str | None = None) -> PeftModel:
    """
    Put low-rank adapters on a model; nothing else trains. They name the model's folder as a whole path, so that they
    load from any directory.

    Args:
        fields: of `LoraConfig`. `task_type` is by default "SEQ_2_SEQ_LM" for encoder-decoders that generate, and
            "CAUSAL_LM" for other models that do.
        revision: of the Hub checkpoint that the model is, for whoever loads the adapters.

    Raises:
        ValueError: as [`lora_config`], or for a target that no layer of the model is named by.
    """
    generates = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    task = {"task_type": generates} if model.can_generate() else {}
    config = lora_config(task | fields)
    layers = [name for name, _ in model.named_modules()]
    for field in ("target_modules", "modules_to_save"):
        wanted = getattr(config, field) or []
        for target in [] if isinstance(wanted, str) else wanted:  # a string is an expression, which peft checks
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                endings = sorted({name.rpartition(".")[2] for name in layers if name[-1:].isalpha()})
                near = difflib.get_close_matches(target, endings, n=1) or endings
                raise ValueError(f"`model.lora.{field}` names {target!r}, but no layer: there is {', '.join(near)}.")
    if model.name_or_path and Path(model.name_or_path).is_dir():
        model.name_or_path = model.config.name_or_path = str(Path(model.name_or_path).resolve())
    return get_peft_model(model, config, revision=revision)


def choose_trainable(model: nn.Module, patterns: list[str]) -> None:
    """
    Train only the parameters whose names one of the regular expressions matches anywhere (`re.search`).

    Raises:
        ValueError: for a pattern that no parameter matches; nothing is changed then.
    """
    named = dict(model.named_parameters(remove_duplicate=False))  # tied ones by each of their names
    chosen = set()
    for pattern in patterns:
        matching = {name for name in named if re.search(pattern, name)}
        if not matching:
            some = ", ".join(list(named)[:5])
            raise ValueError(f"`model.trainable` has {pattern!r}, which matches no parameter; there are {some}, ...")
        chosen |= matching
    model.requires_grad_(False)
    for name in chosen:
        named[name].requires_grad_(True)
