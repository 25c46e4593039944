"""`run_capacity`: a task's models trained, each kept when it is done, and what they came to."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..report.figures import require_matplotlib
from ..report.files import locked, writing
from ..report.kept import keep_figures, kept_figures
from ..report.machine import environment
from ..report.quantities import time_text
from ..training.folders import holds
from ..training.study_rates import RATE_SEED
from .report import RESULT_NAME, CapacityResult, Trained
from .tasks import Task, find_task
from .training import train
from .variants import Variant, choose_variants, count_cost, variants_of


RUNS = Path("runs/capacity")
RUNS_NAME = "runs.json"
SEEDS = (0, 1, 2)
RATES = (3e-3, 1e-2)


@dataclass(frozen=True)
class Job:
    """One training: by a seed that counts, or, with a rate of its own, to choose the rate."""

    level: int
    variant: Variant
    seed: int
    rate: float | None = None

    @property
    def kind(self) -> str:
        return f"{self.level}/{self.variant.name}"

    @property
    def key(self) -> str:
        """Under which it is kept."""
        return f"{self.kind}/" + (f"rate {self.rate}" if self.rate else f"seed {self.seed}")


def run_capacity(
    name: str,
    levels: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    rates: Sequence[float] = RATES,
    steps: int | None = None,
    output: str | Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> CapacityResult:
    """
    Train what [`variants_of`] a task compares, at each level with each seed; all variants of a seed see the same
    batches. Which learning rate a variant gets, is found on a seed of its own, by the loss at the end.

    Args:
        name: of `TASKS`.
        levels: of the task's; all by default.
        variants: their names, to which the plain heads come that they are compared with; all by default.
        rates: that are tried with every variant.
        steps: of each training; as the task says by default.
        output: folder; `runs/capacity/NAME` by default. What it holds is not trained again; it may grow by levels,
            variants and seeds.
        progress: is told what is trained next, and how long is left.

    Returns:
        the result, which is also in the folder.

    Raises:
        ValueError: for what is not of the task, or a folder of another task or of other settings; before any work.
        FileExistsError: for a folder that holds something else.
        BlockingIOError, PermissionError: as of [`locked`].
        KeyboardInterrupt: says what is kept.
    """
    require_matplotlib()
    task = find_task(name)
    levels = task.levels if levels is None else levels
    steps = task.steps if steps is None else steps
    _check(task, levels, variants, seeds, rates, steps)
    command = spell_command(task, levels, variants, seeds, rates, steps)
    made = environment(torch.device("cpu"))
    settings = {"task": name, "steps": steps, "rates": list(rates)}
    settings |= {key: made[key] for key in ("device", "threads", "torch", "sas_hf")}
    folder = output_of(task, output)
    where = f"`output` is {str(folder)!r}"
    if holds(folder, RUNS_NAME, where, "capacity task"):
        kept_figures(folder / RUNS_NAME, settings, str(folder / RUNS_NAME))
    plan = {level: choose_variants(variants_of(task, level), variants) for level in levels}
    with locked(folder, where, in_place=True), writing(folder):
        results = kept_figures(folder / RUNS_NAME, settings, str(folder / RUNS_NAME))
        chosen = _train_all(task, plan, seeds, rates, steps, results, folder, progress)
        trained = [
            Trained(
                level, variant, count_cost(task, level, variant), chosen[level, variant.name],
                {seed: results["figures"][Job(level, variant, seed).key] for seed in seeds},
            )
            for level, of_level in plan.items()
            for variant in of_level.values()
        ]  # fmt: skip
        seconds = sum(figures["seconds"] for figures in results["figures"].values())
        result = CapacityResult(task, command, steps, list(rates), seconds, made, trained)
        result.save(folder)
    return result


def _check(task: Task, levels, variants, seeds, rates, steps: int) -> None:
    for name, values in (("levels", levels), ("seeds", seeds), ("rates", rates), ("variants", variants)):
        if values is not None and not len(values):
            raise ValueError(f"`{name}` is empty; give at least one, or leave it out.")
        if values is not None and len(set(values)) < len(values):
            raise ValueError(f"`{name}` is {', '.join(map(str, values))}; name each once.")
    for level in levels:
        if level not in task.levels:
            known = ", ".join(map(str, task.levels))
            raise ValueError(f"`levels` holds {level}; {task.name} has the {task.level_name} {known}.")
    for seed in seeds:
        if not 0 <= seed < RATE_SEED:
            raise ValueError(f"`seeds` holds {seed}; they must be from 0 to {RATE_SEED - 1:,}.")
    for rate in rates:
        if not 0 < rate < 1:
            raise ValueError(f"`rates` holds {rate}; they must be above 0 and below 1, such as 0.003.")
    if steps < 1:
        raise ValueError(f"`steps` is {steps}; it must be at least 1.")
    for level in levels if variants else ():
        there = variants_of(task, level)
        for variant in variants:
            if variant not in there:
                raise ValueError(
                    f"`variants` holds {variant!r}; {task.name} with {level} {task.level_name} has {', '.join(there)}."
                )


def _train_all(
    task: Task,
    plan: dict[int, dict[str, Variant]],
    seeds: Sequence[int],
    rates: Sequence[float],
    steps: int,
    results: dict[str, Any],
    folder: Path,
    progress: Callable[[str], None],
) -> dict[tuple[int, str], float]:
    """Train what is not kept, and keep it; returns the rate of each level's variants."""
    pairs = [(level, variant) for level, of_level in plan.items() for variant in of_level.values()]
    searches = [Job(level, variant, RATE_SEED, rate) for level, variant in pairs for rate in rates]
    if len(rates) == 1:
        searches = []
    jobs = searches + [Job(level, variant, seed) for seed in seeds for level, variant in pairs]
    figures, chosen = results["figures"], {(level, variant.name): rates[0] for level, variant in pairs}
    waiting = [job for job in jobs if job.key not in figures]
    operations = {job.kind: count_cost(task, job.level, job.variant).operations for job in jobs}
    try:
        for place, job in enumerate(jobs):
            if place == len(searches) and searches:
                for level, variant in pairs:
                    tried = {rate: _last_loss(figures[Job(level, variant, RATE_SEED, rate).key]) for rate in rates}
                    chosen[level, variant.name] = min(rates, key=tried.__getitem__)
            if job.key in figures:
                continue
            rate = chosen[job.level, job.variant.name] if job.rate is None else job.rate
            left = seconds_left(waiting, figures, operations)
            told = "" if left is None else f"; about {time_text(left)} left"
            what = f"seed {job.seed}" if job.rate is None else f"trying the rate {rate}"
            counted = f"{place + 1} of {len(jobs)}"
            progress(f"{task.name}, {job.level} {task.level_name}, {job.variant.name}, {what}: {counted}{told}")
            figures[job.key] = {"rate": rate} | train(task, job.level, job.variant, job.seed, rate, steps)
            keep_figures(folder / RUNS_NAME, results)
            waiting.remove(job)
    except KeyboardInterrupt:
        done = len(jobs) - len(waiting)
        raise KeyboardInterrupt(f"{done} of {len(jobs)} trainings are kept; the same command goes on.") from None
    return chosen


