"""`evaluate_texts`: a classifier of texts and labelled texts in; accuracy, F1, loss or what fits the labels out."""

import copy
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.labelled_text import (
    CLASSES,
    REGRESSION,
    SEVERAL,
    Columns,
    LabelledTexts,
    Labels,
    labels_by_number,
    number_labels,
    read_labelled_texts,
)
from ..data.tokenized_text import longest_text, prepare_tokenizer, tokenize
from ..hub.checkpoints import load_tokenizer
from ..report.files import one_at_a_time
from ..report.measures import jackknife_error, macro_f1, micro_f1, pearson, spearman
from ..report.progress import bar
from .arguments import check_arguments, check_output, number_of_samples
from .classifiers import find_scored, mean_score, require_head, require_numbers
from .models import left_as_found
from .results import EvaluationResult, Metric, TaskResult, digest, one_task_result


AUTO_BATCH_SIZE = 64


@one_at_a_time("output")
def evaluate_texts(
    model: str | Path | PreTrainedModel,
    texts: str | list[str],
    *,
    text_column: str = "text",
    second_text_column: str | None = None,
    label_column: str | list[str] = "label",
    config: str | None = None,
    split: str | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    limit: int | float | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    output: str | Path | None = None,
) -> EvaluationResult:
    """
    Score a classifier of texts. Code that a checkpoint brings along is never run.

    Args:
        model: a checkpoint's folder, a Hub id, or a live model, of any architecture with a sequence classification
            head.
        texts: tables (CSV, TSV, JSON lines, parquet), or a Hub id.
        text_column, second_text_column, label_column: see `DataRecipe`; labels are told by the names of the model's
            classes, or by their numbers from 0.
        config, split: of a Hub dataset; "test" by default.
        tokenizer: the model's own where `None`.
        limit: how many texts to score, or what share of them if below 1: in an order shuffled with seed 0, since many
            are sorted by class.
        batch_size: texts at a time; "auto": 64.
        device: "cpu", "cuda", ...; `None`: the accelerator if there is one. Not for a live model.
        dtype: as in `from_pretrained`; `None`: what the checkpoint holds. Not for a live model.
        output: JSON file to write the result to.

    Returns:
        the metrics "accuracy", "f1" (macro) and "loss" (mean cross-entropy); "pearson", "spearman" and "mse" of a
        regression; "micro_f1", "exact_match" and "loss" of several labels; with standard errors, by the jackknife
        where they are no means.

    Raises:
        ValueError: for a model without the head or a tokenizer, labels that are not the model's, or logits that are
            not numbers.
        FileNotFoundError: for a missing file.
        BlockingIOError: when another process evaluates to `output`.

    All but the last come before the first forward pass.
    """
    check_arguments(model, limit, batch_size, device, dtype)
    if output is not None:
        check_output(output)
    live = isinstance(model, PreTrainedModel)
    name = type(model).__name__ if live else str(model)
    if not live:
        remedy = "score a language model with `--tasks` or `--perplexity`"
        require_head(name, AutoModelForSequenceClassification, "text classifier", remedy)
    columns = Columns(text_column, second_text_column, label_column)
    rows = read_labelled_texts(texts, columns, "texts", config, split or "test")
    available, order = len(rows), list(range(len(rows)))
    if (count := number_of_samples(limit, available)) < available:
        random.Random(0).shuffle(order)
        rows = rows.select(order[:count])

    of_head = (AutoModelForSequenceClassification, "ForSequenceClassification", "text classifier")
    scored, origin = find_scored(model, *of_head, dtype, device)
    tokenizer = find_tokenizer(tokenizer, origin, scored)
    labels = model_labels(scored.config, rows)
    numbers = number_labels(rows, labels)
    limits = [longest_text(scored.config), tokenizer.model_max_length]
    inputs, cut = tokenize(rows, tokenizer, min(limit for limit in limits if limit is not None))

    start = time.perf_counter()
    size = min(AUTO_BATCH_SIZE if isinstance(batch_size, str) else batch_size, len(rows))
    logits = _logits(scored, tokenizer, inputs, size)
    metrics, scores = _measured(logits, numbers, labels.problem_type)
    task = TaskResult(
        metrics=metrics,
        num_samples=len(rows),
        num_available=available,
        split=split or "",
        data=rows.source,
        num_fewshot=None,
        version=None,
        notes=[f"{cut:,} texts are cut to the {min(filter(None, limits)):,} tokens that the model reads"]
        if cut
        else [],
        scores={key: values.tolist() for key, values in scores.items()},
        questions=digest([*rows.texts, *(rows.seconds or ()), *map(str, rows.labels)]),
    )
    return one_task_result(
        scored,
        "text_classification",
        task,
        name=name,
        limit=limit,
        requested=batch_size,
        size=size,
        start=start,
        library="datasets",
        output=output,
        num_truncated=cut,
    )


