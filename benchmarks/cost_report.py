"""Tables and plots of the figures of benchmarks/cost.py, whatever of them there are."""

from pathlib import Path

from cost_measures import PARTS
from cost_rivals import heads_times, parse
from rich import box
from rich.console import Console
from rich.table import Table

from sas_hf.report.files import new_file


COLUMNS = 7  # of one table
COLOURS = {"llama": "0.45", "mha": "black", "paper": "tab:red", "sas": "tab:orange", "gqa": "tab:blue"}
COLOURS |= {"mqa": "tab:cyan", "mla": "tab:purple", "tpa": "tab:green", "optimised": "tab:brown"}
COLOURS |= {"efficient": "tab:pink", "super": "tab:olive"}


def amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def cell(entry: dict | None) -> str:
    """The ratio and its spread; where there is none, the number."""
    if entry is None:
        return ""
    if entry["ratio"] is None:
        return amount(entry["value"])
    if "smallest" in entry:
        return f"{entry['ratio']:.2f} ({entry['smallest']:.2f}-{entry['largest']:.2f})"
    return f"{amount(entry['value'])} ({entry['ratio']:.2f})"


def show(results: dict) -> None:
    """Models down, parts across; in Markdown, so that it can be put into a document."""
    measure = _measure(results)
    columns = [(name, place) for name, places in _in_order(results).items() for place in places]
    console = Console(width=240)
    console.print(", ".join(f"{name} {value}" for name, value in results["settings"].items()))
    console.print(f"Timed: the ratio to {measure}, median (smallest to largest); {measure}'s own time in its row.")
    console.print(f"Counted: the number (and its ratio to {measure}'s).")
    for name in _in_order(results):
        console.print(f"  {name}: {PARTS[name].title}, {PARTS[name].unit}")
    for start in range(0, len(columns), COLUMNS):
        some = columns[start : start + COLUMNS]
        figures = [results["figures"][name][place] for name, place in some]
        table = Table("", box=box.MARKDOWN)
        for name, place in some:
            table.add_column(f"{name}, {int(place):,}" if place else name, justify="right", no_wrap=True)
        for model in dict.fromkeys(model for values in figures for model in values):
            entries = [values.get(model) for values in figures]
            own = model == measure
            table.add_row(
                model,
                *(f"{amount(e['value'])} ms" if own and e and "smallest" in e else cell(e) for e in entries),
            )
        console.print(table)


def _colour(model: str, models: list[str]):
    """Of its own for every kind; the changes of one fade."""
    from matplotlib import colors

    kind = _kind(model)
    family = [name for name in models if _kind(name) == kind]
    white = 0.7 * family.index(model) / max(1, len(family))
    return tuple((1 - white) * part + white for part in colors.to_rgb(COLOURS[kind]))


def _kind(model: str) -> str:
    return parse(model.partition("@")[0])[0]


