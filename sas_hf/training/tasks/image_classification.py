"""Training or fine-tuning an image classifier: any attention of the package, any labelled images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedConfig,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ...data.image_files import open_image
from ...data.images import find_split, load_image_dataset, undecoded
from ...modeling.image_processing_sas_vit import SASViTImageProcessor
from ..adapters import prepare_parameters
from ..base import starting_model
from ..optimizer import RecipeTrainer
from ..recipe_fields import DataRecipe, ModelRecipe, TrainingRecipe
from .classification import chance, check_classifier_recipe, check_head_trains, classifier_config
from .task import LOSS, Metric, Samples, Task


class ImageClassification(Task):
    name = "image_classification"
    auto_class = AutoModelForImageClassification
    metrics = (
        Metric("accuracy", "validation accuracy", higher_is_better=True, chance=chance),
        Metric("top5_accuracy", "top-5 accuracy", higher_is_better=True, chance=lambda n: min(1.0, 5 / n)),
        LOSS,
    )
    reads = ("data.validation_split", "data.split", "data.class_names", "data.augment")

    def check_recipe(self, recipe: TrainingRecipe) -> None:
        check_classifier_recipe(recipe)
        if recipe.training.get("remove_unused_columns"):
            raise ValueError(
                "`training.remove_unused_columns` is true, but the inputs are made of them; leave it out."
            )

    def is_validated(self, recipe: TrainingRecipe) -> bool:
        return True  # a split "validation" or "test" is found by itself

    def read_samples(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> Samples:
        train, _ = load_splits(recipe.data)
        return Samples(len(train), fields={"num_labels": len(train.features["label"].names)})

    def longest(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> tuple[int, ...]:
        return ()

    def random_batch(self, config: PreTrainedConfig, rows: int, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        images = torch.rand(rows, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": images, "labels": torch.randint(config.num_labels or 0, (rows,))}

    def make_trainer(
        self, recipe: TrainingRecipe, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
    ) -> RecipeTrainer:
        return make_image_trainer(recipe, arguments, callbacks)


def make_image_trainer(
    recipe: TrainingRecipe, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
) -> RecipeTrainer:
    """
    What trains the recipe's image classifier, new or from a checkpoint, and evaluates accuracy and top-5 accuracy.

    A killed run goes on to the same weights without `data.augment`; with it, the random numbers of a batch that
    was prepared ahead are not kept.

    Args:
        arguments: `seed` decides a new model's weights too; `remove_unused_columns` becomes `False`.

    Raises:
        FileNotFoundError: for images or a checkpoint that are not there.
        ValueError: for a model that is no image classifier, an unknown name, data without classes or splits; and
            as [`prepare_parameters`].
    """
    train, validation = load_splits(recipe.data)
    labels = train.features["label"].names
    config, new_head = classifier_config(recipe.model, labels, AutoModelForImageClassification, "images")
    if (ours := list((config.id2label or {}).values())) != labels and sorted(ours) == sorted(labels):
        train = train.align_labels_with_mapping(config.label2id, "label")
        validation = validation.align_labels_with_mapping(config.label2id, "label")
    processor = classifier_processor(recipe.model, config)
    model = starting_model(AutoModelForImageClassification, recipe.model, config, arguments, processor, new_head)
    adapted = prepare_parameters(model, recipe.model)
    if new_head:
        check_head_trains(adapted, recipe.model)
    channels = getattr(model.config, "num_channels", 3)
    arguments.remove_unused_columns = False  # the images, which become the inputs when they are read
    return RecipeTrainer(
        adapted,
        arguments,
        train_dataset=train.with_transform(inputs_of(processor, channels, recipe.data.augment)),
        eval_dataset=validation.with_transform(inputs_of(processor, channels, augment=False)),
        processing_class=processor,
        compute_metrics=accuracies,
        callbacks=list(callbacks),
    )


def load_splits(data: DataRecipe) -> tuple[Dataset, Dataset]:
    """Images to train on and images to evaluate on: split "validation" or "test" where the recipe names none."""
    if not isinstance(data.train, str) or isinstance(data.validation, list):
        raise ValueError(f"`data.train` is {data.train!r}; for images it must be one folder or Hub id.")
    dataset = load_image_dataset(data.train, data.class_names)
    held_out = load_image_dataset(data.validation, data.class_names) if data.validation else dataset
    wanted = [data.validation_split] if data.validation_split else ["validation", "test"]
    split, held_out_split = find_split(dataset, data.split), find_split(held_out, *wanted)
    train, validation = dataset[split], held_out[held_out_split]
    if split == held_out_split and _same_source(data.train, data.validation or data.train):
        raise ValueError(
            f"The split {split!r} of {data.train} is both trained and validated on; name another in "
            "`data.validation_split`, or other images in `data.validation`."
        )
    if train.features["label"].names != validation.features["label"].names:
        raise ValueError(
            f"`data.validation` has the classes {validation.features['label'].names}, but `data.train` has "
            f"{train.features['label'].names}."
        )
    return undecoded(train), undecoded(validation)


def _same_source(first: str, second: str) -> bool:
    folders = [Path(name).expanduser() for name in (first, second)]
    return first == second or (all(map(Path.is_dir, folders)) and folders[0].samefile(folders[1]))


def classifier_processor(recipe: ModelRecipe, config: PreTrainedConfig) -> BaseImageProcessor:
    """The image processor of the checkpoint, or one that belongs to a new model of this configuration."""
    if recipe.checkpoint is not None:
        return AutoImageProcessor.from_pretrained(recipe.checkpoint, revision=recipe.revision, trust_remote_code=False)
    height, width = config.image_shape
    return SASViTImageProcessor(num_channels=config.num_channels, size={"height": height, "width": width})


def inputs_of(processor: BaseImageProcessor, num_channels: int, augment: bool) -> Callable[[dict], dict]:
    """What makes model inputs of a batch of rows when they are read; `datasets` calls it."""

    def inputs(rows: dict) -> dict:
        images = [open_image(image, num_channels) for image in rows["image"]]
        images = [shift_and_flip(image) for image in images] if augment else images
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": rows["label"]}

    return inputs


def shift_and_flip(image: Image.Image) -> Image.Image:
    """Shifted by up to a sixteenth of its size, black where nothing was, and mirrored half of the time."""
    right, down = (int(torch.randint(-(side // 16), side // 16 + 1, ())) for side in image.size)
    image = image.transform(image.size, Image.Transform.AFFINE, (1, 0, -right, 0, 1, -down))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image


def accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose class has the highest logit, and one of the five highest."""
    logits, labels = cast(np.ndarray, prediction.predictions), cast(np.ndarray, prediction.label_ids)
    hits = np.argsort(-logits, axis=-1) == labels[:, None]
    return {"accuracy": hits[:, 0].mean(), "top5_accuracy": hits[:, :5].any(axis=-1).mean()}
