"""What the runs of a study say together: means and deviations over seeds, paired tests, a table and a figure."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from scipy.stats import ttest_rel

from ..figures import label_axes, require_matplotlib, save_figure
from ..files import write_atomically
from ..tables import Grid
from .reporting import read_log


METHOD = (
    "mean ± standard deviation over seeds; differences of the final validation loss are paired by seed, with their "
    "95 % confidence interval and two-sided p-value by Student's t, not corrected for the number of comparisons"
)


@dataclass(frozen=True)
class FinishedRun:
    """
    Attributes:
        variant, data, seed: place in the grid; `data` is "" where there is one.
        loss: final validation loss, nats per token.
        perplexity: exp of it; `None` for other than language models.
        parameters: numbers in the saved weights.
        tokens_per_second: median over the log.
        curve: tokens (steps where they are not known) and validation loss of each evaluation.
    """

    variant: str
    data: str
    seed: int
    loss: float
    perplexity: float | None
    parameters: int
    tokens_per_second: float | None
    curve: list[tuple[int, float]]

    @classmethod
    def read(cls, variant: str, data: str, seed: int, folder: Path, metrics: dict[str, float]) -> "FinishedRun":
        """Of a run's folder and what `train` returned."""
        lines = read_log(folder)
        speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        curve = [(line["tokens"] or line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
        loss, perplexity = metrics["eval_loss"], metrics.get("perplexity")
        speed = statistics.median(speeds) if speeds else None
        return cls(variant, data, seed, loss, perplexity, count_parameters(folder), speed, curve)


@dataclass(frozen=True)
class Summary:
    """
    A variant on one data set.

    Attributes:
        n: seeds.
        loss, perplexity: mean and standard deviation (n - 1) over seeds; no deviation of one.
        difference: of the loss, mean of this minus first variant over the seeds of both; `None` for the first.
        low, high: ends of its 95 % confidence interval; `None` for one seed.
        p_value: of no difference, two-sided; `None` for one seed or equal differences.
    """

    variant: str
    data: str
    n: int
    loss: tuple[float, float | None]
    perplexity: tuple[float, float | None] | None
    parameters: int
    tokens_per_second: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


class StudyReport:
    """
    Args:
        runs: that have ended; the first's variant is what the others are compared with.
        study: its fields, for `study.json`.
        figure: "curves", "curves-over-time", "bars" or "sweep".
        variables: of a sweep, the number of each variant.
    """

    def __init__(
        self,
        runs: Sequence[FinishedRun],
        study: dict | None = None,
        figure: str = "curves",
        variables: dict[str, float] | None = None,
    ):
        self.runs, self.study, self.figure = list(runs), study or {}, figure
        self.variables = variables or {}
        self.variants = list(dict.fromkeys(run.variant for run in runs))
        self.data = list(dict.fromkeys(run.data for run in runs))
        self.summaries = [self._summary(data, variant) for data in self.data for variant in self.variants]

    def of(self, data: str, variant: str) -> list[FinishedRun]:
        """The runs of a variant, by seed."""
        found = [run for run in self.runs if (run.data, run.variant) == (data, variant)]
        return sorted(found, key=lambda run: run.seed)

    def grids(self) -> list[Grid]:
        """A table per data set."""
        header = ["variant", "validation loss", "perplexity", "parameters", "tokens/s", "n"]
        header += [f"minus {self.variants[0]}", "95 % interval", "p"]
        return [
            Grid(
                f"Final losses: {data}" if data else "Final losses",
                header,
                [_row(summary) for summary in self.summaries if summary.data == data],
                METHOD + ".",
            )
            for data in self.data
        ]

    def save(self, folder: Path) -> list[Path]:
        """Write `study.md`, `study.json` and the figure; returns the files."""
        figures = save_figure(self.draw(), folder, self.figure)
        told = {name: self.study.get(name) for name in ("recipe", "overrides", "seeds", "data", "variants")}
        declared = [f"- {name}: `{json.dumps(value)}`" for name, value in told.items() if value]
        title = f"# Study {Path(self.study.get('output', '')).name}".rstrip()
        tables = [grid.markdown() for grid in self.grids()]
        document = "\n".join([title, "", *declared, "", *tables, f"![{self.figure}]({figures[0].name})", ""])
        write_atomically(folder / "study.md", document.encode())
        content = {
            "study": self.study,
            "method": METHOD,
            "summaries": [asdict(summary) for summary in self.summaries],
            "runs": [asdict(run) for run in self.runs],
        }
        write_atomically(folder / "study.json", (json.dumps(content, indent=2) + "\n").encode())
        return [folder / "study.md", folder / "study.json", *figures]

    def draw(self):
        """The figure, a panel per data set; of "curves-over-time" two."""
        require_matplotlib()
        from matplotlib.figure import Figure

        panels = {
            "curves": [self._curves],
            "curves-over-time": [self._curves, self._curves_over_time],
            "bars": [self._bars],
            "sweep": [self._sweep],
        }[self.figure]
        columns = len(panels) * len(self.data)
        figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
        for number, (data, draw) in enumerate(itertools.product(self.data, panels), 1):
            draw(figure.add_subplot(1, columns, number), data)
        return figure

    def _curves(self, axes, data: str) -> None:
        self._draw_curves(axes, data, dict.fromkeys(self.variants, 1))
        label_axes(axes, "tokens", "validation loss", data)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.legend()

    def _curves_over_time(self, axes, data: str) -> None:
        summaries = [summary for summary in self.summaries if summary.data == data]
        self._draw_curves(axes, data, {s.variant: s.tokens_per_second for s in summaries if s.tokens_per_second})
        label_axes(axes, "seconds of training, at the median speed", "validation loss", data)
        axes.ticklabel_format(axis="y", useOffset=False)

    def _draw_curves(self, axes, data: str, tokens_per_unit: dict[str, float]) -> None:
        for variant, scale in tokens_per_unit.items():
            curves = [dict(run.curve) for run in self.of(data, variant)]
            tokens = sorted(set.intersection(*(set(curve) for curve in curves)))
            points = [mean_and_deviation([curve[place] for curve in curves]) for place in tokens]
            places = [place / scale for place in tokens]
            (line,) = axes.plot(places, [mean for mean, _ in points], marker="o", markersize=3, label=variant)
            if len(curves) > 1:
                low, high = ([mean + sign * deviation for mean, deviation in points] for sign in (-1, 1))
                axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)

    def _bars(self, axes, data: str) -> None:
        for place, variant in enumerate(self.variants):
            mean, deviation = self._loss(data, variant)
            axes.bar(place, mean, 0.7, yerr=deviation, capsize=3)
        losses = [run.loss for run in self.runs if run.data == data]
        reach = max(losses) - min(losses) or 1.0  # differences are small: the axis does not begin at 0
        axes.set_ylim(min(losses) - reach, max(losses) + reach / 2)
        axes.set_xticks(range(len(self.variants)), self.variants, rotation=30, ha="right")
        label_axes(axes, "", "final validation loss", data)

    def _sweep(self, axes, data: str) -> None:
        order = sorted(self.variants, key=self.variables.__getitem__)
        points = [self._loss(data, variant) for variant in order]
        places = [self.variables[variant] for variant in order]
        deviations = [deviation or 0.0 for _, deviation in points]
        axes.errorbar(places, [mean for mean, _ in points], deviations, marker="o", capsize=3)
        if min(places) > 0 and max(places) >= 8 * min(places):
            axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        label_axes(axes, self.study["variable"].rpartition(".")[2].replace("_", " "), "final validation loss", data)

    def _loss(self, data: str, variant: str) -> tuple[float, float | None]:
        return mean_and_deviation([run.loss for run in self.of(data, variant)])

    def _summary(self, data: str, variant: str) -> Summary:
        runs, first = self.of(data, variant), {run.seed: run.loss for run in self.of(data, self.variants[0])}
        perplexities = [run.perplexity for run in runs if run.perplexity is not None]
        speeds = [run.tokens_per_second for run in runs if run.tokens_per_second is not None]
        paired = {}
        if variant != self.variants[0]:
            shared = [run for run in runs if run.seed in first]
            paired = paired_test([first[run.seed] for run in shared], [run.loss for run in shared])
        return Summary(
            variant,
            data,
            len(runs),
            self._loss(data, variant),
            mean_and_deviation(perplexities) if perplexities else None,
            runs[0].parameters,
            statistics.mean(speeds) if speeds else None,
            **paired,
        )


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation with n - 1 degrees of freedom; `None` for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_test(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """
    Mean of second minus first, pair by pair, its 95 % confidence interval and p-value by Student's t.

    Returns:
        "difference", "low", "high", "p_value"; the last three `None` for one pair, the last for equal differences too.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return {"difference": mean, "low": None, "high": None, "p_value": None}
    if len(set(differences)) == 1:
        return {"difference": mean, "low": mean, "high": mean, "p_value": None}
    test = ttest_rel(second, first)
    interval = test.confidence_interval(0.95)
    low, high, p_value = map(float, (interval.low, interval.high, test.pvalue))
    return {"difference": mean, "low": low, "high": high, "p_value": p_value}


def count_parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, tied ones once."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def _row(summary: Summary) -> list[str]:
    def spread(value: tuple[float, float | None] | None, digits: int) -> str:
        if value is None:
            return "-"
        return f"{value[0]:.{digits}f}" + (f" ± {value[1]:.{digits}f}" if value[1] is not None else "")

    speed = f"{summary.tokens_per_second:,.0f}" if summary.tokens_per_second else "-"
    row = [summary.variant, spread(summary.loss, 4), spread(summary.perplexity, 2), f"{summary.parameters:,}", speed]
    row += [str(summary.n), "-" if summary.difference is None else f"{summary.difference:+.4f}"]
    row.append("-" if summary.low is None else f"{summary.low:+.4f} to {summary.high:+.4f}")
    return [*row, "-" if summary.p_value is None else f"{summary.p_value:.2g}"]