def model_labels(config: PreTrainedConfig, rows: LabelledTexts) -> Labels:
    """
    What the model's labels are called and mean; a Hub dataset's names stand for those of a model that has none.

    Raises:
        ValueError: for numbers that do not count, or names that are there twice.
    """
    names = [label for _, label in sorted(labels_by_number(config).items())]
    count = len(names)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"The model has several labels named {twice!r} (`id2label`); tell them apart.")
    if (config.problem_type or (REGRESSION if count == 1 else None)) == REGRESSION:
        if count > 1:
            raise ValueError(f"The model predicts {count} numbers for a text; one can be scored.")
        return Labels(REGRESSION, [])
    nameless = names == [f"LABEL_{number}" for number in range(len(names))]
    if nameless and rows.names is not None and len(rows.names) == len(names):
        names = rows.names
    return Labels(config.problem_type or (SEVERAL if isinstance(rows.labels[0], list) else CLASSES), names)


def find_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None, place: str, model: PreTrainedModel
) -> PreTrainedTokenizerBase:
    """A copy, which makes what the model reads."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)
    else:
        place = str(tokenizer or place)
        tokenizer = load_tokenizer(place, None) if place else None
        if tokenizer is None:
            raise ValueError(f"There is no tokenizer in {place!r}; pass one as `tokenizer`.")
    prepare_tokenizer(tokenizer, model.config, type(model))
    pad = model.config.get_text_config().pad_token_id
    if pad is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the model's `vocab_size` is "
            f"{model.config.get_text_config().vocab_size:,}; they do not belong together."
        )
    return tokenizer


@torch.inference_mode()
def _logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, list], batch_size: int
) -> torch.Tensor:
    """`[N, L]`, in float32."""
    found = []
    count = len(inputs["input_ids"])
    with left_as_found(model):
        model.eval()
        for first in bar(range(0, count, batch_size), "Scoring texts"):
            part = {name: values[first : first + batch_size] for name, values in inputs.items()}
            batch = tokenizer.pad(part, return_tensors="pt").to(model.device)
            logits = model(**batch).logits.float().cpu()
            require_numbers(logits)
            found.append(logits)
    return torch.cat(found)


def _measured(
    logits: torch.Tensor, numbers: Sequence, problem_type: str
) -> tuple[dict[str, Metric], dict[str, torch.Tensor]]:
    """The metrics, and a number per text of those that are means."""
    labels = torch.tensor(numbers)
    others: dict[str, Callable[[np.ndarray, np.ndarray], float]]
    if problem_type == REGRESSION:
        predicted = logits[:, 0].double()
        scores = {"mse": (predicted - labels.double()) ** 2}
        arrays, others = (predicted.numpy(), labels.double().numpy()), {"pearson": pearson, "spearman": spearman}
    elif problem_type == SEVERAL:
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        right = ((logits > 0) == (labels > 0.5)).all(dim=-1)
        scores = {"exact_match": right.double(), "loss": losses.mean(dim=-1).double()}
        arrays, others = ((logits > 0).numpy(), (labels > 0.5).numpy()), {"micro_f1": micro_f1}
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
        scores = {"accuracy": (logits.argmax(dim=-1) == labels).double(), "loss": losses.double()}
        arrays, others = (logits.argmax(dim=-1).numpy(), labels.numpy()), {"f1": macro_f1}
    metrics = {name: mean_score(values) for name, values in scores.items()}
    metrics |= {
        name: Metric(float(np.asarray(measure(*arrays))), jackknife_error(measure, *arrays))
        for name, measure in others.items()
    }
    return metrics, scores
