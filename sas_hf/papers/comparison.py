"""What an item of a paper ends in: our numbers beside the printed ones, and whether they agree."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..report.figures import label_axes, save_figure
from ..report.files import write_atomically
from ..report.machine import environment, environment_text
from ..report.quantities import time_text
from ..report.tables import Grid
from .items import Place, stand_in


RESULT_NAME = "result.json"

# What the agreement of a comparison means.
AGREEMENTS = {
    "agrees": "our interval lies on the paper's side",
    "contradicts": "our interval lies on the other side, or the paper has no difference",
    "smaller": "our interval holds no difference, and not the paper's: an effect of its size would have been seen",
    "undecided": "our interval holds both no difference and the paper's",
    "one run": "one run, which says nothing of chance",
    "not finite": "our number is none, so that nothing is compared",
    "equal": "the same number",
    "differs": "another number",
}


@dataclass(frozen=True)
class Comparison:
    """
    A printed number beside ours.

    Args:
        what: such as "sas minus mha, perplexity", "optimised over standard, seconds" or "super, parameters".
        unit: such as "nats", "points" or "ratio"; "" of counts.
        ours: the difference, the ratio, or the count.
        printed: the paper's.
        low, high: of differences the 95 % confidence interval over paired seeds, of ratios the smallest and largest
            of the rounds.
        n: seeds or rounds.
        neutral: what no difference is: 0, or 1 of ratios; `None` of counts, which are equal or not.
    """

    what: str
    unit: str
    ours: float
    printed: float
    low: float | None = None
    high: float | None = None
    n: int = 1
    neutral: float | None = 0.0

    @property
    def agreement(self) -> str:
        """One of [`AGREEMENTS`]."""
        if not math.isfinite(self.ours):
            return "not finite"
        if self.neutral is None:
            return "equal" if self.ours == self.printed else "differs"
        if self.low is None or self.high is None:
            return "one run"
        if self.low <= self.neutral <= self.high:
            return "undecided" if self.low <= self.printed <= self.high else "smaller"
        # On the paper's side; a printed difference of nothing has none, and ours is one.
        return "agrees" if (self.ours - self.neutral) * (self.printed - self.neutral) > 0 else "contradicts"

    def row(self) -> list[str]:
        """For a table of comparisons: what, ours with its interval, the paper's, agreement."""
        style = ",.0f" if self.neutral is None else ".3f" if self.neutral else "+.4f"
        if self.unit in ("points", "BLEU", "per cent"):
            style = "+.2f"
        ours = format(self.ours, style)
        if self.low is not None:
            ours += f" ({self.low:{style}} to {self.high:{style}})"
        return [self.what, ours, format(self.printed, style), self.agreement]


def comparison_grid(title: str, comparisons: list[Comparison]) -> Grid:
    """Comparisons as a table, with what they are measured in and what the agreements mean."""
    units = ", ".join(dict.fromkeys(comparison.unit for comparison in comparisons if comparison.unit))
    counts = sorted({comparison.n for comparison in comparisons if comparison.neutral is not None})
    caption = [f"in {units}"] if units else []
    if counts:
        caption.append(f"n = {', '.join(map(str, counts))}")
    caption += meanings(comparisons)
    rows = [comparison.row() for comparison in comparisons]
    return Grid(title, ["compared", "ours (interval)", "paper", "agreement"], rows, "; ".join(caption) + ".")


def meanings(comparisons: list[Comparison]) -> list[str]:
    """What the agreements of these comparisons mean, each once."""
    return [f"{name}: {AGREEMENTS[name]}" for name in dict.fromkeys(c.agreement for c in comparisons)]


def draw_comparisons(comparisons: list[Comparison]):
    """Ours with their intervals and the paper's, from the top in their order, a panel per unit; `None` of counts."""
    from matplotlib.figure import Figure

    shown = [comparison for comparison in comparisons if comparison.neutral is not None]
    units = list(dict.fromkeys(comparison.unit for comparison in shown))
    if not shown:
        return None
    heights = [sum(comparison.unit == unit for comparison in shown) for unit in units]
    figure = Figure(figsize=(7, 1 + sum(0.3 * height + 0.7 for height in heights)), layout="constrained")
    panels = figure.subplots(len(units), squeeze=False, height_ratios=[height + 1 for height in heights])[:, 0]
    for axes, unit in zip(panels, units, strict=True):
        ours = [comparison for comparison in shown if comparison.unit == unit]
        places = range(len(ours))
        low = [c.ours if c.low is None else c.low for c in ours]
        high = [c.ours if c.high is None else c.high for c in ours]
        axes.axvline(ours[0].neutral, color="0.6", linewidth=1)
        axes.hlines(places, low, high, color="C0")
        axes.plot([c.ours for c in ours], places, "o", color="C0", label="ours")
        axes.plot([c.printed for c in ours], places, "D", color="C1", fillstyle="none", label="paper")
        axes.set_yticks(places, [c.what for c in ours], fontsize=8)
        axes.set_ylim(len(ours) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)
        label_axes(axes, f"ours with its interval, and the paper's ({unit})", "")
    panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return figure


