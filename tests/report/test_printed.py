"""What the papers print, as data: all is there, and what can be computed again comes out, but where print differs."""

import pytest

from sas_hf.report.printed import printed, rows_of_size


# Rows, and cells with a number in them (averages and deviations too).
SAS_COUNTS = {
    "figure1": (2, 4),
    "figure2": (8, 8),
    "figure3": (6, 6),
    "figure4": (12, 12),
    "figure5": (5, 9),
    "figure6": (4, 7),
    "figure7": (2, 3),
    "section4.1": (4, 5),
    "section4.3": (2, 3),
    "table1": (24, 24 * 8),
    "table2": (12, 40),
    "table3": (6, 120),
    "table4": (6, 30),
    "table5": (10, 100),
    "table6": (6, 60),
    "table7": (10, 100),
    "table8": (6, 60),
}
BETTER_COUNTS = {
    "figure2": (4, 4),
    "figure3": (8, 24),
    "figure4": (4, 8),
    "table1": (12, 112),
    "table2": (8, 64),
    "table3": (3, 33),
    "table4": (12, 72),
    "table5": (12, 108),
    "table6": (16, 176),
    "table7": (4, 40),
    "table8": (12, 108),
    "table9": (12, 108),
    "table10": (9, 99),
}
# The printed average, and that of the printed cells.
AVERAGES_THAT_DIFFER = {("table1", "760M", "MQA"): (52.32, 52.30), ("table8", "1.5B", "SAS"): (55.85, 55.87)}
# Table, data, column: the printed ranks, and those of the printed values.
RANKS_THAT_DIFFER = {
    ("table1", "MNIST", "test loss"): ([4, 2, 3, 1], [4, 1, 3, 2]),
    ("table5", "MNIST", "test loss"): ([4, 2, 3, 1], [4, 1, 3, 2]),
    ("table3", "Europarl and Anki", "test BLEU"): ([1, 3, 3], [1, 2, 3]),
    ("table10", "Europarl and Anki", "test BLEU"): ([1, 3, 3], [1, 2, 3]),
    # of the whole numbers, 197,376 and 197,890
    ("table1", "CIFAR100", "attention parameters of a layer"): ([4, 2, 1, 3], [4, 2, 1, 2]),
}


@pytest.mark.parametrize(("paper", "counts"), [("sas", SAS_COUNTS), ("better", BETTER_COUNTS)])
def test_everything_is_there(paper, counts):
    found = {}
    for key, table in printed(paper).items():
        cells = [
            cell for row in table.rows for cell in (*row.values, row.average, *(row.std or ())) if cell is not None
        ]
        found[key] = (len(table.rows), len(cells))
        kind = "Section " if key.startswith("section") else "Table " if key.startswith("table") else "Figure "
        assert table.source.startswith(kind + key.removeprefix(kind.strip().lower()))
        assert table.title and table.unit
        for row in table.rows:
            for values in (row.values, row.std, row.ranks):
                assert values is None or len(values) == len(table.columns)
    assert found == counts


def test_unknown_papers():
    with pytest.raises(ValueError, match="`paper` is 'tpa'; it must be one of 'sas', 'better'"):
        printed("tpa")


def test_printed_averages():
    differing = {}
    for key in ("table1", "table8"):
        for row in printed("sas")[key].rows:
            mean = sum(row.values) / len(row.values)
            if abs(mean - row.average) > 0.005 + 1e-9:
                differing[key, row.size, row.model] = (row.average, round(mean, 2))
    assert differing == AVERAGES_THAT_DIFFER


def test_printed_ranks():
    differing = {}
    for key, table in printed("better").items():
        ranked = [row for row in table.rows if row.ranks is not None]
        for dataset in dict.fromkeys(row.dataset for row in ranked):
            group = [row for row in ranked if row.dataset == dataset]
            for place, column in enumerate(table.columns):
                ranks = [row.ranks[place] for row in group]
                if None in ranks:
                    assert ranks == [None] * len(group)
                    continue
                sign = -1 if any(word in column for word in ("accuracy", "top-5", "BLEU")) else 1
                values = [sign * row.values[place] for row in group]
                recomputed = [1 + sum(other < value for other in values) for value in values]
                if ranks != recomputed:
                    differing[key, dataset, column] = (ranks, recomputed)
    assert differing == RANKS_THAT_DIFFER


@pytest.mark.parametrize(
    ("short", "dataset", "full"),
    [
        ("table1", "MNIST", "table5"),
        ("table1", "CIFAR100", "table6"),
        ("table2", "IMDB", "table8"),
        ("table2", "Amazon", "table9"),
        ("table3", "Europarl and Anki", "table10"),
    ],
)
def test_a_short_table_is_part_of_the_full_one(short, dataset, full):
    """The ranked rows, with all but the key size; parameters lose digits there."""
    short, full = printed("better")[short], printed("better")[full]
    for row in (row for row in short.rows if row.dataset == dataset):
        (same,) = [other for other in full.rows if other.model == row.model and other.ranks is not None]
        whole = dict(zip(full.columns, same.values, strict=True))
        for column, value in zip(short.columns, row.values, strict=True):
            if column == "attention parameters of a layer":
                assert value == pytest.approx(whole[column], rel=0.016)
            elif value is not None:
                assert whole[column] == value


