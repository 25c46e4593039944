"""What a study says of runs that have ended: statistics, tables and pictures, of runs made up here."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import rich.console
from scipy import stats
from study_runs import finished

from sas_hf.training.study_report import StudyReport, kept_runs
from sas_hf.training.study_results import (
    FinishedRun,
    detectable,
    mean_and_deviation,
    paired_power,
    paired_test,
    pairs_needed,
    step_reaching,
)
from sas_hf.training.tasks import Metric
from sas_hf.training.tasks.task import LOSS


@pytest.mark.parametrize(
    ("curve", "value", "higher", "step"),
    [
        ([(10, 4.0), (20, 3.0), (30, 2.5)], 3.5, False, 15),
        ([(10, 4.0), (20, 3.0), (30, 2.5)], 2.5, False, 30),
        ([(10, 4.0), (20, 3.0), (30, 2.5)], 2.4, False, None),
        ([(10, 4.0), (20, 3.0)], 5.0, False, 10),  # before the first evaluation nothing is known
        ([(10, 4.0), (20, 3.0), (30, 3.5), (40, 2.0)], 3.0, False, 20),  # the first time
        ([(10, 0.1), (20, 0.5), (30, 0.3)], 0.4, True, 17.5),
        ([(10, 0.1), (20, 0.5)], 0.6, True, None),
        ([(10, math.inf), (20, 3.0)], 3.5, False, 20),
        ([(10, math.nan), (20, 3.0)], 3.5, False, 20),
        ([(10, 4.0), (20, 3.0)], math.nan, False, None),
        ([], 1.0, False, None),
    ],
)
def test_the_step_that_reaches_a_value(curve, value, higher, step):
    assert step_reaching(curve, value, higher_is_better=higher) == (None if step is None else pytest.approx(step))


def test_a_value_that_not_all_seeds_reach_says_how_many_do():
    curves = {"a": [(4, 3), (4, 2.0)], "b": [(4, 2.5), (4, 2.25)], "c": [(4, 3.5), (4, 2.5)]}
    runs = [
        FinishedRun(variant, "", seed, {"loss": ends[1]}, 10, None, {"loss": [(100, ends[0]), (200, ends[1])]})
        for variant, both in curves.items()
        for seed, ends in enumerate(both)
    ]
    *_, grid = StudyReport(runs).grids()
    assert grid.rows == [
        ["a", "2 of 2", "200", "200", "100 %", "100 %"],
        ["b", "1 of 2", "167", "167", "83 %", "83 %"],
        ["c", "0 of 2", "not reached", "", "", ""],
    ]


def test_statistics_against_scipy():
    first, second = [3.1, 3.4, 2.9, 3.3], [3.0, 3.1, 2.95, 3.05]
    test = stats.ttest_rel(second, first)
    found = paired_test(first, second)
    assert found["difference"] == pytest.approx(-0.15)
    assert found["p_value"] == pytest.approx(test.pvalue)
    # by hand: differences -0.1, -0.3, 0.05, -0.25 have the deviation 0.158114, and t of 3 degrees is 3.182446
    assert (found["low"], found["high"]) == pytest.approx((-0.15 - 0.251595, -0.15 + 0.251595), abs=1e-5)
    assert mean_and_deviation([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, 1.527525), abs=1e-6)


def test_power_against_a_simulation():
    """Of 40,000 studies of six pairs in which the true difference is what can be detected, 80 % find it."""
    generator = np.random.default_rng(0)
    found = detectable(generator.normal(0.3, 2.0, 6))
    pairs = generator.normal(found["detectable"], found["deviation"], (40_000, 6))
    assert (stats.ttest_1samp(pairs, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.008)
    assert paired_power(0, 1.0, 6) == pytest.approx(0.05)  # nothing is there to be found
    share = (stats.ttest_1samp(generator.normal(-0.7, 1.0, (40_000, 9)), 0, axis=1).pvalue < 0.05).mean()
    assert paired_power(0.7, 1.0, 9) == paired_power(-0.7, 1.0, 9) == pytest.approx(share, abs=0.01)
    for difference in (3.0, 0.5, 0.05):
        pairs = pairs_needed(difference, 1.0)
        assert paired_power(difference, 1.0, pairs) >= 0.8 > paired_power(difference, 1.0, pairs - 1)
    assert pairs_needed(1e-6, 1.0) == pytest.approx(7.8489e12, rel=1e-4)
    assert detectable([0.5]) == detectable([0.5, math.inf]) == {"deviation": None, "detectable": None}
    assert detectable([0.5, 0.5]) == {"deviation": 0.0, "detectable": None}
    for count in (2, 3, 10, 1000):
        found = detectable([1.0, -1.0] * (count // 2) + [0.0] * (count % 2))
        assert paired_power(found["detectable"], found["deviation"], count) == pytest.approx(0.8)


def test_what_one_seed_or_equal_differences_cannot_tell():
    assert paired_test([3.0], [2.5]) == {"difference": -0.5, "low": None, "high": None, "p_value": None}
    assert paired_test([3.0, 2.0], [2.5, 1.5]) == {"difference": -0.5, "low": -0.5, "high": -0.5, "p_value": None}
    assert mean_and_deviation([2.0]) == (2.0, None)


def test_all_tables_can_be_read_on_a_terminal():
    """80 columns for twelve evaluations of variants with long names: no number is broken, and the last is there."""
    curve = [(step * 1000, 9 - step / 2) for step in range(1, 13)]
    runs = [
        FinishedRun(variant, "", seed, {"loss": 3.0 + seed / 8, "bleu": 12.345 + seed}, 123_456_789, 98_765.0, curves)
        for variant in ("standard-attention", "optimised-attention")
        for seed in (0, 1)
        for curves in [{"loss": [(step, value + seed / 8) for step, value in curve]}]
    ]
    bleu = [Metric("bleu", f"validation BLEU {number}", higher_is_better=True) for number in (1, 2, 3)]
    report = StudyReport(runs, metrics=(LOSS, *bleu))
    console = rich.console.Console(width=80, file=io.StringIO())
    for grid in report.grids():
        console.print(grid.rich())
    results, differences, by_step, arrivals = report.grids()
    text = console.file.getvalue()
    words = text.split()
    for grid in (results, differences, by_step, arrivals):
        for cell in (cell for row in grid.rows for cell in row):
            assert set(cell.replace(" ± ", " ±").split()) <= set(words), cell
    assert "12,000" in by_step.header and 3 < len(by_step.header) < 13
    assert f"{len(by_step.header) - 1} of 12 evaluations" in by_step.caption
    assert len(report.grids(whole=True)[2].header) == 13
    assert max(map(len, text.splitlines())) == 80  # the captions, which are as wide as the terminal


def test_differences_that_no_terminal_has_room_for_are_in_two_tables():
    names = ("standard-attention", "optimised-attention-of-8-heads")
    losses = {names[0]: [20.0, 21.0, 22.0], names[1]: [21.5, 13.75, 34.125]}
    report = StudyReport([finished(name, seed, losses[name][seed]) for name in names for seed in range(3)])
    _, differences, power, *_ = report.grids()
    assert differences.header == ["variant", f"minus {names[0]}", "95 % interval", "p", "n"]
    assert power.header == ["variant", "sd", "80 % power at", "n"] and differences.fits and power.fits
    (whole,) = [grid for grid in report.grids(whole=True) if "80 % power at" in grid.header]
    assert [[*differences.rows[0][:4], *power.rows[0][1:]]] == whole.rows and not whole.fits


@pytest.mark.parametrize("figure", ["curves", "bars", "sweep"])
def test_figures(figure, tmp_path):
    """A panel per data set; the points of a sweep stand at their numbers, in order."""
    losses = {"four": [3.0, 3.2], "one": [3.5, 3.7], "two": [3.1, 3.3]}
    runs = [
        finished(variant, seed, loss, data)
        for data in ("short", "long")
        for variant, both in losses.items()
        for seed, loss in enumerate(both)
    ]
    variables = {"four": 4, "one": 1, "two": 2}
    report = StudyReport(runs, {"variable": "model.overrides.num_attention_heads"}, figure, variables)
    panels = report.draw().axes
    assert [panel.get_title() for panel in panels] == ["short", "long"]
    if figure == "curves":
        assert [list(line.get_ydata()) for line in panels[0].lines] == [
            pytest.approx([mean + 1, mean]) for mean in (3.1, 3.6, 3.2)
        ]
        assert len(panels[0].collections) == 3  # the bands
    elif figure == "bars":
        assert [bar.get_height() for bar in panels[1].patches] == pytest.approx([3.1, 3.6, 3.2])
        assert panels[0].get_ylim()[0] == 0
    else:
        assert list(panels[1].lines[0].get_xdata()) == [1, 2, 4]
        assert [tick.get_text() for tick in panels[1].get_xticklabels()] == ["1", "2", "4"]
        assert list(panels[1].lines[0].get_ydata()) == pytest.approx([3.6, 3.2, 3.1])
        assert panels[1].get_xlabel() == "num attention heads"
    assert panels[0].get_shared_y_axes().joined(*panels)
    assert [path.name for path in report.save(tmp_path)][2:] == [f"{figure}.png", f"{figure}.svg"]


def test_bars_have_a_line_where_who_guesses_would_be():
    runs = [replace(finished(variant, 0, 3.0, "short"), chance={"loss": 4.5}) for variant in ("mha", "sas")]
    unknown = [finished(variant, 0, 3.0, "long") for variant in ("mha", "sas")]
    known, other = (panel.lines for panel in StudyReport(runs + unknown, figure="bars").draw().axes)
    lines = [line for line in known if line.get_label() == "chance"]
    assert [list(line.get_ydata()) for line in lines] == [[4.5, 4.5]]
    assert not [line for line in other if line.get_label() == "chance"]


def test_no_two_of_thirty_curves_look_alike():
    runs = [finished(f"variant-{number}", 0, 3.0 + number) for number in range(30)]
    lines = StudyReport(runs).draw().axes[0].lines
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 30


def test_runs_come_back_from_what_a_report_keeps():
    """So that its figure can be drawn again."""
    runs = [replace(finished(variant, seed, 3.0 + seed), chance={"loss": 4.5}) for variant in "ab" for seed in (0, 1)]
    content = json.loads(json.dumps(StudyReport(runs).content()))
    assert json.loads(json.dumps(StudyReport(kept_runs(content)).content())) == content


def test_curves_over_time_take_each_variant_at_its_speed():
    """Twice as fast: the same losses in half of the time; a variant whose speed is unknown is left out of it."""
    runs = [finished("slow", 0, 3.0, speed=2.0), finished("fast", 0, 3.0, speed=4.0), finished("unknown", 0, 3.0)]
    over_tokens, over_seconds = StudyReport(runs, figure="curves-over-time").draw().axes
    assert [line.get_label() for line in over_tokens.lines] == ["slow", "fast", "unknown"]
    slow, fast = over_seconds.lines
    tokens = over_tokens.lines[0].get_xdata()
    assert list(slow.get_xdata()) == [place / 2 for place in tokens]
    assert list(fast.get_xdata()) == [place / 4 for place in tokens]
    assert list(slow.get_ydata()) == list(over_tokens.lines[0].get_ydata())
