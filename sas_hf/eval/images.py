"""`evaluate_images`: an image classifier and labelled images in; accuracy, top-5 accuracy and loss out."""

import re
import time
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..data.image_files import open_image
from ..data.images import find_split, load_image_dataset, undecoded
from ..data.labelled_text import labels_by_number
from ..hub.checkpoints import load_image_processor
from ..report.files import one_at_a_time
from ..report.progress import bar
from .arguments import check_arguments, check_output, number_of_samples
from .classifiers import find_scored, mean_score, require_head, require_numbers
from .models import left_as_found
from .results import EvaluationResult, TaskResult, digest, one_task_result


AUTO_BATCH_SIZE = 64


@one_at_a_time("output")
def evaluate_images(
    model: str | Path | PreTrainedModel,
    dataset: str | Path,
    *,
    split: str | None = None,
    image_processor: str | Path | BaseImageProcessor | None = None,
    limit: int | float | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    output: str | Path | None = None,
) -> EvaluationResult:
    """
    Score an image classifier. Code that a checkpoint brings along is never run.

    Args:
        model: a checkpoint's folder, a Hub id, or a live model, of any architecture with an image classification head.
        dataset: see [`~sas_hf.data.images.load_image_dataset`].
        split: `None`: "test", or else "validation".
        image_processor: the model's own where `None`: beside its weights.
        limit: how many images to score, or what share of them if below 1: of the split in an order shuffled with seed
            0, since many are sorted by class.
        batch_size: images at a time; "auto": 64.
        device: "cpu", "cuda", ...; `None`: the accelerator if there is one. Not for a live model.
        dtype: as in `from_pretrained`; `None`: what the checkpoint holds. Not for a live model.
        output: JSON file to write the result to.

    Returns:
        the metrics "accuracy", "top5_accuracy" (where there are more than five classes) and "loss" (mean
        cross-entropy), with their standard errors.

    Raises:
        ValueError: for a model without image classification head or processor, classes that are not the dataset's,
            an unknown split, or logits that are not numbers.
        FileNotFoundError: for a missing or empty folder.
        BlockingIOError: when another process evaluates to `output`.

    All but the last come before the first forward pass.
    """
    check_arguments(model, limit, batch_size, device, dtype)
    if output is not None:
        check_output(output)
    live = isinstance(model, PreTrainedModel)
    name = type(model).__name__ if live else str(model)
    if not live:
        remedy = "score a language model with `--tasks` or `--perplexity`, a classifier of texts with `--texts`"
        require_head(name, AutoModelForImageClassification, "image classifier", remedy)
    images = load_image_dataset(dataset)
    if split is not None and split not in images:
        raise ValueError(f"`split` is {split!r}; {dataset} has {', '.join(images)}.")
    split = split or find_split(images, "test", "validation")
    rows, available = images[split], len(images[split])
    check_labels(rows, split)
    if (count := number_of_samples(limit, available)) < available:
        rows = rows.shuffle(seed=0).select(range(count))

    of_head = (AutoModelForImageClassification, "ForImageClassification", "image classifier")
    scored, origin = find_scored(model, *of_head, dtype, device)
    if not isinstance(image_processor, BaseImageProcessor):
        image_processor = _load_processor(str(image_processor or origin))
    classes = torch.tensor(_class_numbers(scored.config, rows))

    start = time.perf_counter()
    size = min(AUTO_BATCH_SIZE if isinstance(batch_size, str) else batch_size, len(rows))
    scores = _score(scored, image_processor, rows, classes, size)
    task = TaskResult(
        metrics={key: mean_score(values) for key, values in scores.items()},
        num_samples=len(rows),
        num_available=available,
        split=split,
        data=str(dataset),
        num_fewshot=None,
        version=None,
        scores={key: values.tolist() for key, values in scores.items()},
        questions=digest([Path(dataset).name, split, *map(str, rows["label"])]),
    )
    return one_task_result(
        scored,
        "image_classification",
        task,
        name=name,
        limit=limit,
        requested=batch_size,
        size=size,
        start=start,
        library="datasets",
        output=output,
    )


def check_labels(rows: Dataset, split: str) -> None:
    """Raise a `ValueError` for images without label (-1, as test splits on the Hub have it)."""
    unlabelled = sum(label is None or label < 0 for label in rows["label"])
    if unlabelled:
        raise ValueError(
            f"{unlabelled} of {len(rows)} images of the split {split!r} have no label; take another `split`."
        )


def _load_processor(place: str) -> BaseImageProcessor:
    processor = load_image_processor(place, None) if place else None
    if processor is None:
        raise ValueError(f"There is no image processor in {place!r}; pass one as `image_processor`.")
    return processor


def _class_numbers(config: PreTrainedConfig, rows: Dataset) -> list[int]:
    """The model's number of each class of the dataset: by name, or by position where either side has no names."""
    names = rows.features["label"].names
    if config.problem_type in ("regression", "multi_label_classification") or (config.num_labels or 0) < 2:
        raise ValueError(
            f"The model has `problem_type` {config.problem_type!r} and {config.num_labels} labels; the accuracies are "
            "those of one class among several."
        )
    numbers: dict[str, list[int]] = {}
    for number, label in sorted(labels_by_number(config).items()):
        numbers.setdefault(label, []).append(number)
    if all(name in numbers for name in names):
        for name in names:
            if len(numbers[name]) > 1:
                raise ValueError(
                    f"The model has {len(numbers[name])} classes named {name!r} (`id2label`: {numbers[name]}), and "
                    "the dataset has one; tell them apart in both."
                )
        return [numbers[name][0] for name in names]
    numerals = all(name.isdecimal() for name in names)
    if numerals and [int(name) for name in names] != sorted({int(name) for name in names}):
        raise ValueError(
            f"The dataset's classes are numbers in another order ({', '.join(names[:5])}, ...), and the model does "
            "not know them by name; write them with as many digits each (00, 01, ...), or name them in `id2label`."
        )
    nameless = numerals or all(re.fullmatch(r"LABEL_\d+", name) for name in numbers)
    if nameless and len(names) == config.num_labels:
        return list(range(len(names)))
    unknown = [name for name in names if name not in numbers]
    raise ValueError(
        f"The dataset has {len(names)} classes and the model {config.num_labels}; the model does not know "
        f"{', '.join(unknown[:5])}. It knows {', '.join(list(numbers)[:5])}, ..."
    )


@torch.inference_mode()
def _score(
    model: PreTrainedModel, processor: BaseImageProcessor, rows: Dataset, classes: torch.Tensor, batch_size: int
) -> dict[str, torch.Tensor]:
    """Per image: 1 or 0 for the accuracies, and the loss."""
    channels = getattr(model.config, "num_channels", 3)

    def collate(batch: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        images = [open_image(row["image"], channels) for row in batch]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return pixels, classes[[row["label"] for row in batch]]

    scores: dict[str, list[torch.Tensor]] = {"accuracy": [], "top5_accuracy": [], "loss": []}
    with left_as_found(model):
        model.eval()
        for pixels, labels in bar(DataLoader(undecoded(rows), batch_size, collate_fn=collate), "Scoring images"):
            logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits.float().cpu()
            require_numbers(logits)
            hits = logits.argsort(dim=-1, descending=True) == labels[:, None]
            scores["accuracy"].append(hits[:, 0].double())
            scores["top5_accuracy"].append(hits[:, :5].any(dim=-1).double())
            scores["loss"].append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").double())
    if len(labels_by_number(model.config)) <= 5:
        del scores["top5_accuracy"]
    return {name: torch.cat(values) for name, values in scores.items()}
