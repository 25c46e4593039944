"""What a grid of trainings will take, before it is begun: counted on the meta device, timed by a few real steps."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedConfig, TrainingArguments

from ..report.machine import available_memory, total_memory
from ..report.quantities import count_text, memory_text, operations_text, time_text
from ..report.tables import Grid
from .arguments import training_arguments
from .recipe_fields import TrainingRecipe
from .rehearsal import SPARE, Pace, rehearse
from .sizes import (
    Memory,
    check_fits,
    count_operations,
    count_parameters,
    memory_needed,
    meta_model,
)
from .study import Run
from .tasks import Task, find_task
from .tasks.task import Samples


@dataclass(frozen=True)
class Estimate:
    """
    One variant on one data set.

    Attributes:
        model: name of the configuration, or checkpoint; with `changed`, some of its fields are others.
        runs: seeds, and those that try its learning rates.
        parameters, trained: of the model.
        rows: of a step, over all devices.
        length: tokens of each sample; `None` where they differ, or there are none.
        steps, samples: of a run; `None` where unknown.
        operations: of a run's forward and backward passes.
        memory: of one device.
        seconds: of a run's steps.
        unknown: what is not known, and why.
    """

    variant: str
    data: str
    model: str
    changed: bool
    runs: int
    parameters: int
    trained: int
    rows: int
    length: int | None
    steps: int | None
    samples: int | None
    operations: int | None
    memory: Memory
    pace: Pace | None
    seconds: float | None
    unknown: tuple[str, ...]

    @property
    def tokens(self) -> int | None:
        """Of a run, where every sample has as many."""
        return None if self.length is None or self.samples is None else self.length * self.samples


@dataclass(frozen=True)
class Estimates:
    """Of a grid: a line for each variant and data set."""

    lines: list[Estimate]

    @property
    def operations(self) -> int | None:
        """Of all runs; `None` where those of one are not known."""
        total = _total((line.operations, line.runs) for line in self.lines)
        return None if total is None else int(total)

    @property
    def seconds(self) -> float | None:
        """Of all runs, one after another."""
        return _total((line.seconds, line.runs) for line in self.lines)

    def grid(self) -> Grid:
        """A table of 80 columns; "?" is not known, and the caption says why."""
        counts_tokens = all(line.length is not None for line in self.lines)
        header = ["variant", "data", "model", "parameters", "tokens" if counts_tokens else "samples"]
        header += ["steps", "operations", "memory", "time", "runs"]
        rows, runs = [], sum(line.runs for line in self.lines)
        for line in self.lines:
            seen = line.tokens if counts_tokens else line.samples
            known = "" if line.memory.kept is not None else "> "
            rows.append(
                [
                    line.variant,
                    line.data,
                    line.model + ("*" if line.changed else ""),
                    count_text(line.parameters),
                    _text(count_text, seen),
                    _text(lambda steps: f"{steps:,}", line.steps),
                    _text(operations_text, line.operations),
                    known + memory_text(line.memory.sure + (line.memory.kept or 0)),
                    _text(time_text, line.seconds),
                    str(line.runs),
                ]
            )
        if runs > 1:
            total = [f"all {runs}", "", "", "", "", "", _text(operations_text, self.operations), ""]
            rows.append([*total, _text(time_text, self.seconds), ""])
        if not any(line.data for line in self.lines):
            header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
        return Grid(
            "What it will take", header, rows, self._caption(), text_columns=header.index("parameters"), compact=True
        )

    def _caption(self) -> str:
        parts = []
        if any(line.changed for line in self.lines):
            parts.append("*: with other fields")
        parts.append(
            "operations: products of forward and backward passes, attention in whole squares, nothing computed twice"
        )
        paces = [line.pace for line in self.lines if line.pace is not None]
        if paces:
            parts.append(
                "times: of steps alone, without evaluations, checkpoints and reading, by "
                f"{_range('step', (pace.steps for pace in paces))} of {_range('row', (pace.rows for pace in paces))} "
                "here and now"
            )
        parts.append(
            "memory: weights, gradients, AdamW's moments" + (" and what a backward pass needs" if paces else "")
        )
        reasons: dict[str, list[str]] = {}
        for line in self.lines:
            for reason in line.unknown:
                reasons.setdefault(reason, []).append(", ".join(filter(None, (line.data, line.variant))))
        parts += [
            reason if len(names) == len(self.lines) else f"{reason} ({'; '.join(names)})"
            for reason, names in reasons.items()
        ]
        return ". ".join(part[0].upper() + part[1:] if part[0] != "*" else part for part in parts) + "."


def estimate(runs: Sequence[Run], progress: Callable[[str], None] = lambda message: None) -> Estimates:
    """
    What these runs will take. Nothing is written but to the caches of `datasets`, where the number or the lengths of
    samples have to be read.

    A few real steps are made on the device that the Trainer would use, on random numbers of the recipe's shapes:
    forward and backward passes of as many rows as fit into some seconds, and the optimiser's step. A model that the
    machine cannot hold is counted, but not timed.

    Args:
        runs: of [`plan_runs`]; data may be missing (`needs_data=False`).
        progress: is told of each variant.

    Raises:
        ValueError, FileNotFoundError: for a model that there is not, data that cannot be trained on, or arguments that
            this machine cannot heed.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.variant, run.data), []).append(run)
    known: dict[str, Samples | str] = {}
    return Estimates([_estimate(group, known, progress) for group in groups.values()])


