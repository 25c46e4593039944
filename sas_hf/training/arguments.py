"""`TrainingArguments` from a recipe: what it leaves to the machine is decided here."""

import os

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_torch_bf16_gpu_available

from .recipe_checks import COSINE_WITH_FLOOR
from .recipe_fields import TrainingRecipe
from .tasks import find_task


def training_arguments(recipe: TrainingRecipe) -> TrainingArguments:
    """
    The arguments of the Trainer for this recipe on this machine: bf16 where the device has it, as much gradient
    accumulation as `batch_size` needs on this many devices, and the cosine with a floor.

    Raises:
        ValueError: for a batch that the devices cannot share evenly, a logger that is not installed, a precision
            that the device does not have, or a value that `TrainingArguments` refuses.
    """
    fields = {"report_to": "none"} | recipe.training
    if fields.get("bf16") == "auto":
        fields["bf16"] = not fields.get("use_cpu") and is_torch_bf16_gpu_available()
    if recipe.batch_size is not None:
        fields["gradient_accumulation_steps"] = _accumulation(recipe.batch_size, fields)
    if recipe.minimum_learning_rate is not None:
        fields["lr_scheduler_type"] = COSINE_WITH_FLOOR
        fields["lr_scheduler_kwargs"] = {"min_lr": recipe.minimum_learning_rate}
    if best := fields.get("metric_for_best_model"):  # the Trainer would go by the ending of its name
        metric = find_task(recipe.task).evaluated()[best.removeprefix("eval_")]
        fields["greater_is_better"] = metric.higher_is_better
    # The mean of an evaluation is of all batches, those that are no numbers included.
    fields.setdefault("logging_nan_inf_filter", False)
    fields.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    fields.setdefault("ddp_find_unused_parameters", False)  # every parameter that trains has a part in every loss
    _check_loggers(fields["report_to"])
    arguments = TrainingArguments(**fields)
    if arguments.fp16 and arguments.device.type == "cpu":
        raise ValueError(
            "`training.fp16` is true, but the device is a CPU, on which the Trainer computes nothing in float16; "
            "leave it out, or set `training.bf16`."
        )
    return arguments


def _accumulation(batch_size: int, fields: dict) -> int:
    per_device = fields.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
    if "WORLD_SIZE" in os.environ:  # one process per device, as accelerate and torchrun start them
        devices = int(os.environ["WORLD_SIZE"])
    else:
        devices = 1 if fields.get("use_cpu") else max(1, torch.cuda.device_count())
    if batch_size % (per_device * devices):
        raise ValueError(
            f"`batch_size` is {batch_size}; {devices} devices with `training.per_device_train_batch_size` = "
            f"{per_device} cannot share it evenly."
        )
    return batch_size // (per_device * devices)


def _check_loggers(names: str | list[str] | None) -> None:
    installed = get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names or []:
        if name not in ("none", "all", *installed):
            raise ValueError(
                f"`training.report_to` names {name!r}, which is not installed or unknown to Transformers; installed "
                f"are: {', '.join(installed) or 'none'}."
            )
