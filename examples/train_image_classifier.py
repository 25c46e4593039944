r"""Train or fine-tune an image classifier from one command line: any attention of the package, any labelled images.

    python examples/train_image_classifier.py --dataset FOLDER_OR_HUB_ID --model mnist-super --output_dir runs/super \
        --learning_rate 1e-3 --num_train_epochs 10 --per_device_train_batch_size 64

`--model` is a named configuration ("mnist-standard", "cifar100-sas", ...; see `sas-hf info`), which starts anew, or a
checkpoint, such as a converted ViT, which is fine-tuned. Every option of `TrainingArguments` may be given; its
defaults, a learning rate of 5e-5 above all, are made for fine-tuning. Run again after an interruption: it goes on from
its last checkpoint. For a run as one file, see `sas_hf/training/recipes/image-classification.yaml`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments

from sas_hf.cli import explain_errors
from sas_hf.configurations import NAMED_CONFIGS
from sas_hf.report import write_atomically
from sas_hf.training.recipe import DataRecipe, ModelRecipe, TrainingRecipe
from sas_hf.training.tasks import find_task


@dataclass
class ImageArguments:
    dataset: str = field(metadata={"help": "Folder of images, folder of IDX files, or Hub id."})
    model: str = field(metadata={"help": "Named configuration, checkpoint folder or Hub id."})
    class_names: str | None = field(default=None, metadata={"help": "Names of the classes, separated by commas."})
    augment: bool = field(default=True, metadata={"help": "Flip and shift the training images at random."})


@explain_errors
def main() -> None:
    arguments, training = HfArgumentParser((ImageArguments, TrainingArguments)).parse_args_into_dataclasses()
    name, names = arguments.model, arguments.class_names
    is_checkpoint = name not in NAMED_CONFIGS and (Path(name).is_dir() or "/" in name)
    recipe = TrainingRecipe(
        task="image_classification",
        model=ModelRecipe(checkpoint=name) if is_checkpoint else ModelRecipe(config=name),
        data=DataRecipe(
            train=arguments.dataset, class_names=names.split(",") if names else None, augment=arguments.augment
        ),
    )
    trainer = find_task("image_classification").make_trainer(recipe, training)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    metrics = trainer.evaluate() | {"parameters": trainer.model.num_parameters()}
    result = {"model": name, "seed": training.seed, **metrics, "history": trainer.state.log_history}
    if trainer.is_world_process_zero():
        output = Path(training.output_dir)
        write_atomically(output / "result.json", json.dumps(result, indent=2).encode())
        print(
            f"accuracy {metrics['eval_accuracy']:.4f}, top-5 {metrics['eval_top5_accuracy']:.4f}, "
            f"loss {metrics['eval_loss']:.4f}; saved in {output}"
        )


if __name__ == "__main__":
    main()
