"""Items that are trained: the study of an item, and its numbers beside the printed ones."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..report.printed import PaperRow
from ..report.tables import PAPER, Grid
from ..training.models import load_config
from ..training.study import Run, Study, plan_runs, run_study
from ..training.study_report import StudyReport
from ..training.study_results import mean_and_deviation, paired_test
from ..training.tasks import find_task
from .comparison import AGREEMENTS, Comparison, ItemResult, environment
from .items import Place, stand_in, study_fields
from .parameters import attention_parameters


# Of a printed perplexity, what differences are taken of: its logarithm, which is the loss.
PERPLEXITY = "perplexity"
# Printed in per cent, measured as shares.
SHARES = ("accuracy", "top5_accuracy", "token_accuracy")


def make_study(
    place: Place, root: Path, output: Path, data: Path | None, seeds: list[int] | None, needs_data: bool = True
) -> Study:
    """
    The study of an item.

    Args:
        root: where the trainings are that items share.
        output: of the report.
        data, seeds: of the user.
        needs_data: as of [`study_fields`].

    Raises:
        ValueError, FileNotFoundError: as [`study_fields`].
    """
    fields = study_fields(place, data, needs_data)
    if seeds is not None:
        fields["seeds"] = seeds
    chart: dict[str, Any] = {"figure": place.item.figure, "metric": next(iter(place.item.metrics))}
    if place.item.figure == "sweep":
        chart |= {"variable": place.numbers, "variable_label": place.item.number}
    runs = root / place.size / "runs" / place.at.grid
    return Study(output=str(output), runs=str(runs), **fields, **chart)


def overrides_of(place: Place, overrides: list[str] | tuple[str, ...]) -> list[str]:
    return [*place.at.overrides, *overrides]


def planned(place: Place, study: Study, overrides: list[str] | tuple[str, ...], needs_data: bool = True) -> list[Run]:
    """The trainings of an item; raises as [`plan_runs`]."""
    return plan_runs(study, overrides_of(place, overrides), needs_data)


def run_trainings(
    place: Place, study: Study, overrides: list[str] | tuple[str, ...], progress: Callable[[str], None]
) -> StudyReport:
    """Train what is not trained yet; raises as [`run_study`]."""
    return run_study(study, overrides_of(place, overrides), progress)


def result_of(place: Place, runs: list[Run], report: StudyReport, command: str, data: Path | None) -> ItemResult:
    """What the trainings say beside what is printed."""
    grids, comparisons = report.grids(), []
    for name, labels in place.at.data.items():
        for label in labels if isinstance(labels, list) else [labels]:
            for metric, column in place.item.metrics.items():
                beside = Beside(
                    place, report, name if len(place.at.data) > 1 else report.data[0], label, metric, column
                )
                grids += beside.grids()
                comparisons += beside.comparisons
    comparisons += counted(place, runs)
    return ItemResult(
        place.paper,
        place.name,
        place.size,
        place.item.title,
        stand_in(place, data),
        command,
        sum(run.seconds or 0.0 for run in report.runs),
        environment(),
        grids,
        comparisons,
        report.content(),
        [*([place.at.note] if place.at.note else []), *power(comparisons)],
        report.draw(),
    )


def counted(place: Place, runs: list[Run]) -> list[Comparison]:
    """The parameters of an attention layer of each variant, beside the printed ones."""
    if place.at.counted is None:
        return []
    column, found = place.table.columns.index(place.at.counted), []
    for run in {run.variant: run for run in runs}.values():
        label = place.at.data[run.data or next(iter(place.at.data))]
        row = place.printed_row(run.variant, label[0] if isinstance(label, list) else label)
        if row is not None:
            ours = attention_parameters(load_config(run.recipe.model, find_task(run.recipe.task).auto_class))
            what = f"{run.variant}, {place.at.counted}"
            found.append(Comparison(what, "", ours, row.values[column], neutral=None))
    return found


def power(comparisons: list[Comparison]) -> list[str]:
    """What effects these runs could have shown: half the width of their intervals, beside the paper's."""
    notes = []
    for unit in dict.fromkeys(comparison.unit for comparison in comparisons):
        known = [c for c in comparisons if c.unit == unit and c.low is not None and c.neutral is not None]
        if not known:
            continue
        widths = sorted((c.high - c.low) / 2 for c in known)
        printed = sorted(abs(c.printed - c.neutral) for c in known)
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
        table = place.table
        self.columns, self.column = table.columns, table.columns.index(column)
        self.digits = 2 if metric in (PERPLEXITY, "bleu", *SHARES) else 4
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
        return None if row is None else row.values[self.column]

    def _values(self, variant: str, metric: str) -> dict[int, float]:
        return {run.seed: run.metrics[metric] for run in self.report.of(self.data, variant)}

    def _compare(self, variant: str) -> Comparison | None:
        base = self._base(variant)
        theirs, before = self._printed_value(variant), self._printed_value(base)
        if variant == base or theirs is None or before is None:
            return None
        metric = "loss" if self.metric == PERPLEXITY else self.metric
        first, second = self._values(base, metric), self._values(variant, metric)
        seeds = sorted(first.keys() & second.keys())
        scale = 100 if self.metric in SHARES else 1
        found = paired_test([scale * first[seed] for seed in seeds], [scale * second[seed] for seed in seeds])
        where = f", {self.label}" if self.label else ""
        return Comparison(
            f"{variant} minus {base}, {self.metric}{where}",
            self.unit,
            found["difference"],
            math.log(theirs / before) if self.metric == PERPLEXITY else theirs - before,
            found["low"],
            found["high"],
            len(seeds),
        )

    def grids(self) -> list[Grid]:
        """Our rows beside the paper's: where they ended, and where the paper prints steps, over the training."""
        name = {PERPLEXITY: "Perplexity", "bleu": "BLEU"}.get(self.metric, self.metric.replace("_", " ").capitalize())
        heading = f"{name}, {self.data or 'ours'} beside the paper's {self.label or self.place.table.source}"
        caption = f"Differences in {self.unit}, paired by seed, with 95 % intervals"
        caption += " (of perplexities those of their logarithms)" if self.metric == PERPLEXITY else ""
        told = dict.fromkeys(comparison.agreement for comparison in self.comparisons)
        caption = "; ".join([caption, *(f"{agreement}: {AGREEMENTS[agreement]}" for agreement in told)]) + "."
        header = ["variant", "ours", "paper", "ours: difference", "paper's", "agreement"]
        rows = [self._row(variant) for variant in self.place.variants]
        return [Grid(heading, header, rows, caption), *self._by_step(name)]

    def _row(self, variant: str) -> list[str]:
        scale = 100 if self.metric in SHARES else 1
        values = [scale * value for value in self._values(variant, self.metric).values()]
        mean, deviation = mean_and_deviation(values)
        ours = f"{mean:.{self.digits}f}" + ("" if deviation is None else f" ± {deviation:.{self.digits}f}")
        theirs, compared = self._printed_value(variant), self.compared.get(variant)
        row = [variant, ours, "-" if theirs is None else f"{theirs:.{self.digits}f}"]
        if compared is None:
            return [*row, "-", "-", "-"]
        digits = 2 if self.unit in ("points", "BLEU") else 3
        ours = f"{compared.ours:+.{digits}f}"
        if compared.low is not None:
            ours += f" ({compared.low:+.{digits}f} to {compared.high:+.{digits}f})"
        return [*row, ours, f"{compared.printed:+.{digits}f}", compared.agreement]

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