def points(axis, values: dict) -> None:
    """A row per model: its ratio, and a line from the smallest to the largest."""
    names = list(values)
    for row, name in enumerate(names):
        entry, colour = values[name], _colour(name, names)
        axis.barh(row, entry["ratio"], height=0.62, color=colour, alpha=0.35)
        if "smallest" in entry:
            axis.plot([entry["smallest"], entry["largest"]], [row, row], color=colour, linewidth=5, alpha=0.6)
        axis.plot(entry["ratio"], row, "o", color=colour, markersize=5)
        text = f"{entry['ratio']:.2f}" if "smallest" in entry else cell(entry)
        axis.annotate(text, (entry.get("largest", entry["ratio"]), row), (6, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlim(0, 1.4 * max(entry.get("largest", entry["ratio"]) for entry in values.values()))


def lines(axis, series: dict[str, dict[int, dict]], field: str) -> None:
    """A line per model over lengths or heads; the band goes from the smallest ratio to the largest."""
    for name, entries in series.items():
        colour, places = _colour(name, list(series)), list(entries)
        axis.plot(places, [entries[x][field] for x in places], marker="o", markersize=4, color=colour, label=name)
        if field == "ratio" and "smallest" in entries[places[0]]:
            low, high = ([entries[x][end] for x in places] for end in ("smallest", "largest"))
            axis.fill_between(places, low, high, color=colour, alpha=0.25, linewidth=0)
    axis.grid(alpha=0.3)


def _along(places: dict) -> dict[str, dict[int, dict]]:
    """Turned over: by model, then by length."""
    models = dict.fromkeys(model for values in places.values() for model in values)
    return {model: {int(x): values[model] for x, values in places.items() if model in values} for model in models}


def plot(results: dict, path: Path) -> None:
    """A panel per part: over several lengths, figures above ratios; for at least three numbers of heads, the ratio
    over Ĥ/H; otherwise a row per model."""
    from matplotlib.figure import Figure

    settings, figures = results["settings"], {n: p for n, p in _in_order(results).items() if _has_ratios(p)}
    scaling = any(len(places) > 1 for places in figures.values())
    expected = figures.pop("operations-mean", None) if scaling else None
    columns = len(figures) if scaling else min(4, len(figures))
    rows = 2 if scaling else -(-len(figures) // columns)
    models = max(len(values) for places in figures.values() for values in places.values())
    figure = Figure(figsize=(4.2 * columns, (1 + max(2.4, 0.3 * models)) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(figures) :]:
        axis.set_visible(False)
    for index, (name, places) in enumerate(figures.items()):
        axis, values = axes.flat[index], next(iter(places.values()))
        heads = {heads_times(model): values[model] for model in values if heads_times(model)}
        axis.set_title(PARTS[name].title + ("" if len(places) > 1 else _at(places)), fontsize=9)
        if len(places) > 1:
            axes[1][index].set_visible(True)
            _over_lengths(axis, axes[1][index], name, _along(places), expected)
        elif len(heads) > 2:
            _over_heads(axis, dict(sorted(heads.items())), values)
        else:
            points(axis, values)
    if scaling:
        legend = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda found: len(found[0]))
        figure.legend(*legend, loc="outside lower center", ncols=8, fontsize=8)
    figure.suptitle(
        f"{settings['size']} width, {settings['layers']} layers, batch {settings['batch']}, {settings['dtype']}, "
        f"{settings['device']}, {settings['threads']} threads, torch {settings['torch']}; "
        f"ratios to {_measure(results)}",
        fontsize=9,
    )
    with new_file(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format=path.suffix[1:] or "png")


def _over_lengths(upper, lower, name: str, series: dict[str, dict[int, dict]], expected: dict | None) -> None:
    """The figure with both axes logarithmic, where equal growth is equal slope, and the ratio; dashed, the ratio of
    the operations, where they are of the same thing."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    lines(upper, series, "value")
    lines(lower, series, "ratio")
    if expected and name in ("train", "prefill"):
        for model, entries in _along(expected).items():
            ratios = [entry["ratio"] for entry in entries.values()]
            lower.plot(list(entries), ratios, "--", color=_colour(model, list(series)), linewidth=1)
        lower.plot([], [], "--", color="0.3", linewidth=1, label="operations")
    lengths = sorted({length for entries in series.values() for length in entries})
    for axis in (upper, lower):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{x:,}" for x in lengths])
        axis.minorticks_off()
    upper.set_yscale("log")
    upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    upper.set_ylabel(PARTS[name].unit)
    lower.set_ylabel("ratio")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("tokens" if PARTS[name].along == "lengths" else "tokens before")
    upper.minorticks_off()
    if expected and name in ("train", "prefill"):
        lower.legend(lower.get_lines()[-1:], ["operations"], fontsize=7)


def _over_heads(axis, heads: dict[int, dict], values: dict) -> None:
    lines(axis, {"sas": heads}, "ratio")
    for other in (model for model in values if not heads_times(model)):
        colour = _colour(other, [other])
        axis.axhline(values[other]["ratio"], color=colour, linewidth=1, linestyle="--", label=other)
    axis.set_xticks(list(heads))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("Ĥ/H")
    axis.set_ylabel("ratio")
    axis.legend(fontsize=7)


def _in_order(results: dict) -> dict:
    """Figures as `PARTS` and lengths go, however they came into the file."""
    figures = results["figures"]
    held = {name: figures[name] for name in PARTS if name in figures}
    return {name: dict(sorted(places.items(), key=lambda item: int(item[0] or 0))) for name, places in held.items()}


def _measure(results: dict) -> str:
    return results["settings"]["measure"]


def _has_ratios(places: dict) -> bool:
    return all(entry["ratio"] is not None for values in places.values() for entry in values.values())


def _at(places: dict) -> str:
    return "".join(f", {int(place):,}" for place in places if place)
