"""Items that are trained: the study of an item, and its numbers beside the printed ones."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..report.printed import PaperRow
from ..report.tables import PAPER, Grid
from ..training.benchmarks import PREFIX
from ..training.models import load_config
from ..training.study import Run, Study, check_runs, plan_runs, report_of, run_study
from ..training.study_report import StudyReport, kept_runs
from ..training.study_results import mean_and_deviation, paired_test
from ..training.tasks import find_task
from .comparison import Comparison, ItemResult, meanings, result_at
from .items import Grid as Declared
from .items import Place, find_place, study_fields
from .parameters import attention_parameters, meta_model


# Of a printed perplexity, what differences are taken of: its logarithm, which is the loss.
PERPLEXITY = "perplexity"
# Printed in per cent, measured as shares, as benchmarks are.
SHARES = ("accuracy", "top5_accuracy", "token_accuracy")


@dataclass
class Part:
    """
    An item's trainings of one grid.

    Attributes:
        place: the item, with that grid alone.
        study: of the trainings.
        runs: them, which are planned.
    """

    place: Place
    study: Study
    runs: list[Run]


def plan_parts(
    place: Place,
    root: Path,
    output: Path,
    data: Path | None,
    seeds: list[int] | None,
    overrides: list[str] | tuple[str, ...],
    needs_data: bool = True,
) -> list[Part]:
    """
    What an item trains, grid by grid.

    Args:
        root: where the trainings are that items share.
        output: of the reports.
        data, seeds, overrides: of the user.
        needs_data: as of [`study_fields`].

    Raises:
        ValueError, FileNotFoundError: as [`study_fields`] and [`plan_runs`].
    """
    parts = []
    for each in place.parts:
        folder = output if len(place.parts) == 1 else output / cast(str, each.at.grid)
        study = make_study(each, root, folder, data, seeds, needs_data)
        parts.append(Part(each, study, plan_runs(study, overrides_of(each, overrides), needs_data)))
    return parts


def make_study(
    place: Place, root: Path, output: Path, data: Path | None, seeds: list[int] | None, needs_data: bool
) -> Study:
    """The study of an item's one grid; arguments and errors are those of [`plan_parts`]."""
    fields = study_fields(place, data, needs_data)
    if seeds is not None:
        fields["seeds"] = seeds
    chart: dict[str, Any] = {"figure": place.item.figure, "metric": next(iter(place.item.metrics))}
    if place.item.figure == "sweep":
        chart |= {"variable": place.numbers, "variable_label": place.item.number}
    runs = root / place.size / "runs" / cast(str, place.at.grid)
    return Study(output=str(output), runs=str(runs), **fields, **chart)


def overrides_of(place: Place, overrides: list[str] | tuple[str, ...]) -> list[str]:
    return [*place.at.overrides, *overrides]


def run_parts(
    parts: list[Part], overrides: list[str] | tuple[str, ...], progress: Callable[[str], None]
) -> list[StudyReport]:
    """Train what is not trained yet; raises as [`run_study`], for any of them before the first is begun."""
    for part in parts[1:]:
        check_runs(part.study, part.runs)
    return [run_study(part.study, overrides_of(part.place, overrides), progress) for part in parts]


def result_of(
    place: Place,
    parts: list[Part],
    reports: list[StudyReport],
    command: str,
    data: Path | None,
    overrides: list[str] | tuple[str, ...] = (),
) -> ItemResult:
    """What the trainings say beside what is printed; `data` and `overrides` are the user's."""
    grids, comparisons, notes = [], [], []
    for part, report in zip(parts, reports, strict=True):
        besides = list(_besides(part.place, report))
        grids += [*report.grids(), *(grid for beside in besides for grid in beside.grids())]
        comparisons += [comparison for beside in besides for comparison in beside.comparisons]
        tokens, told = saved(part.place, report)
        comparisons += [*counted(part.place, part.runs), *tokens]
        notes += [*filter(None, (_why(part.place.grid, data, overrides), part.place.at.note)), *told]
    contents = {}
    for part, report in zip(parts, reports, strict=True):
        contents[part.place.at.grid] = report.content()
        del contents[part.place.at.grid]["study"]  # the declaration says it, and this names places on this machine
    return result_at(
        place,
        data,
        command,
        overrides,
        seconds=sum(run.seconds or 0.0 for report in reports for run in report.runs),
        grids=grids,
        comparisons=comparisons,
        numbers={"parts": contents} if len(parts) > 1 else contents.popitem()[1],
        notes=[*dict.fromkeys(notes), *power(comparisons)],
        figure=_drawn(reports),
    )


def drawn_again(result: ItemResult):
    """The figure of a trained item, from what its result keeps."""
    place = find_place(result.paper, result.item, result.size)
    parts = plan_parts(place, Path(), Path(), None, None, [], needs_data=False)
    contents = result.numbers["parts"] if len(parts) > 1 else {parts[0].place.at.grid: result.numbers}
    reports = []
    for part in parts:
        content, recipe = contents[part.place.at.grid], part.runs[0].recipe
        runs, possible = kept_runs(content), find_task(recipe.task).possible_metrics(recipe)
        metrics = {metric.name: metric for metric in possible if metric.name in runs[0].metrics}
        metric = metrics[content["metric"]]
        reports.append(report_of(part.study, part.runs, runs, list(metrics.values()), metric, vars(part.study)))
    return _drawn(reports)


