"""What the runs of a study say together, as tables and files; the figure is in `study_figures.py`."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..report.figures import save_figure
from ..report.files import write_atomically
from ..report.tables import TERMINAL, Grid
from .study_figures import draw_study
from .study_matched import Match
from .study_rates import RATE_SEED, RateChoice
from .study_results import Arrival, FinishedRun, detectable, mean_and_deviation, paired_test, step_reaching
from .tasks import Metric
from .tasks.task import LOSS


# What programs read of a study, beside `study.md`; a folder that has it has a report.
REPORT_NAME = "study.json"
# Of a difference: what `paired_test` and `detectable` give.
DIFFERENCE = ("difference", "low", "high", "p_value", "deviation", "detectable")
# Fields of the study that head `study.md`.
TOLD = ("recipe", "overrides", "seeds", "learning_rates", "data", "variants", "matched", "metric")
SPREAD = "mean ± standard deviation over seeds"
RATES_BESIDE = 5  # that a terminal has room for, beside a variant's name
PAIRED = (
    "differences of the final {} are paired by seed, with their 95 % confidence interval and two-sided p-value by "
    "Student's t, not corrected for the number of comparisons"
)
SPREADS = (
    "sd: the standard deviation of the paired differences; 80 % power at: the smallest true difference that as many "
    "pairs of this spread find with a probability of 80 % (two-sided at 5 %, by the noncentral t)"
)


@dataclass(frozen=True)
class Summary:
    """
    A variant on one data set.

    Attributes:
        n: seeds.
        metrics: by name, mean and standard deviation (n - 1) over seeds; no deviation of one.
        differences: by name, this minus first variant over the seeds of both, as [`paired_test`] and [`detectable`]
            give it; of the first variant itself none.
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
        variables: of a sweep, the number of each variant; its axis is called by the study's `variable_label`, or by
            its `variable`.
        metrics: that the tables show, which the runs have.
        metric: by which the variants are compared and which is drawn; the first where `None`.
        across: what a curve is over: "tokens", or "steps" where the runs do not know their tokens.
        rates: the learning rates that were found.
        matches: what the matched variants got.

    Attributes:
        summaries: of each variant on each data set.
        arrivals: of each run that has one of the first variant beside it, and curves.

    Raises:
        ValueError: for a sweep that has no number of a variant.
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
        rates: Sequence[RateChoice] = (),
        matches: Sequence[Match] = (),
    ):
        self.runs, self.study, self.figure = list(runs), study or {}, figure
        self.variables, self.across, self.rates = variables or {}, across, list(rates)
        self.matches = list(matches)
        self.metrics, self.metric = list(metrics), metric or metrics[0]
        self.paired = PAIRED.format(_said(self.metric))
        self.variants = list(dict.fromkeys(run.variant for run in runs))
        self.data = list(dict.fromkeys(run.data for run in runs))
        if lacking := [name for name in self.variants if figure == "sweep" and name not in self.variables]:
            raise ValueError(f"`variables` has no number of {', '.join(lacking)}; a sweep needs one of every variant.")
        grid = [(data, variant) for data in self.data for variant in self.variants]
        self.summaries = [self._summary(data, variant) for data, variant in grid]
        self.arrivals = [arrival for data, variant in grid for arrival in self._arrivals(data, variant)]

    def of(self, data: str, variant: str) -> list[FinishedRun]:
        """The runs of a variant, by seed."""
        found = [run for run in self.runs if (run.data, run.variant) == (data, variant)]
        return sorted(found, key=lambda run: run.seed)

    def final(self, data: str, variant: str) -> tuple[float, float | None]:
        """Mean and deviation of the study's metric."""
        return mean_and_deviation([run.metrics[self.metric.name] for run in self.of(data, variant)])

    def chance(self, data: str) -> float | None:
        """What who guesses has of the study's metric."""
        known = {run.chance.get(self.metric.name) for run in self.runs if run.data == data}
        return known.pop() if len(known) == 1 else None

    def grids(self, whole: bool = False) -> list[Grid]:
        """
        The tables, data set by data set: results; differences from the first variant; the learning rates that were
        tried, and what matched variants got; the metric by step; when each variant is where the first ended.

        Args:
            whole: by step all metrics and all evaluations, as pages have room for; else the study's metric, and of the
                evaluations as many as a terminal has.
        """
        grids = []
        for data in self.data:
            grids.append(self._results(data))
            if len(self.variants) > 1:
                grids += self._differences(data, whole)
            grids += [*self._rates(data), *self._matches(data)]
            for metric in self.metrics if whole else [self.metric]:
                if any(run.by_step(metric.name) for run in self.runs if run.data == data):
                    grids.append(self._by_step(data, metric, whole))
            if len(self.variants) > 1 and any(arrival.data == data for arrival in self.arrivals):
                grids.append(self._arrival_times(data))
        return grids

    def draw(self, figure=None):
        """
        The figure, a panel per data set; of "curves-over-time" two.

        Args:
            figure: a matplotlib `Figure` or `SubFigure` to draw in; a new one where `None`.
        """
        return draw_study(self, figure)

    def save(self, folder: Path) -> list[Path]:
        """Write `study.md`, `study.json` and the figure; returns the files."""
        figures = save_figure(self.draw(), folder, self.figure)
        told = {name: self.study.get(name) for name in TOLD}
        declared = [f"- {name}: `{json.dumps(value)}`" for name, value in told.items() if value]
        title = f"# Study {Path(self.study.get('output', '')).name}".rstrip()
        tables = [grid.markdown() for grid in self.grids(whole=True)]
        document = "\n".join([title, "", *declared, "", *tables, f"![{self.figure}]({figures[0].name})", ""])
        write_atomically(folder / "study.md", document.encode())
        write_atomically(folder / REPORT_NAME, (json.dumps(self.content(), indent=2) + "\n").encode())
        return [folder / "study.md", folder / REPORT_NAME, *figures]

    def content(self) -> dict:
        """What `study.json` holds: every number, and the curves of all metrics."""
        return {
            "study": self.study,
            "method": f"{SPREAD}; {self.paired}",
            "metric": self.metric.name,
            "rates": [self._rate_fields(choice) for choice in self.rates],
            "matches": [asdict(match) for match in self.matches],
            "summaries": [self._summary_fields(summary) for summary in self.summaries],
            "arrivals": [asdict(arrival) for arrival in self.arrivals],
            "runs": [self._run_fields(run) for run in self.runs],
        }

    def _rate_fields(self, choice: RateChoice) -> dict:
        tried = [{"rate": rate, self.metric.name: value} for rate, value in choice.tried.items()]
        return asdict(choice) | {"tried": tried, "edge": choice.edge}

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
        own = differences.pop(self.metric.name, dict.fromkeys(DIFFERENCE))
        return first | metrics | fields | own | {"differences": differences}

    def _summary(self, data: str, variant: str) -> Summary:
        runs, first = self.of(data, variant), {run.seed: run.metrics for run in self.of(data, self.variants[0])}
        shared = [(first[run.seed], run.metrics) for run in runs if run.seed in first]
        speeds = [run.tokens_per_second for run in runs if run.tokens_per_second is not None]
        names = [metric.name for metric in self.metrics]
        differences = {
            name: _compared([before[name] for before, _ in shared], [now[name] for _, now in shared])
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

    def _arrivals(self, data: str, variant: str) -> list[Arrival]:
        name, found = self.metric.name, []
        first = {run.seed: run for run in self.of(data, self.variants[0])}
        for run in self.of(data, variant):
            goal, curve = first.get(run.seed), run.by_step(name)
            if goal is None or not curve or not goal.by_step(name):
                continue
            value, last = goal.metrics[name], goal.by_step(name)[-1][0]
            step = step_reaching(curve, value, self.metric.higher_is_better)
            found.append(Arrival(variant, data, run.seed, value, step, None if step is None else step / last))
        return found

    def _results(self, data: str) -> Grid:
        summaries = [summary for summary in self.summaries if summary.data == data]
        header, rows = ["variant", *(metric.label for metric in self.metrics), "parameters"], []
        timed = any(summary.tokens_per_second for summary in summaries)  # some tasks do not count tokens
        for summary in summaries:
            row = [_spread(summary.metrics[metric.name], metric.digits) for metric in self.metrics]
            speed = [f"{summary.tokens_per_second:,.0f}" if summary.tokens_per_second else "-"] if timed else []
            rows.append([summary.variant, *row, f"{summary.parameters:,}", *speed, str(summary.n)])
        title = "Final losses" if self.metrics[0] == LOSS else "Final results"
        header += [*(["tokens/s"] if timed else []), "n"]
        return Grid(_titled(title, data), header, rows, f"{SPREAD}.")

    def _differences(self, data: str, whole: bool) -> list[Grid]:
        """In one table, or where a terminal has no room for it, what they can tell in another."""
        label, digits, rows = self.metric.label, self.metric.digits, []
        for summary in self.summaries:
            found = summary.differences.get(self.metric.name)
            if summary.data != data or found is None:
                continue
            between = "-" if found["low"] is None else f"{found['low']:+.{digits}f} to {found['high']:+.{digits}f}"
            pairs = {run.seed for run in self.of(data, self.variants[0])}
            pairs &= {run.seed for run in self.of(data, summary.variant)}
            chance = "-" if found["p_value"] is None else f"{found['p_value']:.2g}"
            spreads = ["-" if found[name] is None else f"{found[name]:.{digits}f}" for name in DIFFERENCE[-2:]]
            difference = f"{found['difference']:+.{digits}f}"
            rows.append([summary.variant, difference, between, chance, *spreads, str(len(pairs))])
        header = ["variant", f"minus {self.variants[0]}", "95 % interval", "p", "sd", "80 % power at", "n"]
        title = _titled(f"Differences of the final {label}", data)
        grid = Grid(title, header, rows, f"{self.paired}; {SPREADS}.")
        if whole or grid.fits:
            return [grid]

        def part(title: str, places: tuple[int, ...], caption: str) -> Grid:
            return Grid(title, [header[p] for p in places], [[row[p] for p in places] for row in rows], caption)

        beneath = _titled(f"What differences of the final {label} could be found", data)
        return [part(title, (0, 1, 2, 3, 6), f"{self.paired}."), part(beneath, (0, 4, 5, 6), f"{SPREADS}.")]

    def _rates(self, data: str) -> list[Grid]:
        """As many rates beside each other as a terminal has room for, the others in tables below."""
        choices = [choice for choice in self.rates if choice.data == data]
        rates = sorted({rate for choice in choices for rate in choice.tried})
        edges = [f"{choice.variant} got the {choice.edge} rate tried" for choice in choices if choice.edge]
        caption = f"{_said(self.metric)} with seed {RATE_SEED:,}, which counts in no other table; *: the best, which "
        caption += "the variant's seeds are trained with. "
        caption += f"The best may lie beyond: {'; '.join(edges)}." if edges else ""
        grids = []
        for start in range(0, len(rates), RATES_BESIDE):
            shown = rates[start : start + RATES_BESIDE]
            rows = [[choice.variant, *(self._tried(choice, rate) for rate in shown)] for choice in choices]
            grids.append(Grid(_titled("Learning rates", data), ["variant", *(f"{r:g}" for r in shown)], rows))
        if grids:
            grids[-1].caption = caption.strip()
        return grids

    def _matches(self, data: str) -> list[Grid]:
        rows = [
            [match.variant, match.of, match.to, match.by, match.gets] for match in self.matches if match.data == data
        ]
        header = ["variant", "is", "at the cost of", "by", "with"]
        caption = "its learning rate is that of the variant which it is; widths are those of feed-forward layers."
        return [Grid(_titled("Matched variants", data), header, rows, caption, text_columns=4)] if rows else []

    def _tried(self, choice: RateChoice, rate: float) -> str:
        value = choice.tried[rate]
        text = "diverged" if value is None else f"{value:.{self.metric.digits}f}"
        return f"{text}*" if rate == choice.rate else text

    def _by_step(self, data: str, metric: Metric, whole: bool) -> Grid:
        """A column per evaluation, or as many of them, evenly with the last, as a terminal is wide; "-" where not all
        seeds of a variant were evaluated."""
        curves = {
            variant: [dict(run.by_step(metric.name)) for run in self.of(data, variant)] for variant in self.variants
        }
        steps = sorted({step for runs in curves.values() for run in runs for step in run})
        most = len(steps) if whole else min(len(steps), TERMINAL // 2)
        for count in range(most, 0, -1):
            shown = [steps[(place + 1) * len(steps) // count - 1] for place in range(count)]
            rows = []
            for variant, runs in curves.items():
                cells = [[run[step] for run in runs if step in run] for step in shown]
                texts = [_spread(mean_and_deviation(c), metric.digits) if len(c) == len(runs) else "-" for c in cells]
                rows.append([variant, *texts])
            caption = f"{_said(metric)} after so many steps, {SPREAD}"
            caption += f"; {count} of {len(steps)} evaluations, study.md has all." if count < len(steps) else "."
            header = ["variant", *(f"{step:,}" for step in shown)]
            title = f"{metric.label[0].upper()}{metric.label[1:]} by step"
            grid = Grid(_titled(title, data), header, rows, caption)
            if whole or grid.width <= TERMINAL:
                break
        return grid

    def _arrival_times(self, data: str) -> Grid:
        first, label, rows = self.variants[0], self.metric.label, []
        for variant in self.variants:
            tried = [arrival for arrival in self.arrivals if (arrival.data, arrival.variant) == (data, variant)]
            steps = [arrival.step for arrival in tried if arrival.step is not None]
            shares = [100 * arrival.share for arrival in tried if arrival.share is not None]
            times = [*_mean_and_range(steps, "{:,.0f}"), *_mean_and_range(shares, "{:.0f} %")]
            rows.append([variant, f"{len(steps)} of {len(tried)}", *(times if steps else ["not reached", "", "", ""])])
        caption = (
            f"the first step at which a run has the {label} that {first} has in the end with the same seed, linear "
            f"between evaluations; mean and range over the seeds that reach it, also as share of all steps of {first}."
        )
        header = ["variant", "seeds", "step", "range", "share", "range"]
        return Grid(_titled(f"Steps to the final {label} of {first}", data), header, rows, caption)


def kept_runs(content: dict) -> list[FinishedRun]:
    """The runs of what [`StudyReport.content`] gave."""
    known = [each.name for each in fields(FinishedRun)]
    runs = []
    for kept in content["runs"]:
        metrics = {name: value for name, value in kept.items() if name not in (*known, "curve")}
        curves = {content["metric"]: kept["curve"]} | kept["curves"]
        given = {name: kept[name] for name in known if name in kept}
        runs.append(FinishedRun(**given | {"metrics": metrics, "curves": curves}))
    return runs


def _compared(first: list[float], second: list[float]) -> dict[str, float | None]:
    return paired_test(first, second) | detectable([b - a for a, b in zip(first, second, strict=True)])


def _titled(title: str, data: str) -> str:
    return f"{title}: {data}" if data else title


def _said(metric: Metric) -> str:
    return metric.label + (" (higher is better)" if metric.higher_is_better else "")


def _spread(value: tuple[float, float | None], digits: int) -> str:
    mean, deviation = value
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def _mean_and_range(values: list[float], style: str) -> list[str]:
    if not values:
        return ["", ""]
    low, high = (style.format(value) for value in (min(values), max(values)))
    return [style.format(statistics.mean(values)), f"{low} to {high}" if low != high else low]
