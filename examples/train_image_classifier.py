r"""Train or fine-tune an image classifier with the stock Trainer: any attention of the package, any labelled images.

    python examples/train_image_classifier.py --dataset FOLDER_OR_HUB_ID --model mnist-super --output_dir runs/super \
        --learning_rate 1e-3 --num_train_epochs 10 --per_device_train_batch_size 64

`--model` is a named configuration ("mnist-standard", "cifar100-sas", ...; see `sas-hf info`), which starts anew, or a
checkpoint, such as a converted ViT, which is fine-tuned. Every option of `TrainingArguments` may be given; its
defaults, a learning rate of 5e-5 above all, are made for fine-tuning. Run again after an interruption: it goes on from
its last checkpoint (to the same weights without `--augment`; the random numbers of a batch that was prepared ahead are
not kept).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from sas_hf import SASViTConfig, SASViTForImageClassification, named_config
from sas_hf.cli import explain_errors
from sas_hf.configurations import NAMED_CONFIGS
from sas_hf.files import write_atomically
from sas_hf.image_data import find_split, load_image_dataset
from sas_hf.image_files import with_channels
from sas_hf.modeling.image_processing_sas_vit import SASViTImageProcessor


@dataclass
class ImageArguments:
    dataset: str = field(metadata={"help": "Folder of images, folder of IDX files, or Hub id."})
    model: str = field(metadata={"help": "Named configuration, checkpoint folder or Hub id."})
    class_names: str | None = field(default=None, metadata={"help": "Names of the classes, separated by commas."})
    augment: bool = field(default=True, metadata={"help": "Flip and shift the training images at random."})
    max_train_samples: int | None = field(default=None, metadata={"help": "For trying out."})


def load_model(name: str, labels: list[str]):
    """A model for these classes, and the image processor that belongs to it."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
    if name not in NAMED_CONFIGS and (Path(name).is_dir() or "/" in name):
        model = AutoModelForImageClassification.from_pretrained(name, **names, ignore_mismatched_sizes=True)
        return model, AutoImageProcessor.from_pretrained(name)
    config = named_config(name, num_labels=len(labels), **names)
    if not isinstance(config, SASViTConfig):
        raise ValueError(f"`model` is {name!r}, which is no image classifier.")
    height, width = config.image_shape
    size = {"height": height, "width": width}
    return SASViTForImageClassification(config), SASViTImageProcessor(num_channels=config.num_channels, size=size)


def shift_and_flip(image: Image.Image) -> Image.Image:
    """Shifted by up to a sixteenth of its size, black where nothing was, and mirrored half of the time."""
    right, down = (int(torch.randint(-(side // 16), side // 16 + 1, ())) for side in image.size)
    image = image.transform(image.size, Image.Transform.AFFINE, (1, 0, -right, 0, 1, -down))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image


def transform(processor, num_channels: int, augment: bool):
    """What makes model inputs of a batch of rows when they are read; `datasets` calls it."""

    def inputs(rows: dict) -> dict:
        images = [with_channels(image, num_channels) for image in rows["image"]]
        images = [shift_and_flip(image) for image in images] if augment else images
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": rows["label"]}

    return inputs


def accuracies(prediction) -> dict[str, float]:
    """Share of images whose class has the highest logit, and one of the five highest."""
    order = np.argsort(-prediction.predictions, axis=-1)
    hits = order == prediction.label_ids[:, None]
    return {"accuracy": hits[:, 0].mean(), "top5_accuracy": hits[:, :5].any(axis=-1).mean()}


@explain_errors
def main() -> None:
    arguments, training = HfArgumentParser((ImageArguments, TrainingArguments)).parse_args_into_dataclasses()
    training.remove_unused_columns = False  # the images, which become the inputs when they are read
    set_seed(training.seed)
    names = arguments.class_names.split(",") if arguments.class_names else None
    dataset = load_image_dataset(arguments.dataset, names)
    train, test = find_split(dataset, "train"), find_split(dataset, "validation", "test")
    model, processor = load_model(arguments.model, dataset[train].features["label"].names)
    if arguments.max_train_samples is not None:
        dataset[train] = dataset[train].select(range(min(arguments.max_train_samples, len(dataset[train]))))

    channels = getattr(model.config, "num_channels", 3)
    trainer = Trainer(
        model,
        training,
        train_dataset=dataset[train].with_transform(transform(processor, channels, arguments.augment)),
        eval_dataset=dataset[test].with_transform(transform(processor, channels, augment=False)),
        processing_class=processor,
        compute_metrics=accuracies,
    )
    output = Path(training.output_dir)
    last = get_last_checkpoint(output) if output.is_dir() else None
    if last is not None:
        print(f"Going on from {last}; for a new run choose another --output_dir.")
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    metrics = trainer.evaluate() | {"evaluated_split": test, "parameters": model.num_parameters()}
    result = {"model": arguments.model, "seed": training.seed, **metrics, "history": trainer.state.log_history}
    if trainer.is_world_process_zero():
        write_atomically(output / "result.json", json.dumps(result, indent=2).encode())
        print(
            f"{test}: accuracy {metrics['eval_accuracy']:.4f}, top-5 {metrics['eval_top5_accuracy']:.4f}, "
            f"loss {metrics['eval_loss']:.4f}; saved in {output}"
        )


if __name__ == "__main__":
    main()
