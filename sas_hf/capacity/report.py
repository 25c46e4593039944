"""A task's result: errors beside what they cost, the cliff as a table and as a picture."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..report.figures import label_axes, save_figure
from ..report.files import write_atomically
from ..report.machine import environment_text
from ..report.quantities import count_text, time_text
from ..report.tables import Grid
from ..training.study_results import paired_test
from .tasks import Task
from .variants import Cost, Variant


RESULT_NAME = "result.json"
METHOD = (
    "error: median over the seeds; range: smallest and largest of them; over base: geometric mean over the seeds of "
    "the ratio to the plain heads of the same number (mha-N for sas-NtoM) on the same batches, with its 95 % interval "
    "by Student's t on logarithms, without correction for several comparisons"
)
PLAIN, REAL = "black", "0.55"
WITHOUT_READING: dict[str, Any] = {"color": "0.7", "linewidth": 1.2}
SOLVED = WITHOUT_READING | {"linestyle": ":"}
COLOURS = {1: "tab:blue", 2: "tab:orange", 4: "tab:red", 8: "tab:purple"}  # of simulation, by its heads before
# Marks and names of what is no line.
RIVALS = {
    "real": ("*", "real heads as wide as the base's"),
    "parameters": ("<", "base, wider: parameters of simulation"),
    "operations": (">", "base, wider: operations of simulation"),
}
FORMS = {
    "features": ("^", "simulated, and features"),
    "features-id": ("v", "simulated, and features, identity"),
    "values": ("s", "simulated, and values' features"),
    "id": ("x", "simulated, identity"),
    "concat": ("P", "simulated, without PEAA"),
}


@dataclass(frozen=True)
class Trained:
    """A variant's trainings at a level: its cost, the rate that was chosen, and by seed what [`train`] returned."""

    level: int
    variant: Variant
    cost: Cost
    rate: float
    runs: dict[int, dict[str, Any]]

    @property
    def errors(self) -> list[float]:
        return [run["error"] for run in self.runs.values()]

    @property
    def error(self) -> float:
        """The median over the seeds."""
        return statistics.median(self.errors)

    def over(self, base: "Trained") -> dict[str, Any]:
        """The ratio of errors to another's, seed by seed: "ratio", "low", "high", "p_value", the last three `None` for
        one seed."""
        logs = [[math.log(error) for error in each.errors] for each in (base, self)]
        test = paired_test(*logs)
        ends = {name: None if test[name] is None else math.exp(test[name]) for name in ("low", "high")}
        return {"ratio": math.exp(test["difference"])} | ends | {"p_value": test["p_value"]}