def test_numbers_that_are_printed_twice():
    sas = printed("sas")
    figure2 = {(row.dataset, row.model): row.values[0] for row in sas["figure2"].rows}
    table7 = {row.model: dict(zip(sas["table7"].columns, row.values, strict=True)) for row in sas["table7"].rows}
    assert figure2["Books3, 512", "SAS"] == round(table7["MHA-SAS"]["50K"], 2)
    assert figure2["Books3, 512", "MHA"] == round(table7["MHA"]["50K"], 2)
    text = {(row.dataset, row.model): row.values for row in sas["section4.1"].rows}
    assert text["Books3, 512", "MHA"][1] == 29.86 > table7["MHA"]["50K"]
    assert text["Books3, 512", "SAS"][0] == round(table7["MHA-SAS"]["35K"], 2) < table7["MHA-SAS"]["30K"]
    for data in ("Books3, 512", "Books3, 1024"):  # SAS is not yet where MHA ends
        assert text[data, "SAS"][0] > text[data, "MHA"][1]
    for key in ("figure5", "figure6"):
        ends = {(row.model, row.values[0]): row.values[1] for row in sas[key].rows}
        assert ends["MHA", 12] == figure2["Books3, 1024", "MHA"]
        assert ends["SAS", 36] == figure2["Books3, 1024", "SAS"]
    assert [row.values[1] for row in sas["figure7"].rows if row.model == "MHA"] == [figure2["Books3, 1024", "MHA"]]
    averages = {(row.size, row.tokens, row.model): row.average for row in sas["table1"].rows}
    assert (averages["350M", "10B", "SAS"], averages["350M", "50B", "SAS"]) == (52.13, 55.07)  # §4.4, in the text
    assert (averages["760M", "10B", "SAS"], averages["1.5B", "10B", "SAS"]) == (54.27, 55.69)


def test_prints_to_distrust():
    sas = printed("sas")

    def shared(table, one, other):
        rows = [next(row for row in table.rows if (row.model, row.size, row.tokens) == key) for key in (one, other)]
        return sum(a == b for a, b in zip(rows[0].values, rows[1].values, strict=True))

    assert shared(sas["table1"], ("MLA", "350M", "50B"), ("MLA", "760M", "10B")) == 6
    assert shared(sas["table1"], ("MHA", "350M", "50B"), ("MHA", "760M", "10B")) == 4
    assert shared(sas["table6"], ("GQA", None, None), ("MLA", None, None)) == 10
    times = {row.model: row.values for row in sas["table4"].rows}
    ratios = [sas / mha for sas, mha in zip(times["SAS"], times["MHA"], strict=True)]
    assert [round(ratio, 2) for ratio in ratios] == [1.88, 1.90, 1.83, 1.88, 1.85]
    for key in ("table3", "table5", "table6", "table7"):  # perplexity falls with training, but for last digits
        for row in sas[key].rows:
            assert all(later < earlier + 0.04 for earlier, later in zip(row.values, row.values[1:], strict=False))


def test_equation_24():
    """Standard over Efficient: never more than 15/9, and less with more heads, as in the text but not the caption."""
    better = printed("better")
    constants = {row.model: row.values for row in better["figure4"].rows}
    assert {row.model: row.values[0] for row in better["figure2"].rows} == {k: v[0] for k, v in constants.items()}

    def operations(kind, length, width, heads):
        projections, scores = constants[kind]
        return projections * length * width + scores * heads * length**2

    def more(heads, length, width):
        return 100 * (operations("standard", length, width, heads) / operations("efficient", length, width, heads) - 1)

    assert 66 < more(1, 1, 10_000) < 67
    by_heads = [more(heads, 64, 256) for heads in (1, 2, 4, 8)]
    assert by_heads == sorted(by_heads, reverse=True)
    said = {"text": {}, "caption": {}}
    for row in better["figure3"].rows:
        heads, average, _ = row.values
        said[row.dataset][heads] = average
    assert [said["text"][heads] for heads in (1, 2, 4, 8)] == [30, 25, 20, 16]
    assert [said["caption"][heads] for heads in (1, 2, 4, 8)] == [16, 20, 25, 30]


@pytest.mark.parametrize(
    "parameters, size", [(353_450_000, "350M"), (772_100_000, "760M"), (1_554_900_000, "1.5B"), (430_000_000, "350M")]
)
def test_rows_of_a_model_s_size(parameters, size):
    assert {row.size for row in rows_of_size(printed("sas")["table1"], parameters)} == {size}


def test_no_rows_for_other_sizes():
    assert rows_of_size(printed("sas")["table1"], 135_000_000) == []
    assert rows_of_size(printed("sas")["table8"], 353_450_000) == []
