"""What a recipe must be to be run, as far as its fields alone can tell; nothing is loaded, built or written.

What one task alone refuses it checks itself, and what only the model, the tokenizer or the data can tell.
"""

import dataclasses
import re
import typing

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from .fields import check_names, check_type
from .recipe_fields import TrainingRecipe
from .tasks import Task, find_task
from .tasks.task import COMMON, LOSS


# The least that the counts and weights of `TrainingArguments` may be.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "logging_steps": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "save_total_limit": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
}
POSITIVE = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")  # may be fractions, but not 0
# Of `TrainingArguments`: what would do nothing in a run, or something else than it says.
_OWN_PLACE = "a run goes on from its own last checkpoint by itself"
_OWN_PRECISION = (
    "it is not heeded while a model trains, and an evaluation after the last step would leave it in that precision; "
    "evaluate what was saved by `sas-hf eval --dtype`"
)
_OWN_SHARING = "what a run leaves is shared by `sas-hf export` and `hf upload`, with code and card"
REFUSED = {
    "resume_from_checkpoint": f"{_OWN_PLACE}; to start from another model, give it as `model.checkpoint`",
    "save_only_model": "a run could not go on from such checkpoints: optimizer and schedule would begin anew",
    "ignore_data_skip": f"{_OWN_PLACE}, and would train on its first data again",
    "restore_callback_states_from_checkpoint": _OWN_PLACE,
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint of every run",
    "fp16_full_eval": _OWN_PRECISION,
    "bf16_full_eval": _OWN_PRECISION,
    "dataloader_drop_last": "it would leave samples out of evaluations, too",
    "label_names": "a recipe's task decides what the labels are",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision"), _OWN_SHARING),
    **dict.fromkeys(("hub_always_push", "hub_token"), _OWN_SHARING),
}
# Which `TrainingArguments` keep for scripts alone.
FOR_SCRIPTS = ("do_train", "do_eval", "do_predict")
COSINE_WITH_FLOOR = SchedulerType.COSINE_WITH_MIN_LR.value


def check_recipe(recipe: TrainingRecipe, needs_data: bool = True) -> None:
    """
    Raise a ValueError, naming field, value and what would be right, for a recipe that cannot be run.

    Args:
        needs_data: `data.train` must be given, and what is evaluated on.
    """
    task = find_task(recipe.task)
    _check_model(recipe, task)
    _check_data(recipe, needs_data)
    _check_training_fields(recipe, task)
    _check_rates(recipe)
    _check_batch_size(recipe)
    _check_evaluation(recipe, task, needs_data)


def _check_model(recipe: TrainingRecipe, task: Task) -> None:
    model = recipe.model
    if (model.config is None) == (model.checkpoint is None):
        raise ValueError(
            f"`model.config` is {model.config!r} and `model.checkpoint` is {model.checkpoint!r}; give exactly one: "
            "the name of a configuration for a new model, or a checkpoint to go on from."
        )
    for name in ("revision", "conversion"):
        if getattr(model, name) is not None and model.checkpoint is None:
            raise ValueError(
                f"`model.{name}` is {getattr(model, name)!r}, of a checkpoint, but `model.checkpoint` is not given."
            )
    if model.config is not None and model.tokenizer is None and task.needs_tokenizer:
        raise ValueError("`model.tokenizer` is not given, and a new model has none; give a folder or a Hub id.")
    if model.lora is not None and model.trainable is not None:
        raise ValueError(
            "`model.lora` and `model.trainable` both say what is trained; give one (LoRA has `modules_to_save`)."
        )
    if model.trainable == []:
        raise ValueError("`model.trainable` is [], and nothing would be trained; give regular expressions, or null.")
    for pattern in model.trainable or []:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`model.trainable` has {pattern!r}, which is no regular expression: {error}.") from error


def _check_data(recipe: TrainingRecipe, needs_data: bool) -> None:
    data = recipe.data
    if needs_data and not data.train:
        raise ValueError("`data.train` is not given; name text files, parquet files or a Hub dataset.")
    if data.streaming and recipe.training.get("max_steps", -1) <= 0:
        raise ValueError("`data.streaming` is true, and a stream has no length; set `training.max_steps`.")


