"""What is timed side by side: jobs that take turns in one process, and what each takes beside the first."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch


class Job(Protocol):
    """What is timed."""

    def __call__(self) -> Any: ...

    def reset(self) -> None:
        """Take away, untimed, what a call leaves behind."""


def take_turns(
    jobs: Mapping[str, Job], rounds: int, now: Callable[[str, int], None], device: torch.device | None = None
) -> dict[str, list[float]]:
    """
    Time jobs round by round, each round in another order, after one for warming up.

    Args:
        rounds: that count.
        now: is told which job runs next, and in which round; 0 is the one for warming up.
        device: that the jobs work on; what they leave it to do is waited for.

    Returns:
        by name, the seconds of every round.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for turn in range(rounds + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            now(name, turn)
            _wait_for(device)
            begun = time.perf_counter()
            jobs[name]()
            _wait_for(device)
            seconds = time.perf_counter() - begun
            jobs[name].reset()
            if turn:
                times[name].append(seconds)
    return times


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def beside_first(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """
    Args:
        times: by name, of every round.

    Returns:
        by name: the median (`value`) and every round's time, in the unit given; median, smallest and largest ratio to
        the first *in the same round*.
    """
    first = next(iter(times.values()))
    figures = {}
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values, first, strict=True)]
        spread = {"smallest": min(ratios), "largest": max(ratios), "rounds": values}
        figures[name] = {"value": statistics.median(values), "ratio": statistics.median(ratios), **spread}
    return figures


class TimeLeft:
    """How long it will take yet, from how long the part that is done took.

    Args:
        work: of all jobs, in any unit that goes with their times.
    """

    def __init__(self, work: float):
        self.work, self.done, self.begun = work, 0.0, time.perf_counter()

    def add(self, work: float) -> None:
        """So much more is done."""
        self.done += work

    @property
    def seconds(self) -> float | None:
        """`None` before anything is done."""
        if not self.done:
            return None
        return (time.perf_counter() - self.begun) * (self.work - self.done) / self.done