@dataclass(frozen=True)
class ItemResult:
    """
    One table or figure, as it came out here.

    Args:
        paper, item, size: such as "sas", "table7", "cpu".
        title: what it compares.
        stand_in: what takes the place of the paper's data and models, and of what is declared, which every heading
            names; `None` where nothing does.
        command: that makes it again.
        seconds: that the machine worked on it, in all processes.
        environment: as [`environment`] gives it.
        grids: tables, of which the comparison with the paper is the last.
        comparisons: with what is printed.
        numbers: all that was measured, as plain JSON.
        notes: what must be said of it.
        figure: a matplotlib `Figure`; `None` of what has none, or was read from a file.
        drawn: of what was read from a file, the names of its pictures.
    """

    paper: str
    item: str
    size: str
    title: str
    stand_in: str | None
    command: str
    seconds: float
    environment: dict[str, Any]
    grids: list[Grid]
    comparisons: list[Comparison]
    numbers: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    figure: Any = None
    drawn: list[str] = field(default_factory=list)

    @property
    def pictures(self) -> list[str]:
        """Names of the pictures that [`save`] writes, or has written."""
        beside = any(comparison.neutral is not None for comparison in self.comparisons)
        return self.drawn or ["figure"] * (self.figure is not None) + ["beside"] * beside

    @property
    def heading(self) -> str:
        """The title, and never the paper's data without what stands for them."""
        return self.title + (f" ({self.stand_in})" if self.stand_in else "")

    def save(self, folder: Path) -> list[Path]:
        """Write `result.md`, `result.json`, `figure` and, ours beside the paper's, `beside`; returns the files."""
        pictures = {"figure": self.figure, "beside": draw_comparisons(self.comparisons)}
        paths = [
            path
            for name, picture in pictures.items()
            if picture is not None
            for path in save_figure(picture, folder, name)
        ]
        lines = [f"# {self.heading}", "", f"    {self.command}", "", self.told(), ""]
        lines += [grid.markdown() for grid in self.grids]
        lines += [f"- {note}" for note in self.notes]
        lines += ["", *(f"![{self.title}]({path.name})" for path in paths if path.suffix == ".png")]
        write_atomically(folder / "result.md", ("\n".join(lines) + "\n").encode())
        write_atomically(folder / RESULT_NAME, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        return [folder / "result.md", folder / RESULT_NAME, *paths]

    def told(self) -> str:
        """Where and in how long it was made."""
        made = self.environment
        return f"{environment_text(made)}; {time_text(self.seconds)} of work; {made['date']}."

    def to_dict(self) -> dict[str, Any]:
        plain = ("paper", "item", "size", "title", "stand_in", "command", "seconds", "environment", "notes", "numbers")
        content = {name: getattr(self, name) for name in plain}
        content["comparisons"] = [
            vars(comparison) | {"agreement": comparison.agreement} for comparison in self.comparisons
        ]
        content["grids"] = [vars(grid) for grid in self.grids]
        return content | {"drawn": self.pictures}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "ItemResult":
        comparisons = [
            Comparison(**{name: value for name, value in fields.items() if name != "agreement"})
            for fields in content["comparisons"]
        ]
        grids = [Grid(**fields) for fields in content["grids"]]
        return cls(**content | {"comparisons": comparisons, "grids": grids})


def result_at(
    place: Place, data: Path | None, command: str, changed: list[str] | tuple[str, ...] = (), **content: Any
) -> ItemResult:
    """
    The result of an item, called as its declaration says, made here.

    Args:
        data, changed: as of [`stand_in`].
        content: the other fields of [`ItemResult`].
    """
    return ItemResult(
        paper=place.paper,
        item=place.name,
        size=place.size,
        title=place.item.title,
        stand_in=stand_in(place, data, changed),
        command=command,
        **{"environment": environment()} | content,
    )


def read_result(path: Path) -> ItemResult:
    """
    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is none of an item.
    """
    try:
        return ItemResult.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of `sas-hf paper`: {error!r}") from error