def _check_training_fields(recipe: TrainingRecipe, task: Task) -> None:
    training = recipe.training
    hints = typing.get_type_hints(TrainingArguments) | {"bf16": bool | typing.Literal["auto"]}
    known = [field.name for field in dataclasses.fields(TrainingArguments)]
    check_names(training, known, "training.", "no field of `TrainingArguments`")
    for name, value in training.items():
        check_type(f"training.{name}", value, hints[name])
    _check_numbers(training)
    if not training.get("output_dir"):
        raise ValueError("`training.output_dir` is not given; name the folder of this run.")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, reason in REFUSED.items():
        if name in training and training[name] != defaults[name]:
            raise ValueError(f"`training.{name}` is {training[name]!r}, but {reason}; leave it out.")
    for name in FOR_SCRIPTS:
        if name in training:
            raise ValueError(
                f"`training.{name}` is {training[name]!r}, but the Trainer does not look at it: a run trains, and "
                "evaluates as `training.eval_strategy` says; leave it out."
            )
    _check_task_fields(recipe, task)
    _check_optimizer(training)
    _check_best(training, task)


def _check_task_fields(recipe: TrainingRecipe, task: Task) -> None:
    """Fields that this task or kind of data would not heed."""
    training = recipe.training
    strategy = training.get("train_sampling_strategy", "random")
    if strategy != "random" and (recipe.data.streaming or (strategy != "sequential" and not task.varied_lengths)):
        why = "a stream comes in its own order" if recipe.data.streaming else "all its samples are of one length"
        raise ValueError(f"`training.train_sampling_strategy` is {strategy!r}, but {why}; leave it out.")
    if recipe.data.streaming and training.get("data_seed") is not None:
        raise ValueError(
            f"`training.data_seed` is {training['data_seed']}, but `training.seed` shuffles a stream; leave it out."
        )
    task.check_recipe(recipe)
    for where, part in (("model", recipe.model), ("data", recipe.data)):
        for field in dataclasses.fields(part):
            name, value = f"{where}.{field.name}", getattr(part, field.name)
            if name not in (*COMMON, *task.reads) and value != field.default:
                raise ValueError(f"`{name}` is {value!r}, but `task: {task.name}` does not look at it; leave it out.")


def _check_optimizer(training: dict) -> None:
    name = str(training.get("optim", TrainingArguments.optim))
    if training.get("optim_target_modules") and not name.startswith(("galore", "apollo")):
        raise ValueError(
            f"`training.optim_target_modules` is given, for GaLore and Apollo, but `training.optim` is {name}, which "
            "does not look at it; leave it out."
        )
    if training.get("optim_args") and name.startswith(("adamw_torch", "adamw_hf", "adafactor")):
        raise ValueError(
            f"`training.optim_args` is {training['optim_args']!r}, but {name} does not look at it; use the "
            "`training.adam_...` fields."
        )


def _check_best(training: dict, task: Task) -> None:
    metric, greater = training.get("metric_for_best_model"), training.get("greater_is_better")
    known = task.evaluated()
    name = (metric or LOSS.name).removeprefix("eval_")
    if name not in known:
        raise ValueError(
            f"`training.metric_for_best_model` is {metric!r}; an evaluation of this task has {', '.join(known)}."
        )
    if greater is not None and greater != known[name].higher_is_better:
        raise ValueError(
            f"`training.greater_is_better` is {str(greater).lower()}, which takes the worst {metric or name} for "
            "the best; leave it out."
        )
    if not training.get("load_best_model_at_end"):
        return
    strategy, evaluated = training.get("save_strategy", "steps"), training.get("eval_steps")
    evaluated, saved = evaluated or training.get("logging_steps", 500), training.get("save_steps", 500)
    if strategy == "steps" and training.get("eval_strategy") == "steps" and evaluated != saved:
        raise ValueError(
            f"`training.load_best_model_at_end` is true, but `training.eval_steps` is {evaluated} and "
            f"`training.save_steps` is {saved}, so that the best model may not be saved; let them be equal, or "
            "`training.save_strategy` be best."
        )


