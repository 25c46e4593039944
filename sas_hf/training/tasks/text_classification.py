"""Training or fine-tuning a classifier of texts or pairs of texts: one class, several labels, or a rating each."""

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from ...data.labelled_text import (
    CLASSES,
    REGRESSION,
    SEVERAL,
    Columns,
    LabelledTexts,
    Labels,
    find_labels,
    labels_by_number,
    number_labels,
    read_labelled_texts,
)
from ...data.text import train_word_tokenizer
from ...data.text_files import find_files
from ...data.tokenized_text import longest_text, prepare_tokenizer, tokenize
from ...hub.checkpoints import classes_made_by
from ...report.measures import macro_f1, micro_f1, pearson, spearman
from ..adapters import lora_config, prepare_parameters
from ..base import starting_model
from ..held_out import check_apart, compare_with_training, digests
from ..models import check_tokenizer, load_tokenizer, take_special_tokens
from ..optimizer import RecipeTrainer
from ..recipe_fields import DataRecipe, TrainingRecipe
from .classification import chance, check_classifier_recipe, check_head_trains, classifier_config
from .task import LOSS, Metric, Samples, Task, evenly, random_tokens


# By what the labels are; studies compare by the first.
METRICS = {
    CLASSES: (
        Metric("accuracy", "validation accuracy", higher_is_better=True, chance=chance),
        Metric("f1", "macro F1", higher_is_better=True),
        LOSS,
    ),
    REGRESSION: (
        Metric("pearson", "Pearson's r", higher_is_better=True),
        Metric("spearman", "Spearman's rank correlation", higher_is_better=True),
        Metric("mse", "mean squared error"),
        LOSS,
    ),
    SEVERAL: (
        Metric("micro_f1", "micro F1", higher_is_better=True),
        Metric("exact_match", "all labels right", higher_is_better=True),
        LOSS,
    ),
}


