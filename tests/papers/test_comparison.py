"""Our numbers beside printed ones: what agreement means, and that a result comes back from its file as it was."""

import json
import math

import pytest
from made_results import comparison, result

from sas_hf.papers.comparison import AGREEMENTS, Comparison, draw_comparisons, read_result


@pytest.mark.parametrize(
    ("compared", "agreement"),
    [
        (comparison(-0.03, -0.05, -0.04, -0.02, n=5), "agrees"),
        (comparison(-0.03, 0.05, -0.04, -0.02, n=5), "contradicts"),
        (comparison(0.03, 0.05, 0.02, 0.04, n=5), "agrees"),
        (comparison(0.01, -0.05, -0.01, 0.03, n=5), "smaller"),
        (comparison(0.01, 0.02, -0.01, 0.03, n=5), "undecided"),
        (comparison(0.0, 0.02, 0.0, 0.0, n=5), "smaller"),
        (comparison(-0.03, -0.05), "one run"),
        (comparison(1.5, 1.9, 1.4, 1.6, n=5, neutral=1.0), "agrees"),
        (comparison(0.9, 1.9, 0.8, 0.95, n=5, neutral=1.0), "contradicts"),
        (comparison(1.01, 1.02, 0.9, 1.1, n=5, neutral=1.0), "undecided"),
        (comparison(-0.03, 0.0, -0.04, -0.02, n=5), "contradicts"),  # the paper prints the same of both
        (comparison(0.03, 0.0, 0.02, 0.04, n=5), "contradicts"),
        (comparison(math.nan, -0.05, math.nan, math.nan, n=5), "not finite"),  # a training that diverged
        (comparison(math.inf, -0.05), "not finite"),
        (comparison(66048, 66048, neutral=None), "equal"),
        (comparison(66048, 66000, neutral=None), "differs"),
    ],
)
def test_agreement_is_what_the_interval_says(compared, agreement):
    assert compared.agreement == agreement
    assert agreement in AGREEMENTS
    assert compared.row()[-1] == agreement


def test_a_result_comes_back_as_it_was_saved(tmp_path):
    saved = result()
    paths = saved.save(tmp_path)
    assert {path.name for path in paths} == {"result.md", "result.json", "beside.png", "beside.svg"}
    read = read_result(tmp_path / "result.json")
    assert read.pictures == saved.pictures == ["beside"]
    assert read.to_dict() == saved.to_dict()
    assert json.loads((tmp_path / "result.json").read_text())["comparisons"][0]["agreement"] == "agrees"


def test_every_heading_names_what_stands_for_the_papers_data(tmp_path):
    result().save(tmp_path)
    first = (tmp_path / "result.md").read_text().splitlines()[0]
    assert first == "# Every method under simulation (technical text for Books3)"
    assert "![Every method under simulation](beside.png)" in (tmp_path / "result.md").read_text()


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "result.json"
    path.write_text('{"paper": "sas"}')
    with pytest.raises(ValueError, match="is no result of `sas-hf paper`"):
        read_result(path)


def test_each_unit_has_a_panel_and_counts_have_no_picture():
    pairs = [comparison(-0.03, -0.05, -0.04, -0.02), comparison(-0.01, -0.02), comparison(4, 5, neutral=None)]
    ratio = Comparison("sas over mha", "ratio", 1.5, 1.9, 1.4, 1.6, 5, 1.0)
    panels = draw_comparisons([*pairs, ratio]).axes
    assert [len(axes.get_yticks()) for axes in panels] == [2, 1]
    assert "nats" in panels[0].get_xlabel()
    assert "ratio" in panels[1].get_xlabel()
    assert draw_comparisons(pairs[2:]) is None
