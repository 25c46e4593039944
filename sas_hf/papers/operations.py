"""Figures 2 to 4 of "You Need to Pay Better Attention": operations of one attention layer's forward and backward pass,
by the paper's equation 24 and as they are counted."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..hub.info import by_equation_24
from ..modeling import SASEncoderConfig
from ..modeling.kinds import make_attention
from ..report.figures import label_axes
from ..report.tables import Grid
from .comparison import Comparison, ItemResult, comparison_grid, result_at
from .items import Place
from .timing import COLOURS


KINDS = ("standard", "optimised", "efficient", "super")
WAYS = ("equation 24", "counted")
HEADS = (1, 2, 4, 8)
LENGTH = 64  # of Figure 2, as its caption says
# The paper prints no ranges. Figure 3's averages come out as printed over powers of two from 1 to 1,024, both ways.
POWERS = tuple(2**power for power in range(11))
STEPS = tuple(range(64, 1025, 64))
COUNTED = (
    "Counted are multiplications and additions of all products of matrices in our layers, forward and backward. Left "
    "out: softmax, scaling, masks, biases, sums of gradients, and the lookup of W^A's rows by positions."
)
EQUATION = (
    "Equation 24, C·ℓ·d + 15·h·ℓ², is linear in d, though a projection of d features to d costs d² a token, and the "
    "score of a pair of tokens d/h a head; and it leaves out Super's W^A V, 2·ℓ²·d forward and twice that backward."
)


def by_equation(kind: str, length: int, width: int, heads: int) -> int:
    """Equation 24 of the paper."""
    return by_equation_24(_attention_type(kind), length, width, heads)


@functools.cache
def by_counting(kind: str, length: int, width: int, heads: int) -> int:
    """
    Multiplications and additions in products of matrices of one layer for a sequence, forward and backward.

    Args:
        kind: of `KINDS`.
        length, width: ℓ tokens of d features.

    Raises:
        ValueError: for heads that do not divide the width.
    """
    config = SASEncoderConfig(
        attention_type=_attention_type(kind),
        hidden_size=width,
        intermediate_size=1,
        num_attention_heads=heads,
        num_hidden_layers=1,
        max_position_embeddings=length,
    )
    config._attn_implementation = "eager"  # the definition, whose products are seen one by one
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        layer = make_attention(config, layer_idx=0)
        hidden_states = torch.empty(1, length, width, requires_grad=True)
        positions = torch.empty(1, length, dtype=torch.long)
        mixing = (positions, positions, torch.empty(1, 1, length, length, dtype=torch.bool))
        output, _ = layer(hidden_states, token_mixing=mixing)
        output.backward(torch.empty_like(output))
    return counter.get_total_flops()


def _attention_type(kind: str) -> str:
    return "mha" if kind == "standard" else kind


def _table(
    way: str, kind: str, lengths: Sequence[int], widths: Sequence[int], heads: int, progress: Callable[[str], None]
) -> np.ndarray:
    """Operations `[lengths, widths]`; none (NaN) of what cannot be built, a width that heads do not divide."""
    progress(f"{kind}, h = {heads}: {way}")
    table = np.full((len(lengths), len(widths)), np.nan)
    for row, length in enumerate(lengths):
        for column, width in enumerate(widths):
            if way == "equation 24":
                table[row, column] = by_equation(kind, length, width, heads)
            elif width % heads == 0:
                table[row, column] = by_counting(kind, length, width, heads)
    return table


def operations(
    place: Place,
    folder: Path,
    command: str,
    progress: Callable[[str], None],
    figure: str,
    lengths: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    heads: Sequence[int] = HEADS,
) -> ItemResult:
    """
    One of these figures from equation 24 and from counted operations, side by side.

    Args:
        folder: nothing is kept in it, as counting takes seconds.
        figure: "lines" (Figure 2: over the projection dimension), "heat-maps" (Figure 3: standard's over efficient's
            over length and dimension, by heads) or "surfaces" (Figure 4: over both, one head).
        lengths, widths: ℓ and d, if others than Figure 2's 64 tokens and ours.
        heads: of the heat maps.

    Raises:
        ValueError: for another figure, or numbers below 1.
    """
    if figure not in FIGURES:
        raise ValueError(f"`figure` is {figure!r}; it must be one of {', '.join(FIGURES)}.")
    make, own_lengths, own_widths = FIGURES[figure]
    lengths, widths = tuple(lengths or own_lengths), tuple(widths or own_widths)
    for name, values in (("lengths", lengths), ("widths", widths), ("heads", tuple(heads))):
        if not values or min(values) < 1:
            raise ValueError(f"`{name}` is {values}; it must hold numbers of at least 1.")
    begun = time.perf_counter()
    content = make(place, lengths, widths, tuple(heads), progress)
    return result_at(
        place,
        None,
        command,
        seconds=time.perf_counter() - begun,
        **content | {"notes": [*content["notes"], COUNTED, EQUATION]},
    )


def _per_cent(what: str, ours: float, theirs: float) -> Comparison:
    """Whole per cents, as the paper prints them; equal or not."""
    return Comparison(what, "per cent", float(round(ours)), float(round(theirs)), neutral=None)


def _over_width(place: Place, lengths, widths, heads, progress) -> dict[str, Any]:
    """Figure 2: lines over d at the first of the lengths, one head."""
    from matplotlib.figure import Figure

    length, heads = lengths[0], 1
    if len(widths) < 2:
        raise ValueError(f"`widths` is {widths}; a slope needs two.")
    slopes = {row.model: cast(float, row.values[0]) for row in place.table.rows}
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    comparisons, numbers, rows = [], {}, []
    for axes, way in zip(figure.subplots(1, 2), WAYS, strict=True):
        found = {kind: _table(way, kind, (length,), widths, heads, progress)[0] for kind in KINDS}
        numbers[way] = {kind: values.tolist() for kind, values in found.items()}
        for kind, values in found.items():
            # Kinds that need the same lie upon each other, so that the second is drawn in dashes.
            same = any(np.array_equal(values, found[other]) for other in KINDS[: KINDS.index(kind)])
            axes.plot(widths, values, "--" if same else "-", color=COLOURS[kind], label=kind, linewidth=2)
        label_axes(axes, "projection dimension d", "operations", f"{way}, ℓ = {length}")
        axes.set_xlim(0, 1.02 * max(widths))
        axes.set_ylim(bottom=0)
        growth = {kind: values[-1] - values[0] for kind, values in found.items()}
        for kind in KINDS[1:]:
            what = f"growth of {kind} over standard's, {way}"
            ours, theirs = 100 * growth[kind] / growth["standard"], 100 * slopes[kind] / slopes["standard"]
            comparisons.append(_per_cent(what, ours, theirs))
        rows += [[way, kind, *(f"{values[place]:.3g}" for place in (0, -1))] for kind, values in found.items()]
    figure.axes[0].legend(fontsize=8, frameon=False)
    title = f"Operations of one attention layer over the projection dimension, {length} tokens"
    header = ["", "kind", *(f"d = {widths[place]:,}" for place in (0, -1))]
    return {
        "grids": [Grid(title, header, rows, text_columns=2, compact=True), comparison_grid("Growth", comparisons)],
        "comparisons": comparisons,
        "numbers": {"length": length, "widths": list(widths), "heads": heads, "operations": numbers},
        "notes": [
            "The paper's lines are straight, of slopes 15ℓ, 12ℓ and 9ℓ; counted operations grow with d², and their "
            f"growth is taken from d = {widths[0]:,} to {widths[-1]:,}.",
            "The range of d is not printed.",
        ],
        "figure": figure,
    }


def _heat_maps(place: Place, lengths, widths, heads, progress) -> dict[str, Any]:
    """Figure 3: how many per cent more operations standard needs than efficient."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 2.2 * len(heads), 5.2), layout="constrained")
    panels = figure.subplots(2, len(heads), squeeze=False, sharex=True, sharey=True)
    rows, comparisons = [], []
    numbers: dict[str, dict[str, Any]] = {}
    for line, way in zip(panels, WAYS, strict=True):
        numbers[way] = {}
        for axes, h in zip(line, heads, strict=True):
            standard, efficient = (
                _table(way, kind, lengths, widths, h, progress) for kind in ("standard", "efficient")
            )
            more = 100 * (standard / efficient - 1)
            mean, most = float(np.nanmean(more)), float(np.nanmax(more))
            cells = [[None if np.isnan(cell) else round(float(cell), 3) for cell in row] for row in more]
            numbers[way][str(h)] = {"mean": mean, "most": most, "per_cent_more": cells}
            rows.append([way, str(h), f"{mean:.1f}", f"{most:.1f}"])
            image = axes.imshow(more, origin="lower", vmin=0, vmax=100, cmap="viridis", aspect="auto")
            axes.set_title(f"{way}, h = {h}\nmean {mean:.1f}, most {most:.1f}", fontsize=8)
            axes.set_xticks(range(len(widths))[::2], [str(width) for width in widths[::2]], rotation=60, fontsize=7)
            axes.set_yticks(range(len(lengths))[::2], [str(length) for length in lengths[::2]], fontsize=7)
        line[0].set_ylabel("length ℓ")
    for axes in panels[-1]:
        axes.set_xlabel("dimension d")
    figure.colorbar(image, ax=panels, label="per cent more than efficient", shrink=0.8)
    for way in WAYS:
        for row in place.table.rows:
            h, printed_mean, printed_most = cast(list[float], row.values)
            if h in heads:
                ours = numbers[way][str(h)]
                comparisons.append(_per_cent(f"average, h = {h} ({row.dataset}), {way}", ours["mean"], printed_mean))
                comparisons.append(_per_cent(f"at most, h = {h} ({row.dataset}), {way}", ours["most"], printed_most))
    title = "Per cent more operations in standard than in efficient attention"
    return {
        "grids": [
            Grid(title, ["", "h", "average", "at most"], rows, text_columns=2, compact=True),
            comparison_grid("More operations than efficient attention, whole per cents", comparisons),
        ],
        "comparisons": comparisons,
        "numbers": {"lengths": list(lengths), "widths": list(widths), "more": numbers},
        "notes": [
            "Caption and text print the averages in opposite orders of heads; by equation 24 the difference falls "
            "with the heads, as in the text.",
            "The paper does not print over which lengths and dimensions it averages. With powers of two from 1 to "
            "1,024 for both, equation 24 gives the text's four averages, so these are taken.",
            "Counted, no cell changes with the heads, each of which does its part of the same products. The averages "
            "do only because what cannot be built, d below h, is left out of them. Where ℓ is far below d, standard "
            "needs up to twice as many as efficient.",
        ],
        "figure": figure,
    }


