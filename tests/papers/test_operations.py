"""Figures 2 to 4 of "You Need to Pay Better Attention": the count, from the matrices once more, and the equation."""

import numpy as np
import pytest

from sas_hf.papers.items import find_place
from sas_hf.papers.operations import HEADS, KINDS, POWERS, by_counting, by_equation, operations


def run(item, tmp_path, **arguments):
    place = find_place("better", item, "cpu")
    return operations(place, tmp_path, "command", lambda text: None, **place.at.arguments | arguments)


# Products of ℓ x d with d x d (projections) and of ℓ x ℓ with ℓ x d (scores, their mean of values, W^A).
PRODUCTS = {"standard": (4, 2), "optimised": (3, 2), "efficient": (2, 2), "super": (2, 3)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 4])
def test_the_count_is_of_all_products(kind, heads):
    """Each costs two operations a multiplication forward, and has two like it backward."""
    projections, squares = PRODUCTS[kind]
    for length, width in ((3, 8), (40, 24), (1, 4)):
        assert by_counting(kind, length, width, heads) == 6 * (
            projections * length * width**2 + squares * length**2 * width
        )


def test_equation_24_gives_what_the_text_prints():
    assert [by_equation(kind, 2, 3, 5) for kind in KINDS] == [15 * 6 + 300, 12 * 6 + 300, 9 * 6 + 300, 12 * 6 + 300]
    averages = []
    for heads in HEADS:
        ratios = [
            by_equation("standard", n, d, heads) / by_equation("efficient", n, d, heads)
            for n in POWERS
            for d in POWERS
        ]
        averages.append(round(100 * (np.mean(ratios) - 1)))
    assert averages == [30, 25, 20, 16]


def test_heat_maps_leave_out_what_cannot_be_built(tmp_path):
    result = run("figure3", tmp_path, lengths=(1, 16), widths=(1, 2, 16), heads=(1, 2))
    counted = result.numbers["more"]["counted"]
    assert counted["1"]["per_cent_more"][0] == pytest.approx([50.0, 66.667, 94.118])  # (2·d + ℓ) / (d + ℓ)
    assert counted["2"]["per_cent_more"][0] == [None, *counted["1"]["per_cent_more"][0][1:]]
    assert counted["2"]["most"] == counted["1"]["most"] and counted["2"]["mean"] > counted["1"]["mean"]
    compared = {comparison.what: comparison for comparison in result.comparisons}
    assert len(compared) == 2 * 2 * 4  # two ways, average and most, two numbers of heads in caption and text
    caption, text = (compared[f"average, h = 1 ({where}), equation 24"] for where in ("caption", "text"))
    assert (caption.printed, text.printed) == (16, 30) and caption.ours == text.ours
    assert compared["at most, h = 2 (caption), counted"].printed == 67
    assert result.figure is not None and "by equation 24 the difference falls" in result.notes[0]


def test_lines_grow_as_the_slopes_say_by_the_equation_alone(tmp_path):
    result = run("figure2", tmp_path, widths=(64, 128))
    agreement = {comparison.what: comparison.agreement for comparison in result.comparisons}
    assert {what: found for what, found in agreement.items() if "equation 24" in what} == {
        f"growth of {kind} over standard's, equation 24": "equal" for kind in KINDS[1:]
    }
    grown = next(c for c in result.comparisons if c.what == "growth of efficient over standard's, counted")
    lines = result.numbers["operations"]["counted"]
    assert grown.printed == 60 and grown.ours == round(
        100 * (lines["efficient"][1] - lines["efficient"][0]) / (lines["standard"][1] - lines["standard"][0])
    )
    assert grown.agreement == "differs"


def test_surfaces_show_where_super_needs_more_than_standard(tmp_path):
    result = run("figure4", tmp_path, lengths=(8, 64), widths=(8, 64))
    counted = {kind: np.array(table) for kind, table in result.numbers["operations"]["counted"].items()}
    assert (counted["super"] > counted["standard"]).tolist() == [[False, False], [True, False]]  # where ℓ > 2·d
    longest = next(c for c in result.comparisons if c.what == "super over standard's, ℓ = 64, d = 8")
    assert longest.ours == round(100 * (12 * 8 + 18 * 64) / (24 * 8 + 12 * 64))
    assert longest.printed == round(100 * (12 * 8 + 15 * 64) / (15 * 8 + 15 * 64))
    assert len(result.comparisons) == 3 * 3 and len(result.figure.axes) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"figure": "pie"}, "`figure` is 'pie'; it must be one of lines, heat-maps, surfaces"),
        ({"lengths": (0, 4)}, r"`lengths` is \(0, 4\)"),
        ({"widths": (16,)}, "a slope needs two"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("figure2", tmp_path, **arguments)
