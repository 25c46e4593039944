"""A few real steps of a recipe, on random numbers of its shapes: what a step takes, and what it keeps in memory."""

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedConfig, TrainerCallback, default_data_collator
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..report.machine import available_memory
from .adapters import prepare_parameters
from .arguments import training_arguments
from .optimizer import RecipeTrainer
from .recipe_fields import TrainingRecipe
from .tasks import find_task


BUDGET = 20  # seconds of real steps for each line; what is longer by itself is one step
STEPS, MOST_STEPS, ENOUGH = 3, 30, 2  # that are timed, after one to warm up; short ones, until as many seconds
SPARE = 0.7  # the share of free memory that real steps may take
ROUNDS = 5  # in which the steps of several recipes are timed side by side
# Of `TrainingArguments`, what a few steps leave out. The rate is too small to lead anywhere.
REHEARSED = {
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "learning_rate": 1e-6,
    "warmup_steps": 0,
    "logging_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "report_to": "none",
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Pace:
    """
    What a few real steps took.

    Attributes:
        row: seconds of a row's forward and backward pass.
        optimiser: seconds of what a step does once.
        kept: bytes that a row keeps for its backward pass.
        rows, steps: that were timed.
    """

    row: float
    optimiser: float
    kept: int
    rows: int
    steps: int


def rehearse(recipe: TrainingRecipe, config: PreTrainedConfig, lengths: tuple[int, ...], rows: int) -> Pace:
    """
    A few real steps of a recipe on random numbers: of one row first, then of as many as fit into some seconds and into
    memory, at most `rows`.

    Raises:
        RuntimeError, FloatingPointError: where they fail.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = _run_steps(recipe, config, lengths, 1, 1)
        times, kept, timed = trainer.clock.times, trainer.kept or 0, 1
        free = available_memory(trainer.args.device)
        del trainer
        gc.collect()
        whole = sum(times[-1])
        fitting = rows if free is None else int(SPARE * free / max(1, kept))
        more = min(rows, fitting, int(BUDGET / (whole * (STEPS + 1))))
        if len(times) > 1 and more >= min(2, rows):
            steps = min(MOST_STEPS, max(STEPS, int(ENOUGH / (whole * more))))
            trainer = _run_steps(recipe, config, lengths, more, steps)
            times, kept, timed = trainer.clock.times, trainer.kept or 0, more
    times = times[1:] or times  # without the first, which warms up, unless that was long enough
    passes, optimiser = (sorted(part)[len(part) // 2] for part in zip(*times, strict=True))
    return Pace(passes / timed, optimiser, kept // timed, timed, len(times))


def steps_side_by_side(recipes: Sequence[TrainingRecipe]) -> list[float]:
    """
    Seconds of a step of each recipe, on samples as long as they may be: in rounds, in which all have their turn, so
    that whatever else the machine does hits all alike; medians.

    Raises:
        RuntimeError, FloatingPointError: as [`rehearse`].
    """
    parts = []
    for recipe in recipes:
        task = find_task(recipe.task)
        config = task.model_config(recipe)
        parts.append((recipe, config, task.longest(recipe, config), training_arguments(recipe)))
    times: list[list[float]] = [[] for _ in parts]
    for _ in range(ROUNDS):
        for (recipe, config, lengths, arguments), seconds in zip(parts, times, strict=True):
            pace = rehearse(recipe, config, lengths, arguments.train_batch_size)
            rows = arguments.train_batch_size * arguments.gradient_accumulation_steps
            seconds.append(pace.row * rows + pace.optimiser)
    return [statistics.median(seconds) for seconds in times]


def _run_steps(
    recipe: TrainingRecipe, config: PreTrainedConfig, lengths: tuple[int, ...], rows: int, steps: int
) -> "_Rehearsal":
    """A trainer that has made so many steps, and one before; fewer, but one, where these take too long."""
    task = find_task(recipe.task)
    with tempfile.TemporaryDirectory(prefix="sas_hf-steps-") as folder:
        fields = {"output_dir": folder, "per_device_train_batch_size": rows, "max_steps": steps + 1}
        short = replace(
            recipe,
            training=recipe.training | REHEARSED | fields,
            batch_size=None,
            minimum_learning_rate=None,
        )
        arguments = training_arguments(short)
        batch = task.random_batch(config, arguments.train_batch_size * arguments.world_size, lengths)
        assert batch is not None  # who rehearses has asked
        samples = [{name: values[place] for name, values in batch.items()} for place in range(len(batch["labels"]))]
        model = task.auto_class.from_config(config, dtype=torch.float32)
        trainer = _Rehearsal(
            prepare_parameters(model, recipe.model),
            arguments,
            train_dataset=samples * (steps + 1),
            data_collator=default_data_collator,
        )
        trainer.train()
        return trainer


class _Rehearsal(RecipeTrainer):
    """
    Attributes:
        clock: the times of its steps.
        kept: bytes that the first batch kept for its backward pass.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept: int | None = None
        self.clock = _Clock(self.args.device)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(self.clock)

    def compute_loss(self, *args, **kwargs):
        if self.kept is not None:
            return super().compute_loss(*args, **kwargs)
        with _weighing(
            {weight.untyped_storage().data_ptr() for weight in cast(torch.nn.Module, self.model).parameters()}
        ) as weighed:
            loss = super().compute_loss(*args, **kwargs)
        self.kept = sum(weighed.values())
        return loss


@contextmanager
def _weighing(but: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of all memory that is kept for the backward pass of what is computed within, by its place, `but` for some
    places."""
    weighed: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided:
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in but:
                weighed[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield weighed


class _Clock(TrainerCallback):
    """Seconds of each step: of its passes, and of the rest. Ends a training after the step that exceeds the budget."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[tuple[float, float]] = []
        self.until: float | None = None

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = self._now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.passed = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        now = self._now()
        self.times.append((self.passed - self.began, now - self.passed))
        self.until = self.until or self.began + BUDGET
        if now > self.until:
            control.should_training_stop = True
