"""The learning rate that each variant of a study gets: tried on a seed that does not count."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments

from ..report.files import write_atomically
from .folders import DIVERGED_NAME, METRICS_NAME
from .recipe_fields import TrainingRecipe
from .run import read_metrics, train
from .tasks import Metric


RATE_SEED = 10**6  # on which a variant's rate is chosen
ENDS = ("min_lr", "lr_end")  # of `lr_scheduler_kwargs`: rates that would not follow the one that is tried


@dataclass(frozen=True)
class RateChoice:
    """
    Attributes:
        variant, data: place in the grid; `data` is "" where there is one.
        rate: the best.
        tried: by rate, where the study's metric ended; `None` where the training diverged.
    """

    variant: str
    data: str
    rate: float
    tried: dict[float, float | None]

    @property
    def edge(self) -> str | None:
        """Where the best may lie beyond those that were tried, at which end: "lowest" or "highest"."""
        return {min(self.tried): "lowest", max(self.tried): "highest"}.get(self.rate)


def at_rate(recipe: TrainingRecipe, rate: float) -> TrainingRecipe:
    """
    A recipe with another learning rate; `minimum_learning_rate` and `simulation_learning_rate` keep their share of it.

    Raises:
        ValueError: where the schedule ends at a rate of its own.
    """
    share = rate / recipe.training.get("learning_rate", TrainingArguments.learning_rate)
    for name in ENDS:
        if name in (recipe.training.get("lr_scheduler_kwargs") or {}):
            raise ValueError(
                f"`training.lr_scheduler_kwargs` has `{name}`, which would be the same for all `learning_rates`; take "
                "`minimum_learning_rate`, which keeps its share."
            )
    simulation, floor = recipe.simulation_learning_rate, recipe.minimum_learning_rate
    return replace(
        recipe,
        simulation_learning_rate=None if simulation is None else simulation * share,
        minimum_learning_rate=None if floor is None else min(rate, floor * share),
        training=recipe.training | {"learning_rate": rate},
    )


def try_rate(recipe: TrainingRecipe) -> None:
    """Train, or keep in the folder that the training diverged; raises as `train`, but for that."""
    path = Path(recipe.training["output_dir"]) / DIVERGED_NAME
    if path.is_file():
        return
    try:
        train(recipe)
    except FloatingPointError as error:
        if PartialState().is_main_process:
            write_atomically(path, (json.dumps({"error": str(error)}) + "\n").encode())
        PartialState().wait_for_everyone()


def final_value(folder: Path, metric: Metric) -> float | None:
    """Of a training that has ended, in the metric; `None`: it diverged, or is no number."""
    value = metric.of(read_metrics(folder / METRICS_NAME)) if (folder / METRICS_NAME).is_file() else None
    return value if value is not None and math.isfinite(value) else None


def best_rate(tried: dict[float, float | None], metric: Metric) -> float | None:
    """The rate that ended best, the first of equal ones; `None` where all diverged."""
    ended = {rate: value for rate, value in tried.items() if value is not None}
    return (max if metric.higher_is_better else min)(ended, key=ended.__getitem__, default=None)
