"""The report's pictures: bars per benchmark with standard errors, and curves over training and context length."""

import math
from pathlib import Path
from typing import Any, cast

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, StrMethodFormatter

from ..report.figures import CHANCE, bar_style, label_axes, legend_below, line_style, save_figure
from .results import EvaluationResult, Metric, chance_of, perplexities


# Metrics that lie between 0 and 1, the one shown for a task that is in no suite first.
ACCURACIES = ("acc_norm", "acc", "accuracy")


def draw(report, folder: Path) -> list[Path]:
    """Write every picture that a [`~sas_hf.eval.report.Report`] has numbers for, as PNG and SVG; returns the files."""
    figures = {}
    for suite in dict.fromkeys(name for result in report.results for name in result.suites):
        figures[f"benchmarks-{suite}"] = _suite_bars(report, suite)
    scores, chance = _other_scores(report)
    if scores:
        figures["benchmarks"] = _bars(scores, "accuracy, %", chance)
    if any(len(perplexities(result)) > 1 for result in report.results):
        figures["perplexity"] = _perplexity_curves(report)
    if series := checkpoint_series(report.results):
        figures["training"] = _training_curves(series)
    return [path for name, figure in figures.items() for path in save_figure(figure, folder, name)]


def checkpoint_series(results: list[EvaluationResult]) -> dict[str, list[EvaluationResult]]:
    """Results of checkpoints of one training (folders side by side), in order of steps, where there are several."""
    series: dict[str, list[EvaluationResult]] = {}
    for result in results:
        if result.step is not None:
            series.setdefault(str(Path(result.model).parent), []).append(result)
    return {
        place: sorted(members, key=lambda result: cast(int, result.step))
        for place, members in series.items()
        if len({result.step for result in members}) > 1
    }


def _suite_bars(report, name: str) -> Figure:
    scores = {}
    for label, result in zip(report.labels, report.results, strict=True):
        if name in result.suites:
            suite = result.suites[name]
            scores[label] = {c: column.score for c, column in suite.columns.items()} | {"average": suite.average}
    suites = [result.suites[name] for result in report.results if name in result.suites]
    shown = {label for suite in suites for label in suite.columns}
    if all(suite.complete for suite in suites):
        shown.add("average")
    printed = {}
    for row in report.paper_rows(name):
        if row.model in ("MHA", "SAS"):  # SAS and what it stands on; the tables have all rows
            values = dict(zip(report.paper_table(name).columns, row.values, strict=True)) | {"average": row.average}
            printed[row.label] = {label: value for label, value in values.items() if label in shown}
    chance = {label: value for label, value in report.chance(name).items() if value is not None}
    if "average" in shown and len(chance) == len(shown) - 1:
        chance["average"] = sum(chance.values()) / len(chance)
    return _bars(scores, f"{name}, %", chance, printed)


def _other_scores(report) -> tuple[dict[str, dict[str, Metric]], dict[str, float]]:
    """Of tasks that are in no suite: scores by model and task, and chance by task."""
    scores: dict[str, dict[str, Metric]] = {}
    chance: dict[str, float] = {}
    for label, result in zip(report.labels, report.results, strict=True):
        in_suites = {task for s in result.suites.values() for column in s.columns.values() for task in column.tasks}
        for name, task in result.tasks.items():
            metric = next((metric for metric in ACCURACIES if metric in task.metrics), None)
            if name not in in_suites and metric is not None:
                scores.setdefault(label, {})[f"{name}\n{metric}"] = task.metrics[metric]
                if (guessed := chance_of([task])) is not None:
                    chance[f"{name}\n{metric}"] = guessed
    return scores, chance


