"""The page of all items is that of the declarations and results, and its pictures are there."""

from pathlib import Path

import pytest
from made_results import result

from sas_hf.papers.comparison import AGREEMENTS
from sas_hf.papers.items import PAPERS, item_names, load_item
from sas_hf.papers.page import keep, kept_result, kept_results, page, write_page
from sas_hf.papers.training import drawn_again


DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_that_of_the_declarations_and_results():
    assert (DOCS / "papers.md").read_text() == page(), "write it anew: python -m sas_hf.papers.page"


def test_every_picture_of_the_page_is_there_and_no_other():
    shown = {f"{r.paper}-{r.item}-{name}.png" for r in kept_results().values() for name in r.pictures}
    assert {path.name for path in (DOCS / "figures" / "papers").iterdir()} == shown


def test_the_bars_of_what_was_trained_are_drawn_again():
    """From what is kept, each data set in its own panel with its own line of chance, from 0."""
    films, products = drawn_again(kept_result("better", "table2")).axes
    for axes, data, chance in ((films, "films", 0.5), (products, "products", 0.2)):
        summaries = [part["summaries"] for part in kept_result("better", "table2").numbers["parts"].values()]
        means = [each["accuracy"][0] for part in summaries for each in part if each["data"] == data]
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(means)
        assert [list(line.get_ydata()) for line in axes.lines if line.get_label() == "chance"] == [[chance, chance]]
        assert axes.get_ylim()[0] == 0
    (sweep,) = drawn_again(kept_result("sas", "figure1")).axes
    assert sweep.get_xlabel() == "attention heads" and list(sweep.lines[0].get_xdata()) == [1, 2, 4, 8, 16, 32]


def test_every_item_and_every_agreement_is_on_it():
    written = page()
    for paper in PAPERS:
        for name in item_names(paper):
            assert f"`sas-hf paper {paper} {name}`" in written
            assert load_item(paper, name).title in written
    assert all(f"**{name}**" in written for name in AGREEMENTS)


def test_no_kept_result_stands_under_the_papers_data_alone():
    """What was trained here was trained on other data, and says so."""
    for (paper, name), kept in kept_results().items():
        if load_item(paper, name).kind == "training":
            assert kept.size == "paper" or kept.stand_in, f"{paper} {name}"


def test_results_are_taken_with_their_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("sas_hf.papers.page.RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    result().save(tmp_path / "runs" / "sas-table7")
    assert keep(tmp_path / "runs", tmp_path / "figures") == ["sas-table7"]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["sas-table7-beside.png"]
    write_page(tmp_path / "page.md")
    written = (tmp_path / "page.md").read_text()
    assert "Every method under simulation (technical text for Books3)" in written
    assert "sas minus mha, perplexity: -0.0300 (-0.0400 to -0.0200) nats" in written
    assert "differs 1" in written