def check_memory(runs: Sequence[Run]) -> None:
    """Raise a ValueError, before anything is built, for a model whose weights, gradients and moments alone are more
    than this machine holds."""
    for group in {(run.variant, run.data): run for run in runs}.values():
        check_fits(group.recipe, training_arguments(group.recipe))


def _estimate(group: list[Run], known: dict[str, Samples | str], progress: Callable[[str], None]) -> Estimate:
    run = group[0]
    recipe, task = run.recipe, find_task(run.recipe.task)
    arguments, config = training_arguments(recipe), task.model_config(recipe)
    unknown = []
    if run.timing is not None:
        unknown.append("steps: until they can be timed, those of the variant that is matched by seconds")
    samples: Samples | None = None
    fixed = task.tokens_per_sequence(recipe)
    if arguments.max_steps <= 0 or (fixed is None and task.varied_lengths):
        found = _samples(task, recipe, config, known, progress)
        if isinstance(found, str):
            unknown.append(found)
        else:
            samples = found
    for name, value in (samples.fields if samples else {}).items():
        setattr(config, name, value)
    longest, micro = task.longest(recipe, config), arguments.train_batch_size
    lengths = longest
    if fixed is None and samples is not None and samples.lengths:
        lengths = padded_lengths(samples.lengths, micro, recipe.training.get("train_sampling_strategy"))
    elif fixed is None and task.varied_lengths:
        unknown.append(f"lengths of samples are not known: all are taken to have {max(longest)} tokens")

    model = meta_model(recipe, config)
    parameters, trained = count_parameters(model)
    rows = micro * arguments.gradient_accumulation_steps * arguments.world_size
    steps = count_steps(arguments, None if samples is None else samples.count)
    seen = None
    if steps is not None and arguments.max_steps > 0:
        seen = steps * rows
    elif samples is not None:
        seen = round(arguments.num_train_epochs * samples.count)
    operations = None
    batch = task.random_batch(config, micro, lengths)
    if batch is None:
        unknown.append(f"operations and time: the task {task.name} does not tell what a batch of it is")
    else:
        try:
            operations = count_operations(model, batch) / micro
        except ValueError as error:
            unknown.append(f"operations: {error}")
    memory = memory_needed(model, arguments)
    del model

    pace = None
    if batch is not None:
        lacking = _lack(memory, arguments)
        if lacking is None:
            progress(f"{', '.join(filter(None, (run.data, run.variant)))}: real steps")
            try:
                pace = rehearse(recipe, config, lengths, micro)
            except (RuntimeError, MemoryError, FloatingPointError) as error:
                lacking = f"real steps failed: {str(error).partition(chr(10))[0]}"
        if lacking is not None:
            unknown.append(f"time not measured: {lacking}")
    if pace is not None:
        memory = replace(memory, kept=pace.kept * micro)
    seconds = None
    if pace is not None and steps is not None and seen is not None:
        seconds = seen / arguments.world_size * pace.row + steps * pace.optimiser
    return Estimate(
        variant=run.variant,
        data=run.data,
        model=recipe.model.config or cast(str, recipe.model.checkpoint),
        changed=bool(recipe.model.overrides),
        runs=len(group),
        parameters=parameters,
        trained=trained,
        rows=rows,
        length=fixed,
        steps=steps,
        samples=seen,
        operations=None if operations is None or seen is None else round(operations * seen),
        memory=memory,
        pace=pace,
        seconds=seconds,
        unknown=tuple(unknown),
    )