def _check_numbers(training: dict) -> None:
    for name, least in AT_LEAST.items():
        value = training.get(name)
        if value is not None and (value < least or (value == 0 and name in POSITIVE)):
            bound = "above" if name in POSITIVE else "at least"
            raise ValueError(f"`training.{name}` is {value}; it must be {bound} {least}.")
    steps = training.get("max_steps", -1)
    if steps < 1 and steps != -1:
        raise ValueError(f"`training.max_steps` is {steps}; it must be at least 1, or -1 to go by `num_train_epochs`.")


def _check_rates(recipe: TrainingRecipe) -> None:
    training = recipe.training
    rate = training.get("learning_rate", TrainingArguments.learning_rate)
    simulation, floor = recipe.simulation_learning_rate, recipe.minimum_learning_rate
    for name, value in {"training.learning_rate": rate, "simulation_learning_rate": simulation}.items():
        if value is not None and not 0 < value < 10:
            raise ValueError(f"`{name}` is {value}; it must be positive, usually between 1e-6 and 1e-2.")
    if floor is None:
        return
    if not 0 <= floor <= rate:
        raise ValueError(
            f"`minimum_learning_rate` is {floor}; it must be from 0 to `training.learning_rate` = {rate}."
        )
    if training.get("lr_scheduler_type", COSINE_WITH_FLOOR) != COSINE_WITH_FLOOR:
        raise ValueError(
            f"`minimum_learning_rate` is {floor}, the end of a cosine, but `training.lr_scheduler_type` is "
            f"{training['lr_scheduler_type']!r}; give one of them."
        )
    if training.get("lr_scheduler_kwargs"):
        raise ValueError(
            "`minimum_learning_rate` and `training.lr_scheduler_kwargs` both say how the rate ends; give one."
        )


def _check_batch_size(recipe: TrainingRecipe) -> None:
    if recipe.batch_size is None:
        return
    if recipe.training.get("auto_find_batch_size"):
        raise ValueError(
            f"`batch_size` is {recipe.batch_size}, but `training.auto_find_batch_size` makes it smaller where memory "
            "is short; set one of them to null (a smaller `training.per_device_train_batch_size` needs less, too)."
        )
    if (recipe.training.get("accelerator_config") or {}).get("split_batches"):
        raise ValueError(
            f"`batch_size` is {recipe.batch_size}, but `training.accelerator_config.split_batches` makes one device's "
            "batch that of all; leave it out."
        )
    if recipe.batch_size >= 1 and "gradient_accumulation_steps" in recipe.training:
        raise ValueError(
            f"`batch_size` is {recipe.batch_size}, from which the gradient accumulation follows, but "
            "`training.gradient_accumulation_steps` is given as well, by this recipe or one that it builds on; set "
            "one of them to null."
        )
    per_device = recipe.training.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
    if recipe.batch_size < 1 or recipe.batch_size % per_device:
        raise ValueError(
            f"`batch_size` is {recipe.batch_size}; it must be a multiple of `training.per_device_train_batch_size` = "
            f"{per_device}."
        )


def _check_evaluation(recipe: TrainingRecipe, task: Task, needs_data: bool) -> None:
    evaluation = recipe.evaluation
    if evaluation.steps < 1:
        raise ValueError(f"`evaluation.steps` is {evaluation.steps}; it must be at least 1.")
    if evaluation.limit is not None and evaluation.limit <= 0:
        raise ValueError(f"`evaluation.limit` is {evaluation.limit}; it must be positive.")
    if evaluation.tasks and not task.has_benchmarks:
        raise ValueError(f"`evaluation.tasks` is {evaluation.tasks}, benchmarks of language models; leave it empty.")
    evaluates = str(recipe.training.get("eval_strategy", "no")) != "no" or recipe.training.get("eval_on_start")
    if needs_data and evaluates and not task.is_validated(recipe):
        raise ValueError(
            "`training.eval_strategy` asks for evaluations, but there is nothing to evaluate on; give "
            "`data.validation`, `data.validation_split` or `data.validation_documents`."
        )
