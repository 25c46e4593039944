"""The figure of a study's report: curves, bars or a sweep, with deviations over seeds."""

import itertools
import math

from ..report.figures import CHANCE, bar_style, label_axes, legend_below, line_style, require_matplotlib
from .study_results import mean_and_deviation


def draw_study(report, figure=None):
    """Of a `StudyReport`, a matplotlib `Figure` (or in the one or `SubFigure` that is given) with a panel per data set
    (of "curves-over-time" two), all with the same y axis."""
    require_matplotlib()
    from matplotlib.figure import Figure

    draws = {
        "curves": [_curves],
        "curves-over-time": [_curves, _curves_over_time],
        "bars": [_bars],
        "sweep": [_sweep],
    }[report.figure]
    panels = list(itertools.product(report.data, draws))
    figure = figure or Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (data, draw) in zip(axes, panels, strict=True):
        draw(report, panel, data)
        panel.tick_params(labelleft=True)
    legend_below(figure, *axes)
    return figure


def _curves(report, axes, data: str) -> None:
    from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, MaxNLocator

    _draw_curves(report, axes, data, dict.fromkeys(report.variants, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    label_axes(axes, report.across, report.metric.label, data)
    low, high = axes.dataLim.intervaly
    if 0 < 3 * low < high:  # of perplexities ratios count, also where they are small
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.minorticks_off()
    else:
        axes.ticklabel_format(axis="y", useOffset=False)


def _curves_over_time(report, axes, data: str) -> None:
    speeds = {summary.variant: summary.tokens_per_second for summary in report.summaries if summary.data == data}
    _draw_curves(report, axes, data, {variant: speed for variant, speed in speeds.items() if speed})
    label_axes(axes, "seconds of training, at the median speed", report.metric.label, data)
    axes.ticklabel_format(axis="y", useOffset=False)


def _draw_curves(report, axes, data: str, scales: dict[str, float]) -> None:
    for variant, scale in scales.items():
        curves = [dict(run.curves[report.metric.name]) for run in report.of(data, variant)]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        points = [mean_and_deviation([curve[place] for curve in curves]) for place in shared]
        places = [place / scale for place in shared]
        style = line_style(report.variants.index(variant))
        axes.plot(places, [mean for mean, _ in points], label=variant, **style)
        if len(curves) > 1:
            low, high = ([mean + sign * (deviation or 0) for mean, deviation in points] for sign in (-1, 1))
            axes.fill_between(places, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _bars(report, axes, data: str) -> None:
    for place, variant in enumerate(report.variants):
        mean, deviation = report.final(data, variant)
        axes.bar(place, mean, 0.7, yerr=deviation, capsize=3, **bar_style(place))
    if (chance := report.chance(data)) is not None:
        axes.axhline(chance, label="chance", **CHANCE)
    axes.set_xticks(range(len(report.variants)), report.variants, rotation=30, ha="right")
    label_axes(axes, "", f"final {report.metric.label}", data)
    if axes.get_ylim()[0] < 0:
        axes.axhline(0, color="black", linewidth=0.8)


def _sweep(report, axes, data: str) -> None:
    order = sorted(report.variants, key=report.variables.__getitem__)
    points = [report.final(data, variant) for variant in order]
    places = [report.variables[variant] for variant in order]
    deviations = [math.nan if deviation is None else deviation for _, deviation in points]
    axes.errorbar(places, [mean for mean, _ in points], deviations, marker="o", capsize=3)
    if min(places) > 0 and max(places) >= 8 * min(places):
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.ticklabel_format(axis="y", useOffset=False)
    variable = report.study.get("variable")
    name = variable.rpartition(".")[2].replace("_", " ") if isinstance(variable, str) else ""
    label_axes(axes, report.study.get("variable_label") or name, f"final {report.metric.label}", data)
