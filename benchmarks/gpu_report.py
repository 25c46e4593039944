"""Table and plot of the figures of benchmarks/gpu.py, whatever of them there are."""

import io
import itertools
import re
import statistics
import textwrap
from pathlib import Path

from cost_measures import PARTS
from cost_report import amount, lines, points
from rich import box
from rich.console import Console
from rich.table import Table

from sas_hf.report.files import new_file


WIDTH = 80
TITLES = {name: (part.title, part.unit) for name, part in PARTS.items()} | {
    "correct-float32": ("distance from the CPU's float64: float32", "of logits; of gradients"),
    "correct-half": ("distance from the CPU's float64: half", "of logits; of gradients"),
    "train-autocast": ("training step, weights float32, autocast", "ms"),
    "simulation": ("simulation of a layer, forward, beside writing its result", "ms"),
    "simulation-train": ("the same, forward and backward", "ms"),
}
# Distances beyond these are no rounding: twice what tests/gpu allows small models.
WRONG = {"correct-float32": 1e-2, "correct-half": 0.12}
SLOW = 2.0  # seconds
DRAWN = ("train", "prefill", "decode-static", "decode-graph", "memory-train")


def cells(results: dict) -> dict[tuple[str, str], dict[int, dict]]:
    """Figures by part and size, then by length."""
    found = {}
    for key, figures in results["figures"].items():
        part, size, length = key.split(" ")
        found.setdefault((part, size), {})[int(length)] = figures
    return {key: dict(sorted(lengths.items())) for key, lengths in found.items()}


def expected(results: dict) -> dict[tuple[str, str], dict[int, list[str]]]:
    """What the plan has, in its order."""
    found = {}
    for cell in results["plan"]:
        lengths = found.setdefault((cell["part"], cell["size"]), {})
        lengths[cell["length"]] = list(dict.fromkeys([*lengths.get(cell["length"], []), *cell["variants"]]))
    return found


