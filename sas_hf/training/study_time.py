"""How long a study still takes, by the logs of its runs."""

import statistics
from collections.abc import Hashable, Sequence
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from .folders import METRICS_NAME, has_ended
from .reporting import logged_seconds


def seconds_left(runs: Sequence[tuple[Hashable, Path]]) -> float | None:
    """
    Of training, until all runs have ended: each is taken to need what those of its kind did by their logs, or the mean
    of all where there are none of them, less what it has behind it at its last checkpoint.

    Args:
        runs: of each its kind, such as variant and data, and its folder.

    Returns:
        `None` where no run has ended, or all have.
    """
    took: dict[Hashable, list[float]] = {}
    to_do = []
    for kind, folder in runs:
        if not has_ended(folder):
            to_do.append((kind, folder))
        elif (folder / METRICS_NAME).is_file() and (seconds := logged_seconds(folder)) is not None:
            took.setdefault(kind, []).append(seconds)
    if not took or not to_do:
        return None
    mean = statistics.mean(seconds for found in took.values() for seconds in found)
    return sum(max(0.0, statistics.mean(took.get(kind, [mean])) - _seconds_behind(folder)) for kind, folder in to_do)


def _seconds_behind(folder: Path) -> float:
    """At the last checkpoint, from which the run will go on."""
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    return 0.0 if checkpoint is None else logged_seconds(folder, int(checkpoint.rpartition("-")[2])) or 0.0
