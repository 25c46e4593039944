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

from ..report.figures import label_axes, require_matplotlib, save_figure
from ..report.files import write_atomically
from ..report.tables import Grid
from .reporting import read_log
from .tasks import Metric
from .tasks.task import LOSS


# What programs read of a study, beside `study.md`; a folder that has it has a report.
REPORT_NAME = "study.json"
METHOD = (
    "mean ± standard deviation over seeds; differences of the final {} are paired by seed, with their "
    "95 % confidence interval and two-sided p-value by Student's t, not corrected for the number of comparisons"
)


@dataclass(frozen=True)
class FinishedRun:
    """
    Attributes:
        variant, data, seed: place in the grid; `data` is "" where there is one.
        metrics: of the saved model, by name: the task's, such as "loss" (nats per token) or "accuracy".
        parameters: numbers in the saved weights.
        tokens_per_second: median over the log.
        curves: by name, tokens (steps where they are not known) and value of each evaluation.
    """

    variant: str
    data: str
    seed: int
    metrics: dict[str, float]
    parameters: int
    tokens_per_second: float | None
    curves: dict[str, list[tuple[int, float]]]

    @classmethod
    def read(
        cls, variant: str, data: str, seed: int, folder: Path, results: dict[str, float], metrics: Sequence[Metric]
    ) -> "FinishedRun":
        """
        Of a run's folder and what `train` returned.

        Args:
            metrics: of the run's task.

        Raises:
            ValueError: where the results lack one of them.
        """
        lines = read_log(folder)
        speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        found = {metric.name: metric.of(results) for metric in metrics}
        for name, value in found.items():
            if value is None:
                raise ValueError(f"{folder} has no {name!r} among its results ({', '.join(results)}).")
        curves = {
            metric.name: [
                (line["tokens"] or line["step"], value) for line in lines if (value := metric.of(line)) is not None
            ]
            for metric in metrics
        }
        speed = statistics.median(speeds) if speeds else None
        return cls(variant, data, seed, found, count_parameters(folder), speed, curves)


@dataclass(frozen=True)
class Summary:
    """
    A variant on one data set.

    Attributes:
        n: seeds.
        metrics: by name, mean and standard deviation (n - 1) over seeds; no deviation of one.
        differences: by name, this minus first variant over the seeds of both, as [`paired_test`] gives it; of the
            first variant itself none.
    """

    variant: str
    data: str
    n: int
    metrics: dict[str, tuple[float, float | None]]
    parameters: int
    tokens_per_second: float | None
    differences: dict[str, dict[str, float | None]]


