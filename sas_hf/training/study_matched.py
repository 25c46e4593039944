"""Variants of a study that are another with a third's cost: as many parameters, or as many seconds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..report.files import write_atomically
from .recipe_fields import TrainingRecipe
from .rehearsal import steps_side_by_side
from .sizes import count_parameters, meta_model
from .tasks import find_task


FIELDS = ("variant", "to", "by")
KINDS = ("parameters", "seconds")
WIDTH = "intermediate_size"
# In the folder of such a variant: the ratio of step times that its steps follow, from then on.
RATIO_NAME = "ratio.json"


@dataclass(frozen=True)
class Timing:
    """
    How long a matched variant trains: by the times of a step of its own model and of the one whose seconds it gets.

    Attributes:
        of, to: names of both variants.
        path: where the ratio of both is kept, once it is known.
        own, other: recipes of the two.
    """

    of: str
    to: str
    path: Path
    own: TrainingRecipe
    other: TrainingRecipe

    def steps(self) -> int | None:
        """
        Steps that take as long as the other's; `None` where nothing was measured yet.

        Raises:
            FileExistsError: where a ratio of other variants is kept.
        """
        if not self.path.is_file():
            return None
        names, kept = {"variant": self.of, "to": self.to}, json.loads(self.path.read_text(encoding="utf-8"))
        if there := {name: kept[name] for name in names if kept[name] != names[name]}:
            raise FileExistsError(f"{self.path} is the ratio of other variants ({there}); take another name.")
        return max(1, round(self.other.training["max_steps"] * kept["ratio"]))

    def measure(self) -> None:
        """
        Keep the ratio of the times of a step, by real steps side by side, unless it is known.

        Raises:
            ValueError: in several processes, which are not timed.
        """
        if self.path.is_file():
            return
        if PartialState().num_processes > 1:
            raise ValueError(
                f"{self.path} is not there yet: how many steps of {self.of} take the time of {self.to}'s is measured "
                "in one process; begin the study in one."
            )
        own, other = steps_side_by_side([self.own, self.other])
        content = {"variant": self.of, "to": self.to, "ratio": other / own}
        content |= {"seconds_per_step": {self.of: own, self.to: other}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(content, indent=2) + "\n").encode())


@dataclass(frozen=True)
class Match:
    """
    What a matched variant got.

    Attributes:
        variant, data: place in the grid; `data` is "" where there is one.
        of: the variant that it is, but for its width or steps.
        to: the variant whose cost it has.
        by: "parameters" or "seconds".
        width: by parameters, of its feed-forward layers.
        steps: by seconds, of its training.
    """

    variant: str
    data: str
    of: str
    to: str
    by: str
    width: int | None = None
    steps: int | None = None

    @property
    def gets(self) -> str:
        return f"width {self.width:,}" if self.steps is None else f"{self.steps:,} steps"


def check_matched(matched: dict[str, dict[str, Any]], variants: Sequence[str]) -> None:
    """Raise a ValueError for entries that cannot be matched; each may name variants, and entries above it."""
    known = dict.fromkeys(variants)
    for name, entry in matched.items():
        if name in known:
            raise ValueError(f"`matched` has the name {name!r}, which is that of a variant; take another.")
        if set(entry) != set(FIELDS) or entry["by"] not in KINDS:
            raise ValueError(
                f"`matched.{name}` is {entry}; it must be of the form {{variant: NAME, to: NAME, by: parameters}} (or "
                "by: seconds)."
            )
        for field in ("variant", "to"):
            other = entry[field]
            if other not in known:
                raise ValueError(
                    f"`matched.{name}.{field}` is {other!r}, which is no variant, nor matched above it; known are "
                    f"{', '.join(known)}."
                )
            if known[other] == "seconds":
                raise ValueError(
                    f"`matched.{name}.{field}` is {other!r}, whose steps are known only when others have ended; name "
                    f"the variants that it is made of ({matched[other]['variant']}, {matched[other]['to']})."
                )
        if entry["variant"] == entry["to"]:
            raise ValueError(f"`matched.{name}` has {entry['to']!r} as `variant` and as `to`; they must differ.")
        known[name] = entry["by"]


def fit_width(recipe: TrainingRecipe, to: TrainingRecipe) -> int:
    """
    The widest feed-forward layers with which a recipe's model has no more parameters than another's.

    Raises:
        ValueError: where it has more as it is, or its feed-forward layers do not follow `intermediate_size`.
    """
    width = getattr(find_task(recipe.task).model_config(recipe), WIDTH, None)
    if not isinstance(width, int):
        raise ValueError(f"its model has no `{WIDTH}` to widen")
    have, most = _parameters(recipe), _parameters(to)
    if have > most:
        raise ValueError(f"it has {have:,} parameters, more than the {most:,} of the other; match the other to it")
    more = _parameters(at_width(recipe, width + 1)) - have
    if more <= 0:
        raise ValueError(f"its parameters do not grow with `{WIDTH}`")
    width += (most - have) // more
    if not _parameters(at_width(recipe, width)) <= most < _parameters(at_width(recipe, width + 1)):
        raise ValueError(f"its parameters do not grow evenly with `{WIDTH}`")
    return width


def at_width(recipe: TrainingRecipe, width: int) -> TrainingRecipe:
    model = replace(recipe.model, overrides=recipe.model.overrides | {WIDTH: width})
    return replace(recipe, model=model)


def _parameters(recipe: TrainingRecipe) -> int:
    return count_parameters(meta_model(recipe, find_task(recipe.task).model_config(recipe)))[0]


def at_steps(recipe: TrainingRecipe, steps: int) -> TrainingRecipe:
    """A recipe with so many steps, and a warm-up that keeps its share of them."""
    training = recipe.training | {"max_steps": steps}
    warmup = training.get("warmup_steps") or 0
    if warmup >= 1:  # else it is a share
        training["warmup_steps"] = max(1, round(warmup * steps / recipe.training["max_steps"]))
    return replace(recipe, training=training)


def check_steps(recipe: TrainingRecipe) -> None:
    """Raise a ValueError for a recipe whose steps cannot be set, or not be timed on random numbers."""
    if recipe.training.get("max_steps", -1) <= 0:
        raise ValueError("it goes by epochs, and cannot be matched by seconds; set `training.max_steps`")
    for name in recipe.training.get("lr_scheduler_kwargs") or {}:
        if name.endswith("_steps"):
            raise ValueError(f"`training.lr_scheduler_kwargs` has `{name}`, which would not follow its steps")
    task = find_task(recipe.task)
    config = task.model_config(recipe)
    if task.random_batch(config, 1, task.longest(recipe, config)) is None:
        raise ValueError(f"the task {task.name} does not tell what a batch of it is, so that no step can be timed")