class Notes:
    """Reasons, each under a number."""

    def __init__(self):
        self.reasons = []

    def number(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return 1 + self.reasons.index(reason)


def table(results: dict) -> str:
    """All that there is, at most 80 columns wide, in Markdown."""
    held, notes, out = cells(results), Notes(), io.StringIO()
    console = Console(width=WIDTH, file=out, highlight=False, markup=False, emoji=False)
    console.print(_head(results))
    missing = []
    for (part, size), lengths in expected(results).items():
        found = held.get((part, size), {})
        gone = [
            (length, variant)
            for length, variants in lengths.items()
            for variant in variants
            if variant not in found.get(length, {})
        ]
        if gone:
            total = sum(len(variants) for variants in lengths.values())
            missing.append(f"{part} {size}: {len(gone)} of {total}")
        if not found:
            continue
        if part == "profile":
            _profiles(console, size, found, notes)
        elif part == "rates":
            _rates(console, found, notes)
        else:
            _part(console, part, size, lengths, found, notes)
    for said in (_fastest(held), _price(held), _compiling(held)):
        if len(said) > 1:
            console.print("\n" + "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in said))
    if notes.reasons:
        console.print("\nFailed:")
        for number, reason in enumerate(notes.reasons, 1):
            console.print(textwrap.fill(f"{number}) {reason}", WIDTH, subsequent_indent="   "))
    console.print()
    if missing:
        console.print(textwrap.fill("Missing, for want of time: " + "; ".join(missing) + ".", WIDTH))
        console.print("The same command again goes on with them.")
    else:
        console.print("Nothing is missing.")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", out.getvalue())).replace("\n\n|", "\n|")


def _head(results: dict) -> str:
    named = [f"{name} {value}" for name, value in results["settings"].items() if value is not None]
    named += [f"{name} {value}" for name, value in results["environment"].items() if name != "functions"]
    runs = [f"{run['date']}, {run['seconds']} s, commit {run['commit']}" for run in results["runs"]]
    said = [
        "; ".join(named) + ".",
        "Attention functions here: " + ", ".join(results["environment"]["functions"]) + ".",
        "Runs: " + "; ".join(runs) + ".",
        "Times: the median ratio to plain attention (mha) in the same round, smallest to largest; mha's own in its "
        "row. Memory and bytes: the number, and its ratio.",
    ]
    if results["settings"]["size"] == "tiny":
        said.insert(0, "A TRIAL: models of no use, whose times tell nothing.")
    return "\n".join(textwrap.fill(line, WIDTH) for line in said)


def _part(console: Console, part: str, size: str, lengths: dict, found: dict, notes: Notes) -> None:
    title, unit = TITLES[part]
    shown = Table("", box=box.MARKDOWN)
    for length in sorted(lengths):
        shown.add_column(f"{length:,}", justify="right", no_wrap=True)
    for variant in dict.fromkeys(variant for variants in lengths.values() for variant in variants):
        entries = [found.get(length, {}).get(variant) for length in sorted(lengths)]
        if any(entry is not None for entry in entries):
            shown.add_row(variant, *(_cell(part, entry, notes) for entry in entries))
    console.print(f"\n{title}, {size}: {unit}")
    console.print(shown)


def _cell(part: str, entry: dict | None, notes: Notes) -> str:
    if entry is None:
        return ""
    if "failed" in entry:
        return f"failed {notes.number(entry['failed'])})"
    if part in WRONG:
        wrong = max(entry["value"], entry["gradients"]) > WRONG[part]
        return f"{'WRONG ' * wrong}{entry['value']:.1e}; {entry['gradients']:.1e}"
    if entry["ratio"] is None or (entry["ratio"] == 1 and entry.get("smallest") == entry.get("largest")):
        return amount(entry["value"])
    if "smallest" in entry:
        return f"{entry['ratio']:.2f} ({entry['smallest']:.2f}-{entry['largest']:.2f})"
    return f"{amount(entry['value'])} ({entry['ratio']:.2f})"


def _rates(console: Console, found: dict, notes: Notes) -> None:
    for figures in found.values():
        for name, entry in figures.items():
            if "failed" in entry:
                console.print(f"{name}: failed {notes.number(entry['failed'])})")
            elif name == "write":
                console.print(f"Writing: {entry['value'] / 1e9:,.0f} GB/s")
            else:
                console.print(f"A large {name}: {entry['value'] / 1e12:,.3g} TFLOP/s")


def _profiles(console: Console, size: str, found: dict, notes: Notes) -> None:
    for length, figures in found.items():
        for name, entry in figures.items():
            console.print(f"\nWhere a training step goes, {name}, {size}, {length:,} tokens")
            if "failed" in entry:
                console.print(f"failed {notes.number(entry['failed'])})")
                continue
            console.print(
                f"{entry['value']:.1f} ms, watched; {entry['kernels']:,} kernels, which take {entry['busy_ms']:.1f} ms"
            )
            shown = Table(box=box.MARKDOWN)
            for column in ("ms", "share", "times"):
                shown.add_column(column, justify="right")
            shown.add_column("kernel", no_wrap=True)
            for kernel, took, times in entry["rows"]:
                shown.add_row(amount(took), f"{took / entry['busy_ms']:.0%}", f"{times:,}", kernel[:48])
            console.print(shown)


def _fastest(held: dict) -> list[str]:
    """By which function each model's training step is fastest, uncompiled and compiled."""
    said = ["Fastest training steps, relative to mha:"]
    for size, length, figures in _of("train", held):
        best = {}
        for variant, entry in figures.items():
            if entry.get("ratio") is not None:
                model = variant.partition("@")[0]
                best[model] = min(best.get(model, (entry["ratio"], variant)), (entry["ratio"], variant))
        said.append(f"  {size}, {length:,}: " + ", ".join(f"{name} {ratio:.2f}" for ratio, name in best.values()))
    return said


def _price(held: dict) -> list[str]:
    """Of recomputation, round by round."""
    said = ["Recomputation's price, of a training step:"]
    for size, length, figures in _of("train", held):
        sas, kept = figures.get("sas", {}), figures.get("sas-kept", {})
        if len(sas.get("rounds", ())) == len(kept.get("rounds", ())) > 0:
            more = [a / b - 1 for a, b in zip(sas["rounds"], kept["rounds"], strict=True)]
            said.append(f"  {size}, {length:,}: {statistics.median(more):+.1%} ({min(more):+.1%} to {max(more):+.1%})")
    return said


def _compiling(held: dict) -> list[str]:
    """Seconds of first calls that compiled something, or waited for something else."""
    said = [f"First calls of more than {SLOW:g} s:"]
    for part, size in held:
        for _, length, figures in _of(part, {(part, size): held[part, size]}):
            slow = {name: entry["first_s"] for name, entry in figures.items() if entry.get("first_s", 0) > SLOW}
            if slow:
                names = ", ".join(f"{name} {seconds:.0f}" for name, seconds in slow.items())
                said.append(f"  {part}, {size}, {length:,}: {names}")
    return said


def _of(part: str, held: dict) -> list[tuple[str, int, dict]]:
    """Size, length and figures of a part."""
    return [
        (size, length, figures)
        for (name, size), lengths in held.items()
        for length, figures in lengths.items()
        if name == part
    ]


def draw(results: dict, path: Path) -> None:
    """For each size a row: ratios over lengths, compiled ones dashed. Below, every function at one length."""
    from matplotlib.figure import Figure

    held = {key: _with_ratios(lengths) for key, lengths in cells(results).items()}
    sizes = [size for part, size in held if part == "train" and held[part, size]]
    drawn = [part for part in DRAWN if any((part, size) in held for size in sizes)]
    if not sizes:
        return
    figure = Figure(figsize=(3.7 * len(drawn), 3.4 * len(sizes) + 3.6), layout="constrained")
    grid = figure.add_gridspec(len(sizes) + 1, len(drawn), height_ratios=[3.4] * len(sizes) + [3.6])
    for row, size in enumerate(sizes):
        for column, part in enumerate(drawn):
            if held.get((part, size)):
                _over_lengths(figure.add_subplot(grid[row, column]), part, size, held[part, size])
    legend = max((axis.get_legend_handles_labels() for axis in figure.axes), key=lambda found: len(found[0]))
    figure.legend(*legend, loc="outside lower center", ncols=7, fontsize=8)
    middle = results["plan"][0]["length"]
    half = max(1, len(drawn) // 2)
    for part, places in (("train", slice(0, half)), ("memory-train", slice(half, None))):
        values = held.get((part, sizes[0]), {}).get(middle, {})
        values = {name: entry for name, entry in values.items() if name in ("mha", "sas") or "@" in name}
        if any("@" in name for name in values) and half < len(drawn):
            axis = figure.add_subplot(grid[-1, places])
            points(axis, values)
            axis.tick_params(labelsize=7)
            axis.set_title(f"{TITLES[part][0]} by attention function, {sizes[0]}, {middle:,}", fontsize=9)
    trial = "A TRIAL, whose times tell nothing: " if results["settings"]["size"] == "tiny" else ""
    settings = results["settings"]
    figure.suptitle(
        f"{trial}{settings['card']}, {results['environment']['dtype']}, torch {settings['torch']}; ratios to mha",
        fontsize=9,
    )
    with new_file(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")


def _with_ratios(lengths: dict[int, dict]) -> dict[int, dict]:
    found = {
        length: {name: entry for name, entry in figures.items() if entry.get("ratio") is not None}
        for length, figures in lengths.items()
    }
    return {length: figures for length, figures in found.items() if figures}


def _over_lengths(axis, part: str, size: str, lengths: dict[int, dict]) -> None:
    names = dict.fromkeys(name for figures in lengths.values() for name in figures if "@" not in name)
    series = {name: {x: figures[name] for x, figures in lengths.items() if name in figures} for name in names}
    lines(axis, series, "ratio")
    for line, marker in zip(axis.get_lines(), itertools.cycle("os^vDPX")):
        line.set_marker(marker)
        if line.get_label().endswith(("-regional", "-compiled")):
            line.set_linestyle("--")
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(lengths), [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_title(f"{TITLES[part][0]}, {size}", fontsize=9)