class StudyReport:
    """
    Args:
        runs: that have ended; the first's variant is what the others are compared with.
        study: its fields, for `study.json`.
        figure: "curves", "curves-over-time", "bars" or "sweep".
        variables: of a sweep, the number of each variant.
        metrics: that the table shows, which the runs have.
        metric: by which the variants are compared and which is drawn; the first where `None`.
        across: what a curve is over: "tokens", or "steps" where the runs do not know their tokens.
    """

    def __init__(
        self,
        runs: Sequence[FinishedRun],
        study: dict | None = None,
        figure: str = "curves",
        variables: dict[str, float] | None = None,
        metrics: Sequence[Metric] = (LOSS,),
        metric: Metric | None = None,
        across: str = "tokens",
    ):
        self.runs, self.study, self.figure = list(runs), study or {}, figure
        self.variables, self.across = variables or {}, across
        self.metrics, self.metric = list(metrics), metric or metrics[0]
        better = " (higher is better)" if self.metric.higher_is_better else ""
        self.method = METHOD.format(self.metric.label + better)
        self.variants = list(dict.fromkeys(run.variant for run in runs))
        self.data = list(dict.fromkeys(run.data for run in runs))
        self.summaries = [self._summary(data, variant) for data in self.data for variant in self.variants]

    def of(self, data: str, variant: str) -> list[FinishedRun]:
        """The runs of a variant, by seed."""
        found = [run for run in self.runs if (run.data, run.variant) == (data, variant)]
        return sorted(found, key=lambda run: run.seed)

    def grids(self) -> list[Grid]:
        """A table per data set."""
        header = ["variant", *(metric.label for metric in self.metrics), "parameters", "tokens/s", "n"]
        header += [f"minus {self.variants[0]}", "95 % interval", "p"]
        title = "Final losses" if self.metrics[0] == LOSS else "Final results"
        return [
            Grid(
                f"{title}: {data}" if data else title,
                header,
                [self._row(summary) for summary in self.summaries if summary.data == data],
                self.method + ".",
            )
            for data in self.data
        ]

    def save(self, folder: Path) -> list[Path]:
        """Write `study.md`, `study.json` and the figure; returns the files."""
        figures = save_figure(self.draw(), folder, self.figure)
        told = {name: self.study.get(name) for name in ("recipe", "overrides", "seeds", "data", "variants", "metric")}
        declared = [f"- {name}: `{json.dumps(value)}`" for name, value in told.items() if value]
        title = f"# Study {Path(self.study.get('output', '')).name}".rstrip()
        tables = [grid.markdown() for grid in self.grids()]
        document = "\n".join([title, "", *declared, "", *tables, f"![{self.figure}]({figures[0].name})", ""])
        write_atomically(folder / "study.md", document.encode())
        content = {
            "study": self.study,
            "method": self.method,
            "metric": self.metric.name,
            "summaries": [self._summary_fields(summary) for summary in self.summaries],
            "runs": [self._run_fields(run) for run in self.runs],
        }
        write_atomically(folder / REPORT_NAME, (json.dumps(content, indent=2) + "\n").encode())
        return [folder / "study.md", folder / REPORT_NAME, *figures]

    def _run_fields(self, run: FinishedRun) -> dict:
        """For `study.json`: metrics by name, and the curve of the study's own metric before the others'."""
        fields = asdict(run)
        metrics, curves = fields.pop("metrics"), fields.pop("curves")
        first = {name: fields.pop(name) for name in ("variant", "data", "seed")}
        return first | metrics | fields | {"curve": curves.pop(self.metric.name), "curves": curves}

    def _summary_fields(self, summary: Summary) -> dict:
        """Likewise, and the difference of the study's own metric before the others'."""
        fields = asdict(summary)
        metrics, differences = fields.pop("metrics"), fields.pop("differences")
        first = {name: fields.pop(name) for name in ("variant", "data", "n")}
        own = differences.pop(self.metric.name, dict.fromkeys(("difference", "low", "high", "p_value")))
        return first | metrics | fields | own | {"differences": differences}

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
        label_axes(axes, self.across, self.metric.label, data)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.legend()

    def _curves_over_time(self, axes, data: str) -> None:
        summaries = [summary for summary in self.summaries if summary.data == data]
        self._draw_curves(axes, data, {s.variant: s.tokens_per_second for s in summaries if s.tokens_per_second})
        label_axes(axes, "seconds of training, at the median speed", self.metric.label, data)
        axes.ticklabel_format(axis="y", useOffset=False)

    def _draw_curves(self, axes, data: str, scales: dict[str, float]) -> None:
        for variant, scale in scales.items():
            curves = [dict(run.curves[self.metric.name]) for run in self.of(data, variant)]
            shared = sorted(set.intersection(*(set(curve) for curve in curves)))
            points = [mean_and_deviation([curve[place] for curve in curves]) for place in shared]
            places = [place / scale for place in shared]
            (line,) = axes.plot(places, [mean for mean, _ in points], marker="o", markersize=3, label=variant)
            if len(curves) > 1:
                low, high = ([mean + sign * deviation for mean, deviation in points] for sign in (-1, 1))
                axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)

    def _bars(self, axes, data: str) -> None:
        for place, variant in enumerate(self.variants):
            mean, deviation = self._final(data, variant)
            axes.bar(place, mean, 0.7, yerr=deviation, capsize=3)
        values = [run.metrics[self.metric.name] for run in self.runs if run.data == data]
        reach = max(values) - min(values) or 1.0  # differences are small: the axis does not begin at 0
        axes.set_ylim(min(values) - reach, max(values) + reach / 2)
        axes.set_xticks(range(len(self.variants)), self.variants, rotation=30, ha="right")
        label_axes(axes, "", f"final {self.metric.label}", data)

    def _sweep(self, axes, data: str) -> None:
        order = sorted(self.variants, key=self.variables.__getitem__)
        points = [self._final(data, variant) for variant in order]
        places = [self.variables[variant] for variant in order]
        deviations = [deviation or 0.0 for _, deviation in points]
        axes.errorbar(places, [mean for mean, _ in points], deviations, marker="o", capsize=3)
        if min(places) > 0 and max(places) >= 8 * min(places):
            axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        variable = self.study["variable"].rpartition(".")[2].replace("_", " ")
        label_axes(axes, variable, f"final {self.metric.label}", data)

    def _final(self, data: str, variant: str) -> tuple[float, float | None]:
        return mean_and_deviation([run.metrics[self.metric.name] for run in self.of(data, variant)])

    def _summary(self, data: str, variant: str) -> Summary:
        runs, first = self.of(data, variant), {run.seed: run.metrics for run in self.of(data, self.variants[0])}
        shared = [(first[run.seed], run.metrics) for run in runs if run.seed in first]
        speeds = [run.tokens_per_second for run in runs if run.tokens_per_second is not None]
        names = [metric.name for metric in self.metrics]
        differences = {
            name: paired_test([before[name] for before, _ in shared], [now[name] for _, now in shared])
            for name in (names if variant != self.variants[0] else ())
        }
        return Summary(
            variant,
            data,
            len(runs),
            {name: mean_and_deviation([run.metrics[name] for run in runs]) for name in names},
            runs[0].parameters,
            statistics.mean(speeds) if speeds else None,
            differences,
        )

    def _row(self, summary: Summary) -> list[str]:
        digits, spreads = self.metric.digits, summary.metrics
        row = [summary.variant, *(_spread(spreads[metric.name], metric.digits) for metric in self.metrics)]
        row.append(f"{summary.parameters:,}")
        row.append(f"{summary.tokens_per_second:,.0f}" if summary.tokens_per_second else "-")
        row.append(str(summary.n))
        found = summary.differences.get(self.metric.name)
        if found is None:
            return [*row, "-", "-", "-"]
        row.append(f"{found['difference']:+.{digits}f}")
        row.append("-" if found["low"] is None else f"{found['low']:+.{digits}f} to {found['high']:+.{digits}f}")
        return [*row, "-" if found["p_value"] is None else f"{found['p_value']:.2g}"]


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


def _spread(value: tuple[float, float | None], digits: int) -> str:
    mean, deviation = value
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")
