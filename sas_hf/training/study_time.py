"""How long a study still takes, by the logs of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_utils import get_last_checkpoint

from .folders import METRICS_NAME
from .reporting import logged_seconds


if TYPE_CHECKING:
    from .study import Run


def seconds_left(runs: Sequence[Run]) -> float | None:
    """
    Of training, until all runs have ended: each is taken to need what those of its variant and data did by their logs,
    or the mean of all where there are none of them, less what it has behind it at its last checkpoint.

    Returns:
        `None` where no run has ended, or all have.
    """
    took: dict[tuple[str, str], list[float]] = {}
    open_runs = []
    for run in runs:
        if not (run.folder / METRICS_NAME).is_file():
            open_runs.append(run)
        elif (seconds := logged_seconds(run.folder)) is not None:
            took.setdefault((run.variant, run.data), []).append(seconds)
    if not took or not open_runs:
        return None
    mean = statistics.mean(seconds for found in took.values() for seconds in found)
    left = 0.0
    for run in open_runs:
        needs = statistics.mean(took.get((run.variant, run.data), [mean]))
        left += max(0.0, needs - _seconds_behind(run.folder))
    return left


def _seconds_behind(folder: Path) -> float:
    """At the last checkpoint, from which the run will go on."""
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    return 0.0 if checkpoint is None else logged_seconds(folder, int(checkpoint.rpartition("-")[2])) or 0.0


def duration(seconds: float) -> str:
    """Such as "40 s", "14 min", "3.5 h" or "2.1 days"."""
    for most, size, style in ((90, 1, "{:.0f} s"), (90 * 60, 60, "{:.0f} min"), (48 * 3600, 3600, "{:.1f} h")):
        if seconds < most:
            return style.format(seconds / size)
    return f"{seconds / 86400:.1f} days"
