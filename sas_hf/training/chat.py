"""Instruction fine-tuning on conversations, by TRL's `SFTTrainer`, with checkpoints that are whole or not there."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from .adapters import prepare_parameters
from .optimizer import RecipeTrainer
from .recipe import RECIPES, DataRecipe, TrainingRecipe


FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class DurableSFTTrainer(RecipeTrainer, SFTTrainer):
    """TRL's `SFTTrainer` that loses no work: see [`RecipeTrainer`]. Arguments as `SFTTrainer`'s."""


def make_chat_trainer(
    recipe: TrainingRecipe,
    build_model: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
) -> DurableSFTTrainer:
    """
    What trains a model on the recipe's conversations: on the assistant's turns only, where the chat template can tell
    them from the others (its `{% generation %}` blocks, or a template that TRL knows), else on every token, with a
    warning.

    Args:
        build_model: gives the causal language model, once nothing of the data is left to refuse; adapters and frozen
            parameters are added as the recipe says.
        tokenizer: of the model, as `check_match` found; gets the recipe's chat template, where it has one, to be
            saved with the model.
        arguments: `TrainingArguments`, or an `SFTConfig` for more of TRL's options. The length is the recipe's.

    Raises:
        FileNotFoundError: for files or a dataset that are not there.
        ValueError: for a tokenizer without chat template, a dataset without `messages`, conversations in which no
            assistant speaks, or whose assistant speaks only beyond the length; and as [`prepare_parameters`].
    """
    data = recipe.data
    template = read_chat_template(recipe.model.chat_template) or tokenizer.chat_template
    if template is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template; give "
            "`model.chat_template` a Jinja file, or `chatml`."
        )
    train = load_conversations(data.train, data, data.split)
    validation = None
    if data.validation is not None or data.validation_split is not None:
        validation = load_conversations(data.validation or data.train, data, data.validation_split or data.split)
        validation = validation.take(min(len(validation), data.max_validation_sequences or len(validation)))

    model = build_model()
    tokenizer.chat_template = template
    fields = arguments.to_dict() | {
        "hub_token": arguments.hub_token,  # which `to_dict` hides
        "max_length": data.sequence_length,
        "assistant_only_loss": tells_assistant(tokenizer),
    }
    if not fields["assistant_only_loss"]:
        warnings.warn(
            "The chat template does not mark the assistant's turns ({% generation %} ... {% endgeneration %}): the "
            "loss is on every token of the conversations, the user's included.",
            stacklevel=2,
        )
    trainer = DurableSFTTrainer(
        prepare_parameters(model, recipe.model),
        SFTConfig(**fields),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if len(trainer.train_dataset) == 0:
        raise ValueError(
            f"No assistant speaks within the first `data.sequence_length` = {data.sequence_length} tokens of any "
            f"conversation in {data.train}; choose a larger length."
        )
    return trainer


def read_chat_template(source: str | None) -> str | None:
    """The template in a Jinja file; `chatml` is the package's own, which marks the assistant's turns.

    Raises:
        FileNotFoundError: where there is no such file.
    """
    if source is None:
        return None
    path = RECIPES / "chatml.jinja" if source == "chatml" else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"`model.chat_template` is {source!r}, which is no file, nor `chatml`.")
    return path.read_text(encoding="utf-8")


def tells_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template, or TRL's form of it for training, marks the assistant's turns."""
    try:
        get_training_chat_template(tokenizer)
    except (ValueError, TemplateError):
        return False
    return True


def load_conversations(source: str | list[str] | None, data: DataRecipe, split: str) -> Dataset:
    """
    A dataset of `messages`: in each row a list of `{"role": ..., "content": ...}`, in which an assistant speaks.

    Args:
        source: JSONL or parquet files (all are read, whatever `split` says), or a Hub id.

    Raises:
        FileNotFoundError: for neither files nor a dataset that the Hub gives.
        ValueError: for other files, no column `messages`, or rows in which no assistant speaks.
    """
    if not source:
        raise ValueError("`data.train` is missing; give JSONL or parquet files, or a Hub id.")
    if data.streaming:
        raise ValueError("`data.streaming` is for language modelling; conversations are read as a whole.")
    files = [source] if isinstance(source, str) else list(source)
    suffixes = {Path(file).suffix for file in files}
    options: dict[str, Any] = {"cache_dir": data.cache}
    if suffixes <= FORMATS.keys() or any(Path(file).exists() for file in files):
        for file in files:
            if not Path(file).is_file():
                raise FileNotFoundError(f"`data.train` or `data.validation` names {file}, which is no file.")
        kinds = {FORMATS.get(suffix) for suffix in suffixes}
        if len(kinds) != 1 or None in kinds:
            raise ValueError(f"Conversations must be JSONL or parquet files, not both; these are {', '.join(files)}.")
        dataset = load_dataset(kinds.pop(), data_files=files, split="train", **options)
    elif len(files) > 1:
        raise FileNotFoundError(f"{', '.join(files)} are no files; of Hub datasets give one.")
    else:
        try:
            dataset = load_dataset(files[0], data.config, split=split, **options)
        except (OSError, ValueError) as error:  # not there, no such split, or the Hub cannot be reached
            raise FileNotFoundError(
                f"{files[0]} is no file here, nor a dataset with a split {split!r} that the Hub gives: "
                f"{str(error).splitlines()[0]}"
            ) from error
    return _with_messages(dataset, ", ".join(files))


def _with_messages(dataset: Dataset, source: str) -> Dataset:
    if "messages" not in dataset.column_names:
        raise ValueError(f"{source} has no column `messages`; its columns are {', '.join(dataset.column_names)}.")
    dataset = dataset.select_columns("messages")
    silent = dataset.filter(_is_silent, input_columns="messages", desc="Checking conversations")
    if len(dataset) == 0 or len(silent) > 0:
        first = f", for instance {silent[0]['messages']!r}" if len(silent) else ""
        raise ValueError(
            f"Every row of {source} must have `messages`, a list of role and content in which an assistant speaks; "
            f"{len(silent)} of {len(dataset)} do not{first}."
        )
    return dataset


def _is_silent(messages: Any) -> bool:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return True
    return not any(message.get("role") == "assistant" and message.get("content") for message in messages)