def _why(grid: Declared, data: Path | None, overrides: list[str] | tuple[str, ...]) -> str | None:
    """Why sizes and rates are as they are; of other data or fields it tells nothing, and says so."""
    other = overrides or (data is None and grid.instead is not None)
    return f"As declared, of {grid.text}: {grid.why}" if grid.why and other else grid.why


def counted(place: Place, runs: list[Run]) -> list[Comparison]:
    """The parameters of an attention layer of each variant, beside the printed ones."""
    if place.at.counted is None:
        return []
    column, found = place.table.columns.index(place.at.counted), []
    for run in {run.variant: run for run in runs}.values():
        label = place.at.data[run.data or next(iter(place.at.data))]
        row = place.printed_row(run.variant, label[0] if isinstance(label, list) else label)
        if row is not None:
            config = load_config(run.recipe.model, find_task(run.recipe.task).auto_class)
            ours = attention_parameters(meta_model(config))
            what = f"{run.variant}, {place.at.counted}"
            found.append(Comparison(what, "", ours, cast(float, row.values[column]), neutral=None))
    return found


def saved(place: Place, report: StudyReport) -> tuple[list[Comparison], list[str]]:
    """The tokens that each variant saves until it has what the first has in the end; and where it never has."""
    found, notes, first = [], [], place.variants[0]
    for data, label in _labels(place) if place.item.saved else ():
        for variant in place.variants:
            row = place.printed_row(variant, label)
            printed = None if row is None else place.value(row, cast(str, place.item.saved))
            tried = [arrival for arrival in report.arrivals if (arrival.data, arrival.variant) == (data, variant)]
            shares = [100 * arrival.share for arrival in tried if arrival.share is not None]
            if printed is None or not tried:
                continue
            if len(shares) < len(tried):
                missed = f"{len(tried) - len(shares)} of {len(tried)} seeds"
                notes.append(
                    f"With {missed}, {variant} never has what {first} has in the end: no tokens are compared."
                )
                continue
            ours = paired_test(shares, [100.0] * len(shares))
            what = (
                f"{variant}, {place.item.saved}, until it has what {first} has in the end{_where(place, data, label)}"
            )
            limits = (ours["low"], ours["high"])
            found.append(Comparison(what, "per cent", ours["difference"], printed, *limits, len(shares)))
    return found, notes


def _labels(place: Place) -> Iterator[tuple[str, str | None]]:
    """Each data set with each printed one that it stands for."""
    for name, labels in place.at.data.items():
        for label in labels if isinstance(labels, list) else [labels]:
            yield name, label


def _where(place: Place, data: str, label: str | None) -> str:
    """Of a comparison on one of several printed data sets: ours are never called by their name."""
    if label is None:
        return ""
    return f", {label}" if place.at.stands_for is None else f", {data} for {label}"


def _besides(place: Place, report: StudyReport) -> Iterator["Beside"]:
    for data, label in _labels(place):
        for metric, column in place.item.metrics.items():
            if any(place.value(row, column) is not None for row in place.rows_of(label)):
                yield Beside(place, report, data, label, metric, column)


def _drawn(reports: list[StudyReport]):
    if len(reports) == 1:
        return reports[0].draw()
    from matplotlib.figure import Figure

    widths = [len(report.data) for report in reports]
    figure = Figure(figsize=(5.5 * sum(widths), 4), layout="constrained")
    panels = figure.subfigures(1, len(reports), width_ratios=widths, squeeze=False)[0]
    for report, panel in zip(reports, panels, strict=True):
        report.draw(panel)
    return figure


def power(comparisons: list[Comparison]) -> list[str]:
    """What effects these runs could have shown: half the width of their intervals, beside the paper's."""
    notes = []
    for unit in dict.fromkeys(comparison.unit for comparison in comparisons):
        known = [c for c in comparisons if c.unit == unit and c.low is not None and c.neutral is not None]
        if not known:
            continue
        widths = sorted((cast(float, c.high) - cast(float, c.low)) / 2 for c in known)
        printed = sorted(abs(c.printed - cast(float, c.neutral)) for c in known)
        notes.append(
            f"Power: with n = {known[0].n}, the 95 % intervals reach {widths[0]:.2g} to {widths[-1]:.2g} {unit} to "
            f"either side (median {widths[len(widths) // 2]:.2g}); the paper's differences are {printed[0]:.2g} to "
            f"{printed[-1]:.2g} {unit}."
        )
    return notes