def _bars(
    scores: dict[str, dict[str, Metric]],
    title: str,
    chance: dict[str, float],
    printed: dict[str, dict[str, float]] | None = None,
) -> Figure:
    """Scores by model and benchmark as bars, printed values (per cent) as empty bars beside them, and a line where who
    guesses would be."""
    printed = printed or {}
    benchmarks = list(dict.fromkeys(name for by_name in scores.values() for name in by_name))
    total = len(scores) + len(printed)
    figure = Figure(figsize=(max(5, (0.7 + 0.15 * total) * len(benchmarks) + 1), 4), layout="constrained")
    axes = figure.add_subplot()
    width = min(0.84 / total, 0.3)
    over: dict[str, Any] = {"zorder": 3, "clip_on": False}  # the axis, so that a score of 0 is seen

    def draw_bars(number: int, values: dict[str, float], **style) -> None:
        places = [
            place + (number - (total - 1) / 2) * width for place, name in enumerate(benchmarks) if name in values
        ]
        axes.bar(places, [values[name] for name in benchmarks if name in values], 0.9 * width, **style, **over)

    for number, (label, by_name) in enumerate(scores.items()):
        errors = [100 * _error(by_name[name]) for name in benchmarks if name in by_name]
        values = {name: 100 * score.value for name, score in by_name.items()}
        draw_bars(number, values, yerr=errors, capsize=2, label=label, **bar_style(number))
    for number, (label, values) in enumerate(printed.items()):
        draw_bars(len(scores) + number, values, label=label, **bar_style(number, filled=False))
    for place, name in enumerate(benchmarks):
        if name in chance:
            ends, once = (place - 0.46, place + 0.46), "chance" if name == next(iter(chance)) else None
            axes.plot(ends, [100 * chance[name]] * 2, label=once, **CHANCE)
    axes.set_xticks(range(len(benchmarks)), benchmarks)
    axes.set_xlim(-0.6, max(len(benchmarks) - 0.4, 1.6))
    axes.set_ylim(bottom=0)
    axes.set_ylabel(title)
    axes.spines[["top", "right"]].set_visible(False)
    legend_below(figure, axes)
    return figure


def _error(score: Metric) -> float:
    """What an unknown standard error is drawn as: nothing. A bar of length 0 would say that it is exact."""
    return math.nan if score.stderr is None else score.stderr


def _perplexity_curves(report) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, result) in enumerate(zip(report.labels, report.results, strict=True)):
        tasks = sorted(perplexities(result).items())
        if tasks:
            scores = [task.metrics["perplexity"] for _, task in tasks]
            errors = [_error(score) for score in scores]
            lengths = [length for length, _ in tasks]
            values = [score.value for score in scores]
            axes.errorbar(lengths, values, errors, capsize=3, label=label, **line_style(number))
    axes.set_xscale("log", base=2)
    lengths = sorted({length for result in report.results for length in perplexities(result)})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    label_axes(axes, "context, tokens", "perplexity per token")
    legend_below(figure, axes)
    return figure


def _training_curves(series: dict[str, list[EvaluationResult]]) -> Figure:
    """A panel per number that a series has at two steps or more."""
    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for place, results in series.items():
        for result in results:
            for name, score in _headline_numbers(result).items():
                points = panels.setdefault(name, {}).setdefault(Path(place).resolve().name or place, [])
                points.append((cast(int, result.step), score.value, _error(score)))
    labels = dict.fromkeys(label for lines in panels.values() for label in lines)
    styles = {label: line_style(number) for number, label in enumerate(labels)}
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.6 * across, 2.8 * down), layout="constrained")
    shared = None
    for number, (name, lines) in enumerate(panels.items(), 1):
        shared = axes = figure.add_subplot(down, across, number, sharex=shared)
        for label, points in lines.items():
            steps, values, errors = zip(*points, strict=True)
            axes.errorbar(steps, values, errors, capsize=2, label=label, **styles[label])
        label_axes(axes, "step", "", title=name)
    ticks = sorted({step for lines in panels.values() for points in lines.values() for step, *_ in points})
    figure.axes[0].xaxis.set_major_locator(FixedLocator(ticks) if len(ticks) < 6 else MaxNLocator(6, integer=True))
    figure.axes[0].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    legend_below(figure, *figure.axes)
    return figure


def _headline_numbers(result: EvaluationResult) -> dict[str, Metric]:
    """Suites' averages and columns, perplexities, and one accuracy of every other task."""
    numbers, in_suites = {}, set()
    for name, suite in result.suites.items():
        numbers[f"{name}: average"] = suite.average
        for label, column in suite.columns.items():
            numbers[f"{name}: {label}"] = column.score
            in_suites |= set(column.tasks)
    for name, task in result.tasks.items():
        metric = next((metric for metric in ("perplexity", *ACCURACIES) if metric in task.metrics), None)
        if name not in in_suites and metric is not None:
            numbers[f"{name}: {metric}" if metric != "perplexity" else name] = task.metrics[metric]
    return numbers
