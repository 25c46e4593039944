"""The papers' tables as data: their averages follow from their cells, but where print differs."""

import pytest

from sas_hf.configurations import named_config
from sas_hf.hub.info import describe
from sas_hf.report.printed import PAPERS, printed, rows_of_size


# The printed average, and that of the printed cells.
AVERAGES_THAT_DIFFER = {("table1", "760M", "MQA"): (52.32, 52.30), ("table8", "1.5B", "SAS"): (55.85, 55.87)}


def test_the_tables_are_there():
    assert list(printed("sas")) == [f"table{number}" for number in (1, 3, 4, 5, 6, 7, 8)]
    assert list(printed("better")) == [f"table{number}" for number in (1, 2, 3, 7)]
    for paper in PAPERS:
        for table in printed(paper).values():
            for row in table.rows:
                assert len(row.values) == len(table.columns)
                assert row.std is None or len(row.std) == len(table.columns)
    with pytest.raises(ValueError, match="`paper` is 'tpa'"):
        printed("tpa")


def test_printed_averages():
    differing = {}
    for key in ("table1", "table8"):
        for row in printed("sas")[key].rows:
            mean = sum(row.values) / len(row.values)
            if abs(mean - row.average) > 0.005 + 1e-9:
                differing[key, row.size, row.model] = (row.average, round(mean, 2))
    assert differing == AVERAGES_THAT_DIFFER


def test_what_the_papers_say_of_their_tables():
    tables = printed("sas")
    by_model = {row.model: row for row in tables["table6"].rows}
    assert by_model["GQA"].values == by_model["MLA"].values
    averages = {(row.size, row.tokens, row.model): row.average for row in tables["table1"].rows}
    assert (averages["350M", "10B", "SAS"], averages["350M", "50B", "SAS"]) == (52.13, 55.07)  # §4.4, in the text
    assert (averages["760M", "10B", "SAS"], averages["1.5B", "10B", "SAS"]) == (54.27, 55.69)
    times = {row.model: row.values for row in tables["table4"].rows}
    ratios = [sas / mha for sas, mha in zip(times["SAS"], times["MHA"], strict=True)]
    assert [round(ratio, 2) for ratio in ratios] == [1.88, 1.90, 1.83, 1.88, 1.85]
    for key in ("table3", "table5", "table6", "table7"):  # perplexity falls with training, but for last digits
        for row in tables[key].rows:
            assert all(later < earlier + 0.04 for earlier, later in zip(row.values, row.values[1:], strict=False))
    imdb = [row for row in printed("better")["table2"].rows if row.dataset == "IMDB"]
    counts = [describe(named_config(f"imdb-{row.model}")).attention_parameters for row in imdb]
    assert counts == [row.values[2] for row in imdb]
    vision = printed("better")["table1"]
    best = max((row for row in vision.rows if row.dataset == "ImageNet"), key=lambda row: row.values[4])
    assert (best.model, best.values[4]) == ("super", 60)


@pytest.mark.parametrize(
    "parameters, size", [(353_450_000, "350M"), (772_100_000, "760M"), (1_554_900_000, "1.5B"), (430_000_000, "350M")]
)
def test_rows_of_a_model_s_size(parameters, size):
    assert {row.size for row in rows_of_size(printed("sas")["table1"], parameters)} == {size}


def test_no_rows_for_other_sizes():
    assert rows_of_size(printed("sas")["table1"], 135_000_000) == []
    assert rows_of_size(printed("sas")["table8"], 353_450_000) == []
