"""What the measured items share: parts whose models take turns, kept as they are done, with the time left."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..report.kept import keep_figures, kept_figures
from ..report.machine import environment
from ..report.quantities import time_text
from ..report.turns import Job, TimeLeft, beside_first, take_turns


MEASURED_NAME = "measured.json"
PAPERS_COLOUR = "0.35"
COLOURS = {"mha": "black", "gqa": "tab:blue", "mqa": "tab:cyan", "mla": "tab:purple", "tpa": "tab:green"}
COLOURS |= {"standard": "black", "optimised": "tab:brown", "efficient": "tab:pink", "super": "tab:olive"}
COLOURS |= {"sas": "tab:orange", "sas-k5": "tab:red"}


@dataclass(frozen=True)
class Part:
    """
    Models that take turns in one process.

    Attributes:
        work: of one call, by model, in any unit that all parts share; the first is the measure of the others.
        make: the jobs of these models.
        per: a time is divided by it, such as samples of a call.
    """

    work: Mapping[str, float]
    make: Callable[[], Mapping[str, Job]]
    per: int = 1


def open_measured(folder: Path, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What was measured into the folder before, or nothing yet.

    Raises:
        ValueError: if it was on another machine or with other settings.
    """
    made = environment(device)
    settings = settings | {name: made[name] for name in ("device", "threads", "torch")}
    return kept_figures(folder / MEASURED_NAME, settings, str(folder / MEASURED_NAME))


def is_measured(name: str, part: Part, results: dict[str, Any]) -> bool:
    """Whether all its models took turns: one alone has no others to be compared with."""
    return list(results["figures"].get(name, {}).get("models", {})) == list(part.work)


def measure(
    parts: dict[str, Part],
    results: dict[str, Any],
    folder: Path,
    rounds: int,
    device: torch.device,
    progress: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """
    Time every part that `results` does not hold, and keep each when it is done.

    Returns:
        by part: `models`, what [`beside_first`] says of them, and the `seconds` that it took.
    """
    figures = results["figures"]
    wanted = {name: part for name, part in parts.items() if not is_measured(name, part, results)}
    left = TimeLeft((rounds + 1) * sum(sum(part.work.values()) for part in wanted.values()))
    for name, part in wanted.items():
        begun = time.perf_counter()
        before: list[str] = []
        progress(f"{name}: making {len(part.work)} models")

        def now(model: str, turn: int, name=name, part=part, before=before) -> None:
            if before:
                left.add(part.work[before[-1]])
            before.append(model)
            state = f"round {turn} of {rounds}" if turn else "warming up"
            told = "" if left.seconds is None else f"; about {time_text(left.seconds)} left"
            progress(f"{name}: {state}, {model}{told}")

        times = take_turns(part.make(), rounds, now, device)
        left.add(part.work[before[-1]])
        times = {model: [seconds / part.per for seconds in values] for model, values in times.items()}
        figures[name] = {"models": beside_first(times), "seconds": time.perf_counter() - begun}
        keep_figures(folder / MEASURED_NAME, results)
    return {name: figures[name] for name in parts}


def draw_ratios(axes, rows: list[tuple[str, dict[str, Any] | None, float | None]], furthest: float) -> None:
    """
    A dot plot of ratios: ours with a line from the smallest to the largest of the rounds, the paper's as a diamond.

    Args:
        rows: label, our figures and the paper's ratio; none of either leaves a gap.
        furthest: where the axis ends; ratios beyond are written at its end.
    """
    for place, (label, entry, printed) in enumerate(rows):
        colour = COLOURS.get(label.partition(",")[0], "tab:gray")
        if printed is not None:
            axes.plot(printed, place, "D", markersize=6, markerfacecolor="none", color=PAPERS_COLOUR)
        if entry is None:
            continue
        if entry["ratio"] > furthest:
            axes.annotate(f"{entry['ratio']:.2f} →", (1, place), (-2, 0), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", va="center", fontsize=8, color=colour)  # fmt: skip
            continue
        ends = [entry["smallest"], min(entry["largest"], furthest)]
        axes.plot(ends, [place, place], color=colour, linewidth=4, alpha=0.4, solid_capstyle="butt")
        axes.plot(entry["ratio"], place, "o", markersize=5, color=colour)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def ratio_legend(figure) -> None:
    """What dots, lines and diamonds are, above all panels."""
    from matplotlib.lines import Line2D

    ours = Line2D([], [], color="0.2", marker="o", linewidth=4, alpha=0.6, markersize=5)
    paper = Line2D([], [], color=PAPERS_COLOUR, marker="D", linestyle="", markerfacecolor="none", markersize=6)
    names = ["ours: median, smallest to largest of the rounds", "the paper's"]
    figure.legend([ours, paper], names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