def _samples(
    task: Task,
    recipe: TrainingRecipe,
    config: PreTrainedConfig,
    known: dict[str, Samples | str],
    progress: Callable[[str], None],
) -> Samples | str:
    """Those of the recipe's data, or why they are not known."""
    if not recipe.data.train:
        return "unknown: data.train is not given"
    model = replace(recipe.model, config=None, overrides={}, lora=None, trainable=None)
    key = repr(
        (recipe.data, model, config.get_text_config().to_dict().get("vocab_size"), task.longest(recipe, config))
    )
    if key not in known:
        progress(f"reading {recipe.data.train}")
        found: Samples | str | None
        try:
            found = task.read_samples(recipe, config)
        except FileNotFoundError as error:
            found = f"unknown: {error}".rstrip(".")
        known[key] = found or f"unknown: the task {task.name} does not tell how many samples there are"
    return known[key]


def count_steps(arguments: TrainingArguments, samples: int | None) -> int | None:
    """Of a run, as the Trainer counts them; `None` where epochs are of unknown length."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    if samples is None:
        return None
    batches = math.ceil(math.ceil(samples / arguments.train_batch_size) / arguments.world_size)
    in_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * in_epoch)


def padded_lengths(lengths: list[tuple[int, ...]], rows: int, strategy: str | None) -> tuple[int, ...]:
    """
    To what length a batch is padded, on the mean: of each side.

    Args:
        strategy: `train_sampling_strategy`, of which "group_by_length" puts samples of like lengths together.
    """
    order = sorted(lengths) if strategy == "group_by_length" else random.Random(0).sample(lengths, len(lengths))
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    longest = [[max(side) for side in zip(*batch, strict=True)] for batch in batches]
    return tuple(math.ceil(sum(side) / len(longest)) for side in zip(*longest, strict=True))


def _lack(memory: Memory, arguments: TrainingArguments) -> str | None:
    """Why no real steps are made, if there is not the memory for them."""
    for holds, where in (
        (total_memory(arguments.device), "this machine has {}"),
        (available_memory(arguments.device), "{} are free"),
    ):
        share = 1.0 if where.startswith("this") else SPARE
        if holds is not None and memory.sure > share * holds:
            return f"needs {memory_text(memory.sure)}, {where.format(memory_text(holds))}"
    return None


def _total(parts: Iterator[tuple[float | None, int]]) -> float | None:
    total: float = 0
    for value, count in parts:
        if value is None:
            return None
        total += value * count
    return total


def _text(form: Callable[[float], str], value: float | None) -> str:
    return "?" if value is None else form(value)


def _range(what: str, found: Iterator[int]) -> str:
    numbers = sorted(set(found))
    text = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"{text} {what}" + ("s" if numbers[-1] > 1 else "")
