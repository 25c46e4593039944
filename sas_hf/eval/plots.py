"""The report's pictures: bars per benchmark with standard errors, and curves over training and context length."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from ..report.figures import label_axes, save_figure
from .results import EvaluationResult, Metric, perplexities


# Metrics that lie between 0 and 1, the one shown for a task that is in no suite first.
ACCURACIES = ("acc_norm", "acc", "accuracy")


def draw(report, folder: Path) -> list[Path]:
    """Write every picture that a [`~sas_hf.eval.report.Report`] has numbers for, as PNG and SVG; returns the files."""
    figures = {}
    for suite in dict.fromkeys(name for result in report.results for name in result.suites):
        figures[f"benchmarks-{suite}"] = _suite_bars(report, suite)
    if others := _other_scores(report):
        figures["benchmarks"] = _bars(others, "accuracy, %")
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
        place: sorted(members, key=lambda result: result.step)
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
    return _bars(scores, f"{name}, %", printed)


def _other_scores(report) -> dict[str, dict[str, Metric]]:
    scores: dict[str, dict[str, Metric]] = {}
    for label, result in zip(report.labels, report.results, strict=True):
        in_suites = {task for s in result.suites.values() for column in s.columns.values() for task in column.tasks}
        for name, task in result.tasks.items():
            metric = next((metric for metric in ACCURACIES if metric in task.metrics), None)
            if name not in in_suites and metric is not None:
                scores.setdefault(label, {})[f"{name}\n{metric}"] = task.metrics[metric]
    return scores


def _bars(
    scores: dict[str, dict[str, Metric]], title: str, printed: dict[str, dict[str, float]] | None = None
) -> Figure:
    """Scores by model and benchmark as bars, printed values (per cent) as empty bars beside them."""
    printed = printed or {}
    benchmarks = list(dict.fromkeys(name for by_name in scores.values() for name in by_name))
    total = len(scores) + len(printed)
    figure = Figure(figsize=(max(5, (0.7 + 0.15 * total) * len(benchmarks) + 1), 4))
    axes = figure.add_subplot()
    width = 0.84 / total

    def draw_bars(number: int, values: dict[str, float], **style) -> None:
        places = [
            place + (number - (total - 1) / 2) * width for place, name in enumerate(benchmarks) if name in values
        ]
        axes.bar(places, [values[name] for name in benchmarks if name in values], 0.9 * width, **style)

    for number, (label, by_name) in enumerate(scores.items()):
        errors = [100 * _error(by_name[name]) for name in benchmarks if name in by_name]
        values = {name: 100 * score.value for name, score in by_name.items()}
        draw_bars(number, values, yerr=errors, capsize=2, label=label, color=f"C{number % 10}")
    for number, (label, values) in enumerate(printed.items()):
        style = {
            "fill": False,
            "edgecolor": "0.35",
            "linewidth": 0.8,
            "hatch": ("", "////", "....", "xxxx")[number % 4],
        }
        draw_bars(len(scores) + number, values, label=label, **style)
    axes.set_xticks(range(len(benchmarks)), benchmarks)
    axes.set_ylabel(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2)
    return figure


def _error(score: Metric) -> float:
    """What an unknown standard error is drawn as: nothing. A bar of length 0 would say that it is exact."""
    return math.nan if score.stderr is None else score.stderr


def _perplexity_curves(report) -> Figure:
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    for label, result in zip(report.labels, report.results, strict=True):
        tasks = sorted(perplexities(result).items())
        if tasks:
            scores = [task.metrics["perplexity"] for _, task in tasks]
            errors = [_error(score) for score in scores]
            lengths = [length for length, _ in tasks]
            axes.errorbar(lengths, [score.value for score in scores], errors, marker="o", capsize=3, label=label)
    axes.set_xscale("log", base=2)
    lengths = sorted({length for result in report.results for length in perplexities(result)})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    label_axes(axes, "context, tokens", "perplexity per token")
    axes.legend()
    return figure


def _training_curves(series: dict[str, list[EvaluationResult]]) -> Figure:
    """A panel per number that a series has at two steps or more."""
    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for place, results in series.items():
        for result in results:
            for name, score in _headline_numbers(result).items():
                points = panels.setdefault(name, {}).setdefault(Path(place).name or place, [])
                points.append((result.step, score.value, _error(score)))
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.6 * across, 2.8 * down), layout="constrained")
    for number, (name, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(down, across, number)
        for label, points in lines.items():
            steps, values, errors = zip(*points, strict=True)
            axes.errorbar(steps, values, errors, marker="o", markersize=3, capsize=2, label=label)
        label_axes(axes, "step", "", title=name)
    figure.axes[0].legend(fontsize=8)
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