@dataclass(frozen=True)
class CapacityResult:
    """
    Attributes:
        command: that makes it again.
        seconds: of all trainings that the folder keeps.
        environment: as of [`sas_hf.report.machine.environment`].
        trained: by level, in the order of [`variants_of`].
    """

    task: Task
    command: str
    steps: int
    rates: list[float]
    seconds: float
    environment: dict[str, Any]
    trained: list[Trained]

    @property
    def levels(self) -> list[int]:
        return list(dict.fromkeys(each.level for each in self.trained))

    @property
    def seeds(self) -> list[int]:
        return list(self.trained[0].runs)

    def of(self, level: int) -> dict[str, Trained]:
        """By the variants' names."""
        return {each.variant.name: each for each in self.trained if each.level == level}

    def grids(self) -> list[Grid]:
        """For each level the errors by heads, and all variants with what they cost."""
        return [grid for level in self.levels for grid in (self._by_heads(level), self._variants(level))]

    def _title(self, level: int) -> str:
        return f"{self.task.name}, {level} {self.task.level_name}"

    def _by_heads(self, level: int) -> Grid:
        found, task = self.of(level), self.task
        heads = sorted({each.variant.heads for each in found.values()})
        lines = {"real": [each for each in found.values() if each.variant.form == "mha"]}
        for base in simulated_bases(found.values()):
            lines[f"simulated from {base}"] = simulated_from(found, base)
        rows = []
        for name, line in lines.items():
            errors = {each.variant.heads: error_text(each.error) for each in line}
            rows.append([name, *(errors.get(number, "") for number in heads)])
        caption = (
            f"{task.error_name}, per cent; median of n = {len(self.seeds)} seeds. Who reads nothing has "
            f"{100 * task.chance(level):.0f}; below {100 * task.solved:.0f} the task counts as solved."
        )
        return Grid(f"{self._title(level)}: error by number of heads", ["heads", *map(str, heads)], rows, caption)

    def _variants(self, level: int) -> Grid:
        found, rows = self.of(level), []
        for each in found.values():
            base = found[f"mha-{each.variant.base}"]
            cells = [count_text(each.cost.parameters), count_text(each.cost.operations), f"{each.rate:g}"]
            cells += [error_text(each.error), _between(each.errors, error_text)]
            cells += ["", ""] if each is base else _ratio_cells(each.over(base))
            rows.append([each.variant.name, *cells])
        header = ["variant", "param.", "oper.", "rate", "error", "range", "over base", "interval"]
        caption = (
            f"n = {len(self.seeds)} seeds, {self.steps:,} steps of {self.task.rows} sequences; oper.: of a step, for "
            f"each sequence. {METHOD}."
        )
        return Grid(f"{self._title(level)}: {self.task.error_name}, per cent", header, rows, caption)

    def notes(self) -> list[str]:
        """What must be said of it."""
        diverged = {
            f"{self._title(each.level)}, {each.variant.name}": count
            for each in self.trained
            if (count := sum(run["diverged"] for run in each.runs.values()))
        }
        return [f"{name}: {count} diverged, and count as chance." for name, count in diverged.items()]

    def content(self) -> dict[str, Any]:
        """What `result.json` holds: every number."""
        summaries = []
        for each in self.trained:
            variant, base = each.variant, self.of(each.level)[f"mha-{each.variant.base}"]
            plain = {name: getattr(variant, name) for name in ("name", "base", "heads", "form", "fields")}
            solved = sum(error < self.task.solved for error in each.errors)
            summaries.append(
                {"level": each.level, **plain, **asdict(each.cost), "rate": each.rate, "n": len(each.runs)}
                | {"error": each.error, "low": min(each.errors), "high": max(each.errors), "solved": solved}
                | {"over_base": None if each is base else each.over(base), "runs": each.runs}
            )
        return {
            "task": self.task.name,
            "asks": self.task.asks,
            "command": self.command,
            "error": self.task.error_name,
            "chance": {level: self.task.chance(level) for level in self.levels},
            "solved_below": self.task.solved,
            "method": METHOD,
            "seeds": self.seeds,
            "steps": self.steps,
            "rates": self.rates,
            "seconds": self.seconds,
            "environment": self.environment,
            "variants": summaries,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write `result.md`, `result.json` and the picture; returns the files."""
        paths = save_figure(self.draw(), folder, "figure")
        lines = [f"# {self.task.name}: {self.task.asks}", "", f"    {self.command}", "", self.told(), ""]
        lines += [grid.markdown() for grid in self.grids()]
        lines += [f"- {note}" for note in self.notes()]
        lines += ["", f"![error by number of heads]({paths[0].name})", ""]
        write_atomically(folder / "result.md", "\n".join(lines).encode())
        write_atomically(folder / RESULT_NAME, (json.dumps(self.content(), indent=1) + "\n").encode())
        return [folder / "result.md", folder / RESULT_NAME, *paths]

    def told(self) -> str:
        """Where and in how long it was made."""
        made = self.environment
        return f"{environment_text(made)}; {time_text(self.seconds)} of training; {made['date']}."

    def draw(self):
        """A matplotlib `Figure`, a panel for each level: error over heads, a line for real ones and for those
        simulated from each number; other forms stand beside the simulation that they are forms of, rivals beside the
        heads that they have."""
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FuncFormatter, LogLocator

        figure = Figure(figsize=(1.2 + 3.9 * len(self.levels), 4.6), layout="constrained")
        panels = figure.subplots(1, len(self.levels), sharey=True, squeeze=False)[0]
        for axes, level in zip(panels, self.levels, strict=True):
            self._draw_level(axes, level)
            axes.label_outer(remove_inner_ticks=False)
        low, high = panels[0].get_ylim()
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        forms = {each.variant.form for each in self.trained}
        marks = [Line2D([], [], color=PLAIN, marker="o", label="real heads")]
        marks += [
            Line2D([], [], color=COLOURS[base], marker="o", linestyle="--", label=f"simulated from {base}")
            for base in simulated_bases(self.trained)
        ]
        for form, (marker, told) in (RIVALS | FORMS).items():
            if form in forms:
                colour = REAL if form in RIVALS else "0.2"
                marks.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=told))
        marks.append(Line2D([], [], label="who reads nothing", **WITHOUT_READING))
        marks.append(Line2D([], [], label="counts as solved below", **SOLVED))
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(3, 1 + len(self.levels))}
        figure.legend(handles=marks, fontsize=7, frameon=False, handlelength=3.2, **place)
        return figure

    def _draw_level(self, axes, level: int) -> None:
        found = self.of(level)
        _line(axes, [each for each in found.values() if each.variant.form == "mha"], PLAIN, "o-")
        for base in simulated_bases(found.values()):
            _line(axes, simulated_from(found, base), COLOURS[base], "o--")
        for place, (form, (marker, _)) in enumerate((RIVALS | FORMS).items()):
            for each in (each for each in found.values() if each.variant.form == form):
                left = form in RIVALS
                side = -0.08 * (place + 1) if left else 0.08 * (place + 1 - len(RIVALS))
                _line(axes, [each], REAL if left else COLOURS[each.variant.base], marker, 2**side)
        axes.axhline(100 * self.task.chance(level), **WITHOUT_READING)
        axes.axhline(100 * self.task.solved, **SOLVED)
        heads = sorted({each.variant.heads for each in found.values()})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(heads, list(map(str, heads)))
        axes.minorticks_off()
        label_axes(axes, "heads that attend", f"{self.task.error_name}, %", self._title(level))


def simulated_bases(trained: Iterable[Trained]) -> list[int]:
    """The numbers of heads that more are simulated from."""
    return sorted({each.variant.base for each in trained if each.variant.form == "heads"})


def simulated_from(found: dict[str, Trained], base: int) -> list[Trained]:
    """The plain heads of a number, and what simulation of heads alone makes of them."""
    return [found[f"mha-{base}"]] + [
        each for each in found.values() if each.variant.form == "heads" and each.variant.base == base
    ]


def _line(axes, line: list[Trained], colour: str, style: str, side: float = 1.0) -> None:
    """Medians, with bars from the smallest to the largest seed's."""
    errors = [100 * each.error for each in line]
    low = [100 * (each.error - min(each.errors)) for each in line]
    high = [100 * (max(each.errors) - each.error) for each in line]
    places = [side * each.variant.heads for each in line]
    bars = {"elinewidth": 0.8, "capsize": 2}
    axes.errorbar(places, errors, [low, high], fmt=style, color=colour, markersize=5, linewidth=1.2, **bars)


def error_text(error: float) -> str:
    """In per cent, by as many digits as a column has room for."""
    percent = 100 * error
    digits = 1 if percent >= 10 else 2 if percent >= 1 else 3 if percent >= 0.1 else 4
    return f"{percent:.{digits}f}"


def ratio_text(ratio: float) -> str:
    if ratio < 0.001:
        return "<0.001"
    digits = 0 if ratio >= 100 else 1 if ratio >= 10 else 2 if ratio >= 1 else 3
    return f"{ratio:.{digits}f}" if ratio < 10_000 else ">9999"


def _ratio_cells(test: dict[str, Any]) -> list[str]:
    interval = "-" if test["low"] is None else _between([test["low"], test["high"]], ratio_text)
    return [ratio_text(test["ratio"]), interval]


def _between(values: list[float], text) -> str:
    return f"{text(min(values))}-{text(max(values))}"
