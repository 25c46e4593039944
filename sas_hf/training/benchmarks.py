"""Benchmarks of the model at hand while it is trained, through `sas_hf.eval`."""

from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from .folders import output_folder
from .recipe_fields import EvaluationRecipe
from .reporting import TrainingLog


# Of the numbers' names, in logs and results.
PREFIX = "benchmark/"


def check_benchmarks(recipe: EvaluationRecipe) -> None:
    """
    Raises:
        ImportError: without the packages of the evaluation.
        ValueError: for a task that there is not (with the nearest known one).
        FileNotFoundError: where there is no folder `data`.
    """
    if not recipe.tasks:
        return
    try:
        from ..eval.task_loading import check_task_names
    except ImportError as error:
        raise ImportError(
            f'`evaluation.tasks` needs the extra "eval" ({error}): pip install "sas_hf[eval]"'
        ) from error
    check_task_names(recipe.tasks)
    if recipe.data is not None and not Path(recipe.data).is_dir():
        raise FileNotFoundError(f"`evaluation.data` is {recipe.data!r}: there is no such folder.")


def known_scores(recipe: EvaluationRecipe) -> dict[str, bool]:
    """
    By name, the scores that the benchmarks of a recipe are sure to log, and whether higher is better: the suites'
    columns and averages, and those of plain multiple-choice tasks. Raises as [`check_benchmarks`].
    """
    check_benchmarks(recipe)
    if not recipe.tasks:
        return {}
    from ..eval.task_loading import known_metrics

    found = known_metrics(recipe.tasks)
    return {f"{PREFIX}{place}/{name}": higher for place in found for name, higher in found[place].items()}


class Benchmarks(TrainerCallback):
    """
    Scores the live model every `recipe.steps` steps and at the end, and logs accuracies as
    `benchmark/<suite or task>/<column or metric>`; whole results go to `benchmarks/step-<n>.json` in the output
    folder, for `sas-hf eval-report` (`step-<n>-2.json`, ... where suites share tasks, as one with examples and one
    without do). The training goes on as if there had been no evaluation.

    Questions longer than the model's context are cut from the left, and counted in the result. Several processes share
    the questions; of a sharded model each scores all, as every process is needed for every batch.
    """

    def __init__(
        self, recipe: EvaluationRecipe, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, log: TrainingLog
    ):
        self.recipe, self.trainer, self.tokenizer, self.log = recipe, trainer, tokenizer, log

    def rehearse(self) -> None:
        """One question of each task, so that missing data shows before the first thousand steps."""
        self._evaluate(limit=1)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.recipe.steps and state.global_step != state.max_steps:
            return
        self.log.pause()
        found = self.score(state.global_step)
        logs_loss = control.should_log
        self.trainer.log(found)
        control.should_log = logs_loss  # which every log takes for done

    def score(self, step: int) -> dict[str, float]:
        """Of the model at hand, which is that of this step; the whole result is saved."""
        found: dict[str, float] = {}
        for number, result in enumerate(self._evaluate(self.recipe.limit), 1):
            if result is not None:  # in the first process
                result.step = step
                name = f"step-{step}.json" if number == 1 else f"step-{step}-{number}.json"
                result.save(output_folder(self.trainer.args) / "benchmarks" / name)
                found |= scores(result)
        (found,) = broadcast_object_list([found])
        return found

    def _evaluate(self, limit: float | None) -> list:
        from ..eval import evaluate
        from ..eval.task_loading import without_repeats

        shared, data = has_whole_copies(self.trainer), self.recipe.data
        model = cast(PreTrainedModel, self.trainer.model)
        options: dict[str, Any] = {"tokenizer": self.tokenizer, "data": data, "limit": limit, "truncation": True}
        return [evaluate(model, names, shared=shared, **options) for names in without_repeats(self.recipe.tasks)]


def has_whole_copies(trainer: Trainer) -> bool:
    """Whether each of several processes holds all of the model, as under DDP."""
    if trainer.args.world_size == 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    return not any(isinstance(weight, DTensor) for weight in cast(torch.nn.Module, trainer.model).parameters())


def scores(result) -> dict[str, float]:
    """Of an `EvaluationResult`: each suite's columns and average, and the metrics of tasks outside suites."""
    found, inside = {}, set()
    for name, suite in result.suites.items():
        found[f"{name}/average"] = suite.average.value
        for label, column in suite.columns.items():
            found[f"{name}/{label}"] = column.score.value
            inside |= set(column.tasks)
    for name, task in result.tasks.items():
        if name not in inside:
            found |= {f"{name}/{metric}": score.value for metric, score in task.metrics.items()}
    return {f"{PREFIX}{name}": value for name, value in found.items()}