def _last_loss(figures: dict[str, Any]) -> float:
    """Of the last twentieth of the training, on batches that were new."""
    return float("inf") if figures["diverged"] else figures["curve"][-1]


def seconds_left(waiting: Sequence[Job], figures: dict[str, Any], operations: dict[str, int]) -> float | None:
    """Each takes what its kind took; where none was trained yet, as long as its arithmetic takes at the speed of all.

    Args:
        operations: of each kind of job.

    Returns:
        `None` where nothing was trained.
    """
    took: dict[str, list[float]] = {}
    for key, found in figures.items():
        if (kind := key.rpartition("/")[0]) in operations:
            took.setdefault(kind, []).append(found["seconds"])
    if not took:
        return None
    speed = sum(map(sum, took.values())) / sum(operations[kind] * len(times) for kind, times in took.items())
    return sum(
        sum(took[job.kind]) / len(took[job.kind]) if job.kind in took else speed * operations[job.kind]
        for job in waiting
    )


def output_of(task: Task, output: str | Path | None = None) -> Path:
    return RUNS / task.name if output is None else Path(output)


def spell_command(task: Task, levels, variants, seeds, rates, steps: int) -> str:
    """The command line that makes the result again."""
    words = ["sas-hf", "capacity", task.name]
    words += ["--levels", ",".join(map(str, levels))] if tuple(levels) != task.levels else []
    words += ["--variants", ",".join(variants)] if variants is not None else []
    words += ["--seeds", ",".join(map(str, seeds))] if tuple(seeds) != SEEDS else []
    words += ["--rates", ",".join(str(rate) for rate in rates)] if tuple(rates) != RATES else []
    words += ["--steps", str(steps)] if steps != task.steps else []
    return shlex.join(words)


def has_run(task: Task) -> bool:
    """Whether the task's default folder has its result."""
    return (output_of(task) / RESULT_NAME).is_file()