class Beside:
    """Our runs on one data set beside the printed rows of one, by one metric.

    Attributes:
        comparisons: of every variant that is printed with the one it is compared with.
    """

    def __init__(self, place: Place, report: StudyReport, data: str, label: str | None, metric: str, column: str):
        self.place, self.report, self.data, self.label, self.metric = place, report, data, label, metric
        self.columns, self.column = place.table.columns, column
        self.scale = 100 if metric in SHARES or metric.startswith(PREFIX) else 1
        self.digits = 2 if metric in (PERPLEXITY, "bleu") or self.scale == 100 else 4
        self.unit = "nats" if metric in (PERPLEXITY, "loss") else "BLEU" if metric == "bleu" else "points"
        self.compared = {
            variant: compared for variant in place.variants if (compared := self._compare(variant)) is not None
        }
        self.comparisons = list(self.compared.values())

    def _base(self, variant: str) -> str:
        return self.place.item.against.get(variant, self.place.variants[0])

    def row(self, variant: str) -> PaperRow | None:
        return self.place.printed_row(variant, self.label)

    def _printed_value(self, variant: str) -> float | None:
        row = self.row(variant)
        return None if row is None else self.place.value(row, self.column)

    def _values(self, variant: str, metric: str) -> dict[int, float]:
        return {run.seed: run.metrics[metric] for run in self.report.of(self.data, variant)}

    def _difference(self, variant: str) -> tuple[dict[str, Any], int] | None:
        """Of ours from what it is compared with, and of how many seeds; `None` of the first itself."""
        base = self._base(variant)
        if variant == base:
            return None
        metric = "loss" if self.metric == PERPLEXITY else self.metric
        first, second = self._values(base, metric), self._values(variant, metric)
        seeds = sorted(first.keys() & second.keys())
        before, now = ([self.scale * values[seed] for seed in seeds] for values in (first, second))
        return paired_test(before, now), len(seeds)

    def _compare(self, variant: str) -> Comparison | None:
        base, ours = self._base(variant), self._difference(variant)
        theirs, theirs_before = self._printed_value(variant), self._printed_value(base)
        if ours is None or theirs is None or theirs_before is None:
            return None
        found, count = ours
        where = _where(self.place, self.data, self.label)
        return Comparison(
            f"{variant} minus {base}, {self.metric}{where}",
            self.unit,
            found["difference"],
            math.log(theirs / theirs_before) if self.metric == PERPLEXITY else theirs - theirs_before,
            found["low"],
            found["high"],
            count,
        )

    def grids(self) -> list[Grid]:
        """Our rows beside the paper's: where they ended, and where the paper prints steps, over the training."""
        name = {PERPLEXITY: "Perplexity", "bleu": "BLEU"}.get(self.metric, self.metric.replace("_", " ").capitalize())
        heading = f"{name}, {self.data or 'ours'} beside the paper's {self.label or self.place.table.source}"
        caption = f"Differences in {self.unit}, paired by seed, with 95 % intervals"
        caption += " (of perplexities those of their logarithms)" if self.metric == PERPLEXITY else ""
        caption = "; ".join([caption, *meanings(self.comparisons)]) + "."
        header = ["variant", "ours", "paper", "ours: difference", "paper's", "agreement"]
        rows = [self._row(variant) for variant in self.place.variants]
        return [Grid(heading, header, rows, caption), *self._by_step(name)]

    def _row(self, variant: str) -> list[str]:
        values = [self.scale * value for value in self._values(variant, self.metric).values()]
        mean, deviation = mean_and_deviation(values)
        ours = f"{mean:.{self.digits}f}" + ("" if deviation is None else f" ± {deviation:.{self.digits}f}")
        theirs, compared = self._printed_value(variant), self.compared.get(variant)
        row = [variant, ours, "-" if theirs is None else f"{theirs:.{self.digits}f}"]
        if (difference := self._difference(variant)) is None:
            return [*row, "-", "-", "-"]
        found, digits = difference[0], 2 if self.unit in ("points", "BLEU") else 3
        ours = f"{found['difference']:+.{digits}f}"
        if found["low"] is not None:
            ours += f" ({found['low']:+.{digits}f} to {found['high']:+.{digits}f})"
        return [
            *row,
            ours,
            *(["-", "-"] if compared is None else [f"{compared.printed:+.{digits}f}", compared.agreement]),
        ]

    def _by_step(self, name: str) -> list[Grid]:
        if not self.place.item.by_step:
            return []
        count = len(self.columns)
        rows = []
        for variant in self.place.variants:
            runs = self.report.of(self.data, variant)
            curves = [run.curves[self.metric] for run in runs]
            if any(len(curve) != count for curve in curves):
                return []  # evaluated at other shares of the training than the paper
            rows.append(
                [variant, *(f"{sum(curve[i][1] for curve in curves) / len(curves):.1f}" for i in range(count))]
            )
            if (row := self.row(variant)) is not None:
                rows.append([PAPER + row.model, *("-" if value is None else f"{value:.1f}" for value in row.values)])
        header = ["of the steps", *(f"{100 * (number + 1) / count:.0f} %" for number in range(count))]
        steps = f"the paper's at {self.columns[0]} to {self.columns[-1]} steps"
        return [Grid(f"{name} over the training", header, rows, f"Ours at equal shares of the training; {steps}.")]