def _surfaces(place: Place, lengths, widths, heads, progress) -> dict[str, Any]:
    """Figure 4: a surface over length and dimension for every kind, one head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6))
    constants = {row.model: row.values for row in place.table.rows}
    across, upwards = np.meshgrid(widths, lengths)
    corners = {"ℓ = d": (-1, -1), "long, narrow": (-1, 0), "short, wide": (0, -1)}
    numbers, rows, comparisons = {}, [], []
    for line, (way, unit, scale) in enumerate(zip(WAYS, ("millions", "billions"), (1e6, 1e9), strict=True)):
        found = {kind: _table(way, kind, lengths, widths, 1, progress) for kind in KINDS}
        numbers[way] = {kind: table.tolist() for kind, table in found.items()}
        top = max(table.max() for table in found.values()) / scale
        for panel, (kind, table) in enumerate(found.items(), line * len(KINDS) + 1):
            axes: Any = figure.add_subplot(2, len(KINDS), panel, projection="3d")
            axes.plot_surface(across, upwards, table / scale, cmap="viridis", vmin=0, vmax=top)
            axes.set_zlim(0, top)
            axes.set_title(f"{kind}, {way}, {unit}", fontsize=9)
            axes.set_xlabel("d", fontsize=8, labelpad=-6)
            axes.set_ylabel("ℓ", fontsize=8, labelpad=-6)
            axes.tick_params(labelsize=6, pad=-2)
            axes.view_init(elev=25, azim=-130)
            # Of standard's, in the corners of the surface: there equation and count are furthest apart.
            shares = {name: 100 * table[corner] / found["standard"][corner] for name, corner in corners.items()}
            rows.append([way, kind, f"{table[-1, -1]:.3g}", *(f"{share:.0f}" for share in shares.values())])
            if kind == "standard" or way == "equation 24":  # which would be compared with itself
                continue
            for name, (row, column) in corners.items():
                length, width = lengths[row], widths[column]
                theirs, plain = (
                    constants[each][0] * length * width + constants[each][1] * length**2 for each in (kind, "standard")
                )
                what = f"{kind} over standard's, ℓ = {length:,}, d = {width:,}"
                comparisons.append(_per_cent(what, shares[name], 100 * theirs / plain))
    figure.subplots_adjust(left=0.02, right=0.97, bottom=0.04, top=0.95, wspace=0.12, hspace=0.12)
    title = "Operations of one attention layer over length and projection dimension, one head"
    header = ["", "kind", f"{lengths[-1]:,}, {widths[-1]:,}"]
    header += [f"% {lengths[row]:,}, {widths[column]:,}" for row, column in corners.values()]
    return {
        "grids": [
            Grid(
                title, header, rows, "Operations, and per cent of standard's, at ℓ, d.", text_columns=2, compact=True
            ),
            comparison_grid("Counted, per cent of standard's; paper: by equation 24", comparisons),
        ],
        "comparisons": comparisons,
        "numbers": {"lengths": list(lengths), "widths": list(widths), "heads": 1, "operations": numbers},
        "notes": [
            "The paper's surfaces are those of its equation; ranges and values are not printed.",
            "Counted, super needs more than standard where ℓ is above 2·d, for W^A V; the equation, which leaves that "
            "out, has it below standard everywhere.",
        ],
        "figure": figure,
    }


# By what they draw, with lengths and dimensions.
FIGURES = {
    "lines": (_over_width, (LENGTH,), STEPS),
    "heat-maps": (_heat_maps, POWERS, POWERS),
    "surfaces": (_surfaces, STEPS, STEPS),
}
