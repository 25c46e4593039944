"""Instruction fine-tuning on conversations, by TRL's `SFTTrainer`, with checkpoints that are whole or not there."""

import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

from ...data.text import check_text, read_text
from ...data.text_files import find_files, kind_of
from ..adapters import prepare_parameters
from ..held_out import check_apart, compare_with_training, digests
from ..optimizer import RecipeTrainer
from ..recipe_fields import RECIPES, DataRecipe, TrainingRecipe
from .causal import CausalTask
from .task import Samples, evenly


FORMATS = ("json", "parquet")
ANSWER = "Quite."  # an assistant's, to see what the chat template puts behind it
OTHER_FORMATS = {
    "conversations": " Make lists of `role` and `content` of them (of ShareGPT's `from` and `value`).",
    "prompt": " Make a user's and an assistant's message of each prompt and its completion.",
    "text": " For texts there is `task: language_modeling`.",
}


class Chat(CausalTask):
    name = "chat"
    reads = (
        "model.conversion",
        "model.chat_template",
        "data.validation_split",
        "data.validation_documents",  # to say that there is no such thing
        "data.config",
        "data.split",
        "data.streaming",  # likewise
        "data.sequence_length",
        "data.max_validation_sequences",
    )
    varied_lengths = True

    def read_samples(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> Samples:
        _, tokenizer = self.load_sources(recipe)
        tokenizer.chat_template = read_chat_template(recipe.model.chat_template) or tokenizer.chat_template
        train, _ = load_splits(recipe.data, tokenizer.chat_template)
        tokens = [
            tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=False)
            for row in train.select(evenly(train))
        ]
        return Samples(len(train), [(min(len(ids), recipe.data.sequence_length),) for ids in tokens])

    def random_batch(self, config: PreTrainedConfig, rows: int, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        batch = super().random_batch(config, rows, lengths)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    def make_trainer(
        self, recipe: TrainingRecipe, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
    ) -> "DurableSFTTrainer":
        config, tokenizer = self.load_sources(recipe)
        build = partial(self.build_model, recipe, config, tokenizer, arguments)
        return make_chat_trainer(recipe, build, tokenizer, arguments, callbacks)


class DurableSFTTrainer(RecipeTrainer, SFTTrainer):
    """TRL's `SFTTrainer` that loses no work: see [`RecipeTrainer`]. Arguments as `SFTTrainer`'s."""


def make_chat_trainer(
    recipe: TrainingRecipe,
    build_model: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
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
        ValueError: for a tokenizer without chat template, or one whose turns no token ends that is trained; a dataset
            without `messages`, conversations in which no assistant speaks, or whose assistant ends no turn within
            the length, or validation on what is trained on; and as [`prepare_parameters`].
    """
    data = recipe.data
    template = read_chat_template(recipe.model.chat_template) or tokenizer.chat_template
    if template is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template; give "
            "`model.chat_template` a Jinja file, or `chatml`."
        )
    tokenizer.chat_template = template
    assistant_only = tells_assistant(tokenizer)
    end = turn_end(tokenizer, assistant_only)
    train, validation = load_splits(data, template)

    # What ends a turn becomes the tokenizer's eos, by which TRL, vLLM and lm-eval stop, and the Trainer adds it to
    # what ends a generation of the model. What ended a text stays there, and pads.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or end
    tokenizer.eos_token = end
    model = build_model()
    fields = arguments.to_dict() | {
        "hub_token": arguments.hub_token,  # which `to_dict` hides
        "max_length": data.sequence_length,
        "assistant_only_loss": assistant_only,
    }
    if not assistant_only:
        warnings.warn(
            "The chat template does not mark the assistant's turns ({% generation %} ... {% endgeneration %}): the "
            "loss is on every token of the conversations, the user's included.",
            stacklevel=2,
        )
    try:
        trainer = DurableSFTTrainer(
            prepare_parameters(model, recipe.model, tokenizer),
            SFTConfig(**fields),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
    except TemplateError as error:
        raise ValueError(f"The chat template refuses a conversation of `data`: {error}") from error
    rows = cast(Dataset, trainer.train_dataset)
    for does, found in (
        ("speaks", len(rows) > 0),
        ("ends a turn", any(tokenizer.eos_token_id in row["labels"] for row in rows)),
    ):
        if not found:
            raise ValueError(
                f"No assistant {does} within the first `data.sequence_length` = {data.sequence_length} tokens of any "
                f"conversation in {data.train}; choose a larger length."
            )
    return trainer


def read_chat_template(source: str | None) -> str | None:
    """The template in a Jinja file; `chatml` is the package's own, which marks the assistant's turns.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is not text in UTF-8.
    """
    if source is None:
        return None
    path = RECIPES / "chatml.jinja" if source == "chatml" else Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`model.chat_template` is {source!r}, which is no file, nor `chatml`.")
    return read_text(Path(str(path)))


def tells_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template, or TRL's form of it for training, marks the assistant's turns."""
    try:
        get_training_chat_template(tokenizer)
    except (ValueError, TemplateError):
        return False
    return True


def turn_end(tokenizer: PreTrainedTokenizerBase, assistant_only: bool) -> str:
    """
    The token by which the tokenizer's chat template ends an assistant's turn, so that a generation can end there.

    Args:
        assistant_only: the loss is on what the template marks as the assistant's.

    Raises:
        ValueError: where that is no special token of the tokenizer, or not marked, and so never a target.
    """
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise ValueError(f"`model.chat_template` cannot render a question and its answer: {error}") from error
    behind = text.rpartition(ANSWER)[2] if ANSWER in text else ""
    special = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    tokens = tokenizer(behind, add_special_tokens=False)["input_ids"]
    end = next((token for token in tokens if token in special or cast(str, tokenizer.decode([token])).strip()), None)
    if end not in special:
        raise ValueError(
            f"`model.chat_template` ends an assistant's turn by {behind.strip() or behind!r}, which is no special "
            "token of the tokenizer: the model could not end its turns. Give a template that ends them by one of its "
            f"own, such as {tokenizer.eos_token!r}, or a tokenizer and model that have it."
        )
    if assistant_only and not is_chat_template_stop_token_trained(tokenizer, get_training_chat_template(tokenizer)):
        raise ValueError(
            f"`model.chat_template` ends an assistant's turn by {behind.strip()!r} outside of its {{% generation %}} "
            "block, where it is never a target: the model would not learn to end its turns. Move it inside."
        )
    return cast(str, tokenizer.convert_ids_to_tokens(end))


def load_splits(data: DataRecipe, template: str) -> tuple[Dataset, Dataset | None]:
    """
    Conversations to train on, and those to validate on, if any.

    Raises:
        FileNotFoundError: as [`load_conversations`].
        ValueError: as [`load_conversations`], or for validation on what is trained on.
    """
    if data.streaming:
        raise ValueError("`data.streaming` is for language modelling; conversations are read as a whole.")
    if data.validation_documents is not None:
        raise ValueError(
            f"`data.validation_documents` is {data.validation_documents}, of texts; name conversations in "
            "`data.validation`, or a `data.validation_split`."
        )
    if not data.train:
        raise ValueError("`data.train` is missing; give JSONL or parquet files, or a Hub id.")
    files = find_files(data.train, "data.train")
    held_out = find_files(data.validation, "data.validation") if data.validation else None
    if files and data.validation_split and not data.validation:  # which goes before the split that a recipe names
        raise ValueError(
            f"`data.validation_split` is {data.validation_split!r}, but only a dataset of the Hub has splits; name "
            "other files in `data.validation`, or set it to null."
        )
    check_apart(data, files, held_out)
    train = load_conversations(data.train, files, data, data.split, template)
    if not (data.validation or data.validation_split):
        return train, None
    split = data.validation_split or data.split
    validation = load_conversations(data.validation or data.train, held_out, data, split, template)
    validation = validation.take(min(len(validation), data.max_validation_sequences or len(validation)))
    texts = (_as_text(row) for row in validation)
    known = np.array([digest for row in train for digest in digests(_as_text(row))])
    compare_with_training(texts, [known], "conversations")
    return train, validation


def _as_text(row: dict[str, Any]) -> str:
    turns = [(message["role"], message["content"]) for message in row["messages"]]
    return json.dumps(turns)


def load_conversations(
    source: str | list[str], files: list[Path] | None, data: DataRecipe, split: str, template: str
) -> Dataset:
    """
    A dataset of `messages`: in each row a list of `{"role": ..., "content": ...}`, in which an assistant speaks; and
    of `tools`, where there are.

    Args:
        source: of the recipe.
        files: JSONL or parquet files that it names (all are read, whatever `split` says), or `None` for a Hub id.
        template: for chats, which must show all that is in a conversation.

    Raises:
        FileNotFoundError: for no dataset that the Hub gives.
        ValueError: for other files, no column `messages`, or rows in which no assistant speaks.
    """
    options: dict[str, Any] = {"cache_dir": data.cache}
    name = source if isinstance(source, str) else ", ".join(source)
    if files:
        kind = kind_of(files[0])
        if kind not in FORMATS:
            raise ValueError(f"Conversations must be JSONL or parquet files; these are {name}.")
        for path in files if kind == "json" else ():
            check_text(path)
        try:
            dataset = load_dataset(kind, data_files=[str(path) for path in files], split="train", **options)
        except (DatasetGenerationError, ValueError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(f"{name} cannot be read as {kind}: {reason}") from error
    else:
        try:
            dataset = load_dataset(source, data.config, split=split, **options)
        except (OSError, ValueError) as error:  # not there, no such split, or the Hub cannot be reached
            raise FileNotFoundError(
                f"{source} is no file here, nor a dataset with a split {split!r} that the Hub gives: "
                f"{str(error).splitlines()[0]}"
            ) from error
    return _with_messages(dataset, name, template)


def _with_messages(dataset: Dataset, source: str, template: str) -> Dataset:
    columns = dataset.column_names
    if "messages" not in columns:
        hint = next((hint for column, hint in OTHER_FORMATS.items() if column in columns), "")
        raise ValueError(f"{source} has no column `messages`; its columns are {', '.join(columns)}.{hint}")
    has_tools = "tools" in columns and any(dataset["tools"])
    dataset = dataset.select_columns(["messages", "tools"] if has_tools else ["messages"])
    calls = any(_calls(row["messages"]) for row in dataset)
    for what, there in (("tools", has_tools), ("tool_calls", calls)):
        if there and what not in str(template):
            raise ValueError(
                f"{source} has `{what}`, which the chat template would leave out; give `model.chat_template` one that "
                "shows them."
            )
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
    speaks = False
    for message in messages:
        role, content, calls = (message.get(name) for name in ("role", "content", "tool_calls"))
        if not isinstance(role, str) or not (isinstance(content, str) or (content is None and calls)):
            return True
        speaks = speaks or (role == "assistant" and bool(content or calls))
    return not speaks


def _calls(messages: Any) -> bool:
    is_list = isinstance(messages, list)
    return is_list and any(isinstance(message, dict) and message.get("tool_calls") for message in messages)
