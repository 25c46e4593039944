"""What every picture of ours shares: its frame, its labels and how it is saved. Needs matplotlib."""

import importlib.util
import io
from pathlib import Path
from typing import Any

from .files import write_atomically


def require_matplotlib() -> None:
    """Raise an `ImportError` that says what to install."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib, which is not installed: pip install sas_hf[eval] or sas_hf[train]")


# A line where who guesses would be, above what it is beside.
CHANCE: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.2, "zorder": 4}
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "||||", "oooo", "----")


def line_style(number: int) -> dict[str, Any]:
    """
    Of the line that has this number among several, from 0: colour, dashes and mark, no two of 60 alike.

    Dashes change from line to line and the emptier lie above, so that of two lines in one place both are seen.
    """
    dashes = number % len(DASHES)
    style = {"color": f"C{number % 10}", "linestyle": DASHES[dashes], "zorder": 2 + dashes / len(DASHES)}
    return style | {"marker": MARKERS[number % len(MARKERS)], "markersize": 3}


def bar_style(number: int, filled: bool = True) -> dict[str, Any]:
    """Likewise of a bar: colour and hatch, no two of 80 alike, or of eight that are not filled; and an edge, which is
    there where the value is 0, too."""
    if not filled:
        return {"fill": False, "edgecolor": "0.35", "linewidth": 0.8, "hatch": HATCHES[number % len(HATCHES)]}
    colour, hatch = f"C{number % 10}", HATCHES[number // 10 % len(HATCHES)]
    return {"color": colour, "edgecolor": "black" if hatch else colour, "linewidth": 1.2, "hatch": hatch}


def label_axes(axes, across: str, upwards: str, title: str = "") -> None:
    """Labels of a panel, without the frame's upper and right lines."""
    axes.set_xlabel(across)
    axes.set_ylabel(upwards)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure, *axes) -> None:
    """What the lines of these panels are, below the figure (of the layout "constrained"), where they cover no data."""
    named: dict[str, Any] = {}
    for panel in axes:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    if named:
        columns = max(2, int(figure.bbox.width / figure.dpi / 1.6))
        place = {"loc": "outside lower center", "ncols": columns}
        figure.legend(named.values(), named.keys(), fontsize=8, frameon=False, **place)


def save_figure(figure, folder: Path, name: str) -> list[Path]:
    """Write a matplotlib `Figure` as `name`.png and `name`.svg, each whole or not at all; returns the files."""
    paths = []
    for suffix in (".png", ".svg"):
        buffer = io.BytesIO()
        options = {"dpi": 150} if suffix == ".png" else {"metadata": {"Date": None}}
        figure.savefig(buffer, format=suffix[1:], bbox_inches="tight", **options)
        write_atomically(folder / (name + suffix), buffer.getvalue())
        paths.append(folder / (name + suffix))
    return paths
