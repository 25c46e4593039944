"""Colours, dashes, marks and hatches: what is drawn beside each other is told apart."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sas_hf.report.figures import bar_style, line_style


def test_no_two_of_thirty_look_alike():
    lines = [line_style(number) for number in range(30)]
    assert len({(style["color"], style["linestyle"], style["marker"]) for style in lines}) == 30
    assert all(one["linestyle"] != other["linestyle"] for one, other in pairwise(lines))
    bars = [bar_style(number) for number in range(30)]
    assert len({(style["color"], style["hatch"]) for style in bars}) == 30
    assert len({bar_style(number, filled=False)["hatch"] for number in range(8)}) == 8


@pytest.mark.parametrize("numbers", [(0, 1), (1, 2), (2, 3), (3, 4), (0, 2), (9, 10)])
def test_of_two_lines_in_one_place_both_are_seen(numbers):
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for number in numbers:
        axes.plot([0, 1], [0, 1], **line_style(number))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].reshape(-1, 3).astype(float) / 255
    for number in numbers:
        colour = to_rgb(line_style(number)["color"])
        assert (np.abs(pixels - colour).max(-1) < 0.02).sum() > 50
