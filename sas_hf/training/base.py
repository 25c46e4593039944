"""The checkpoint that a run starts from, where none is there yet: its conversion, or the base of its adapters.

It is written once, into the run's folder, whole or not at all: adapters alone are not a model, and a conversion that
is not kept cannot be looked at again.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

from transformers import (
    AutoConfig,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import enable_full_determinism
from transformers.utils import GENERATION_CONFIG_NAME

from ..conversion import convert_checkpoint
from ..hub.checkpoints import new_folder
from ..report.files import write_atomically
from .folders import has_trained, output_folder
from .models import build_model, conversion_options, load_config
from .recipe_fields import ModelRecipe


BASE = "base"


def starting_model(
    auto_class: type,
    recipe: ModelRecipe,
    config: PreTrainedConfig,
    arguments: TrainingArguments,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    new_head: bool = False,
) -> PreTrainedModel:
    """
    The model that a run starts from, before adapters are put on it or parameters frozen.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        config: of the recipe's model.
        arguments: `seed` decides a new model's weights.
        processor: tokenizer or image processor, to be saved beside a base.
        new_head: the checkpoint's head does not fit `config` and begins anew.

    Raises:
        ValueError, OSError: as [`build_model`] and [`write_base`].
    """

    def build(start: ModelRecipe) -> PreTrainedModel:
        # The Trainer seeds when it gets the model, which is too late for a new one.
        enable_full_determinism(arguments.seed) if arguments.full_determinism else set_seed(arguments.seed)
        if start is recipe:
            return build_model(start, config, auto_class, new_head)
        return build_model(start, load_config(start, auto_class), auto_class)

    start = recipe
    if needs_base(recipe, new_head):
        start = write_base(recipe, arguments, lambda: build(recipe), processor)
    return build(start)


def needs_base(recipe: ModelRecipe, new_head: bool = False) -> bool:
    """Whether what the run starts from is no checkpoint that stays: it is converted, or has adapters put on weights or
    a configuration that are nowhere saved."""
    changed = recipe.overrides.keys() - {"attn_implementation"}  # which no configuration file holds
    return recipe.conversion is not None or (
        recipe.lora is not None and (recipe.checkpoint is None or bool(changed) or new_head)
    )


def write_base(
    recipe: ModelRecipe,
    arguments: TrainingArguments,
    build: Callable[[], PreTrainedModel],
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
) -> ModelRecipe:
    """
    Make `base` in the run's folder, unless a checkpoint of the run has started from it already.

    Args:
        build: gives the model, where it is not converted from the recipe's checkpoint.
        processor: tokenizer or image processor to save beside it.

    Returns:
        the recipe as if `base` had been its checkpoint.

    Raises:
        FileNotFoundError: where the run has started, but its base is gone.
        ValueError, OSError: as `convert_checkpoint`.
    """
    folder = output_folder(arguments)
    base = folder / BASE
    with arguments.main_process_first(local=arguments.save_on_each_node, desc="writing the base"):
        if has_trained(folder):
            if not base.is_dir():
                raise FileNotFoundError(
                    f"{base} is gone, from which the run in {folder} started; put it back, or begin anew in another "
                    "`training.output_dir`."
                )
        elif arguments.should_save:
            for leftover in (base, *folder.glob(f".{BASE}.*")):  # of a process that was killed before its first step
                shutil.rmtree(leftover, ignore_errors=True)
            if recipe.conversion is not None:
                options = conversion_options(recipe.conversion)
                convert_checkpoint(cast(str, recipe.checkpoint), base, options, revision=recipe.revision)
                if recipe.lora is not None and recipe.overrides:
                    AutoConfig.from_pretrained(base, **recipe.overrides).save_pretrained(base)
            else:
                with new_folder(base) as unfinished:
                    build().save_pretrained(unfinished)
                    processor.save_pretrained(unfinished)
            generates = base / GENERATION_CONFIG_NAME
            end = getattr(processor, "eos_token_id", None)  # which image processors lack
            if recipe.lora is not None and generates.is_file() and end is not None:
                _end_at(generates, end)
    return dataclasses.replace(recipe, config=None, checkpoint=str(base), revision=None, conversion=None)


def _end_at(path: Path, token: int) -> None:
    """Let a generation configuration end there, too: whoever loads adapters generates by their base's."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if token not in ends:
        settings["eos_token_id"] = [token, *ends] if ends else token
        write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())