class TextClassification(Task):
    name = "text_classification"
    auto_class = AutoModelForSequenceClassification
    metrics = tuple(dict.fromkeys(metric for kind in METRICS.values() for metric in kind))
    reads = (
        "data.validation_split",
        "data.validation_documents",
        "data.config",
        "data.split",
        "data.text_column",
        "data.second_text_column",
        "data.label_column",
        "data.class_names",
        "data.sequence_length",
    )
    varied_lengths = True

    def check_recipe(self, recipe: TrainingRecipe) -> None:
        check_classifier_recipe(recipe)

    def check_sources(self, recipe: TrainingRecipe) -> None:
        _load(recipe)

    def metrics_of(self, recipe: TrainingRecipe) -> tuple[Metric, ...]:
        return METRICS[load_texts(recipe)[2].problem_type]

    def read_samples(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> Samples:
        train, _, _, config, tokenizer, _ = _load(recipe)
        if tokenizer is None:
            tokenizer = train_word_tokenizer([*train.texts, *(train.seconds or ())], config.vocab_size)
        prepare_padding(recipe, config, tokenizer)
        columns, _ = tokenize(train.select(evenly(train)), tokenizer, _longest(recipe, config, tokenizer)[0])
        fields = {"num_labels": config.num_labels, "problem_type": config.problem_type}
        return Samples(len(train), [(len(ids),) for ids in columns["input_ids"]], fields)

    def random_batch(self, config: PreTrainedConfig, rows: int, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        tokens = random_tokens(config, rows, *lengths)
        count = config.num_labels or 0
        labels = {
            REGRESSION: torch.rand(rows),
            SEVERAL: torch.rand(rows, count).round(),
        }.get(config.problem_type or CLASSES, torch.randint(count, (rows,)))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    def make_trainer(
        self, recipe: TrainingRecipe, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
    ) -> RecipeTrainer:
        train, validation, labels, config, tokenizer, new_head = _load(recipe)
        if tokenizer is None:
            tokenizer = train_word_tokenizer([*train.texts, *(train.seconds or ())], config.vocab_size)
        prepare_padding(recipe, config, tokenizer)
        longest, limit = _longest(recipe, config, tokenizer)
        datasets = [
            None if rows is None else encode(rows, labels, tokenizer, longest, limit) for rows in (train, validation)
        ]
        model = starting_model(self.auto_class, recipe.model, config, arguments, tokenizer, new_head)
        adapted = prepare_parameters(model, recipe.model)
        if new_head:
            check_head_trains(adapted, recipe.model)
        return RecipeTrainer(
            adapted,
            arguments,
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=MEASURES[labels.problem_type],
            preprocess_logits_for_metrics=_logits,
            callbacks=list(callbacks),
        )


def _load(recipe: TrainingRecipe) -> tuple:
    """Everything but the model, once nothing in it is left to refuse."""
    train, validation, labels = load_texts(recipe)
    _check_training(recipe, labels)
    config, new_head = classifier_config(
        recipe.model, labels.names, AutoModelForSequenceClassification, "texts", labels.problem_type
    )
    if labels.names:  # of a checkpoint they may be in another order
        labels = replace(labels, names=[label for _, label in sorted(labels_by_number(config).items())])
    tokenizer = None
    if recipe.model.checkpoint is not None or recipe.model.tokenizer is not None:
        tokenizer = load_tokenizer(recipe.model, parts_documents=False)
        check_tokenizer(recipe, config, tokenizer)
    longest_chosen(recipe, config)
    if recipe.model.lora is not None:
        lora_config(recipe.model.lora)
    return train, validation, labels, config, tokenizer, new_head


def load_texts(recipe: TrainingRecipe) -> tuple[LabelledTexts, LabelledTexts | None, Labels]:
    """
    Texts to train and to validate on, and what their labels mean.

    Raises:
        ValueError, FileNotFoundError: for what is no labelled text, or what is both trained and validated on.
    """
    data, source = recipe.data, cast(str | list[str], recipe.data.train)
    given = [name for name in ("validation", "validation_split", "validation_documents") if getattr(data, name)]
    if len(given) > 1:
        raise ValueError(f"`data.{given[0]}` and `data.{given[1]}` are both given; set one of them to null.")
    files = find_files(source, "data.train")
    held_out = find_files(data.validation, "data.validation") if data.validation else None
    if data.validation_split and files:
        raise ValueError(
            f"`data.validation_split` is {data.validation_split!r}, but only a dataset of the Hub has splits; name "
            "files in `data.validation`, or hold some texts out with `data.validation_documents`."
        )
    check_apart(data, files, held_out)
    columns = Columns(data.text_column, data.second_text_column, _one(data.label_column), "data.")
    train = read_labelled_texts(source, columns, "data.train", data.config, data.split, data.cache)
    validation = None
    if data.validation:
        options = ("data.validation", data.config, data.split, data.cache)
        validation = read_labelled_texts(data.validation, columns, *options)
    elif data.validation_split:
        options = ("data.train", data.config, data.validation_split, data.cache)
        validation = read_labelled_texts(source, columns, *options)
    elif data.validation_documents:
        train, validation = _held_out(data, train)
    labels = find_labels(train, data.class_names, recipe.model.overrides.get("problem_type"))
    if validation is not None:
        number_labels(validation, labels)
        known = np.array([digest for text in _lines(train) for digest in digests(text)], dtype=np.int64)
        compare_with_training(_lines(validation), [known], "texts")
    return train, validation, labels


def _one(column: str | list[str]) -> str | list[str]:
    return column[0] if isinstance(column, list) and len(column) == 1 else column


def _lines(rows: LabelledTexts) -> list[str]:
    """Each text, or pair, as one."""
    pairs = zip(rows.texts, rows.seconds or [""] * len(rows), strict=True)
    return [" ".join(f"{first} {second}".split()) for first, second in pairs]


def _held_out(data: DataRecipe, rows: LabelledTexts) -> tuple[LabelledTexts, LabelledTexts]:
    count = data.validation_documents or 0
    if not 1 <= count < len(rows):
        raise ValueError(
            f"`data.validation_documents` is {count}; it must be at least 1 and less than the {len(rows)} texts."
        )
    numbers = list(range(len(rows)))
    random.Random(0).shuffle(numbers)  # whatever the run's seed: runs of several seeds validate on the same
    return rows.select(sorted(numbers[count:])), rows.select(sorted(numbers[:count]))


def _check_training(recipe: TrainingRecipe, labels: Labels) -> None:
    training = recipe.training
    smoothing = training.get("label_smoothing_factor")
    if smoothing and labels.problem_type != CLASSES:
        raise ValueError(
            f"`training.label_smoothing_factor` is {smoothing}, which is of classes, but the labels are of the kind "
            f"{labels.problem_type!r}; leave it out."
        )
    metric, known = training.get("metric_for_best_model"), METRICS[labels.problem_type]
    if metric is not None and metric.removeprefix("eval_") not in [each.name for each in known]:
        raise ValueError(
            f"`training.metric_for_best_model` is {metric!r}; with labels of the kind {labels.problem_type!r} an "
            f"evaluation has {', '.join(each.name for each in known)}."
        )


def prepare_padding(recipe: TrainingRecipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let tokenizer and model agree on what is padding: decoders are classified by their last token before it."""
    check_tokenizer(recipe, config, tokenizer)
    prepare_tokenizer(tokenizer, config, classes_made_by(AutoModelForSequenceClassification)[type(config)])
    take_special_tokens(recipe.model, config, tokenizer)
    if recipe.model.checkpoint is None or config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id


def longest_chosen(recipe: TrainingRecipe, config: PreTrainedConfig) -> int:
    """`data.sequence_length`, which must not be more than the model has positions for, unless it is the default."""
    chosen, positions = recipe.data.sequence_length, longest_text(config)
    if chosen < 3:
        raise ValueError(f"`data.sequence_length` is {chosen}; a text and its ends have at least 3 tokens.")
    if positions is not None and chosen > positions and chosen != DataRecipe.sequence_length:
        raise ValueError(
            f"`data.sequence_length` is {chosen}, but the model has positions for {positions} tokens; leave it out, "
            "or for a new model raise `model.overrides.max_position_embeddings`."
        )
    return chosen


def _longest(recipe: TrainingRecipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """The most tokens that a text may have, and what says so."""
    limits = {
        "`data.sequence_length`": longest_chosen(recipe, config),
        "the model's positions": longest_text(config),
        "the tokenizer's `model_max_length`": tokenizer.model_max_length,
    }
    known = {name: limit for name, limit in limits.items() if limit is not None}
    return min(known.values()), min(known, key=known.__getitem__)


def encode(
    rows: LabelledTexts, labels: Labels, tokenizer: PreTrainedTokenizerBase, longest: int, limit: str
) -> Dataset:
    """
    Rows of tokens, at most `longest` each, with `labels`. There is a warning where texts are cut.

    Args:
        limit: what says how long they may be.
    """
    columns, cut = tokenize(rows, tokenizer, longest)
    if cut:
        warnings.warn(
            f"{cut:,} of {len(rows):,} texts of {rows.source} have more than {longest} tokens ({limit}); what is "
            "beyond is cut off.",
            stacklevel=2,
        )
    return Dataset.from_dict(columns | {"labels": number_labels(rows, labels)})


def _logits(logits, labels):
    return logits[0] if isinstance(logits, tuple) else logits  # an encoder-decoder gives more


def _arrays(found: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels; of models that give more, `_logits` has left these."""
    return cast(np.ndarray, found.predictions), cast(np.ndarray, found.label_ids)


def class_measures(found: EvalPrediction) -> dict[str, float]:
    """The share of texts whose class has the highest logit, and [`macro_f1`]."""
    logits, labels = _arrays(found)
    predicted = logits.argmax(axis=-1)
    return {"accuracy": (predicted == labels).mean(), "f1": macro_f1(predicted, labels)}


def rating_measures(found: EvalPrediction) -> dict[str, float]:
    """Correlations of the predicted with the given numbers, and the mean squared error."""
    predicted, labels = (array.reshape(-1).astype(float) for array in _arrays(found))
    return {
        "pearson": pearson(predicted, labels),
        "spearman": spearman(predicted, labels),
        "mse": ((predicted - labels) ** 2).mean(),
    }


def several_measures(found: EvalPrediction) -> dict[str, float]:
    """[`micro_f1`], and the share of texts with all labels right; one is predicted where its logit is positive."""
    logits, given = _arrays(found)
    predicted, labels = logits > 0, given > 0.5
    return {"micro_f1": micro_f1(predicted, labels), "exact_match": (predicted == labels).all(axis=-1).mean()}


MEASURES: dict[str, Callable[[EvalPrediction], dict[str, float]]] = {
    CLASSES: class_measures,
    REGRESSION: rating_measures,
    SEVERAL: several_measures,
}
