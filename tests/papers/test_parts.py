"""Items of several grids, really trained at a tiny size: one table, one figure, benchmarks beside the printed ones."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_benchmarks import write_table_1

from sas_hf.data.text import python_reference
from sas_hf.papers.comparison import read_result
from sas_hf.papers.items import find_place, stand_in
from sas_hf.papers.training import Beside, plan_parts, result_of, run_parts, saved
from sas_hf.training.study_report import StudyReport
from sas_hf.training.study_results import FinishedRun
from sas_hf.training.tasks.causal import PERPLEXITY
from sas_hf.training.tasks.task import LOSS


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 2048}
SHORT = {"max_steps": 2, "warmup_steps": 1, "logging_steps": 1, "eval_steps": 2, "save_steps": 2}
TINY = [
    *(f"model.overrides.{name}={value}" for name, value in SMALL.items()),
    "model.overrides.max_position_embeddings=64",
    "model.tokenizer=python-reference",
    "data.sequence_length=32",
    "data.validation_documents=2",
    "data.max_validation_sequences=4",
    "batch_size=2",
    *(f"training.{name}={value}" for name, value in SHORT.items()),
    "training.per_device_train_batch_size=2",
    "training.use_cpu=true",
    "evaluation.tasks=[sas_table1]",
    "evaluation.limit=2",
    "evaluation.steps=2",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Table 1's first two parts, of two methods: place, folder and result."""
    folder = tmp_path_factory.mktemp("table1")
    lines = [line for line in python_reference().splitlines() if len(line.split()) > 6]
    texts = [" ".join(lines[start : start + 40]) for start in range(0, 800, 40)]
    (folder / "fineweb-edu").mkdir()
    pq.write_table(pa.table({"text": texts}), folder / "fineweb-edu" / "train.parquet")
    benchmarks = write_table_1(folder / "benchmarks", lines[:200], 4)
    whole = find_place("sas", "table1", "paper")
    item = dataclasses.replace(whole.item, variants=["mha", "sas"])
    place = dataclasses.replace(whole, item=item, at=dataclasses.replace(whole.at, parts=whole.at.parts[:2]))
    overrides = [*TINY, f"evaluation.data={benchmarks}"]
    parts = plan_parts(place, folder / "runs", folder / "study", folder, None, overrides)
    reports = run_parts(parts, overrides, lambda message: None)
    return place, folder, result_of(place, parts, reports, "sas-hf paper sas table1", folder)


def test_benchmarks_stand_beside_the_printed_ones(made):
    place, folder, result = made
    names = [part.at.grid for part in place.parts]
    assert len(result.comparisons) == 2 * 8 and {found.unit for found in result.comparisons} == {"points"}
    for number, (grid, printed) in enumerate(zip(names, (60.44 - 56.57, 55.93 - 54.29), strict=True)):
        compared = result.comparisons[8 * number + 1]
        assert compared.what == f"sas minus mha, benchmark/sas_table1/ARC-E, {['350M, 50B', '350M, 10B'][number]}"
        assert compared.printed == pytest.approx(printed) and compared.agreement == "one run"
        runs = folder / "runs" / "paper" / "runs" / grid / grid
        mha, sas = (json.loads((runs / name / "seed-0" / "all_results.json").read_text()) for name in ("mha", "sas"))
        column = "benchmark/sas_table1/ARC-E"
        assert compared.ours == pytest.approx(100 * (sas[column] - mha[column]))
        average = result.comparisons[8 * number]
        assert average.ours == pytest.approx(sum(found.ours for found in result.comparisons[8 * number + 1 :][:7]) / 7)
        rows = next(grid.rows for grid in result.grids if "average" in grid.title.lower() and "beside" in grid.title)
        assert rows[1][0] == "sas" and rows[1][2] == "55.07"
    assert [average.printed for average in result.comparisons[::8]] == pytest.approx([55.07 - 52.92, 52.13 - 50.55])


def test_parts_are_one_result(made):
    place, folder, result = made
    names = [part.at.grid for part in place.parts]
    assert list(result.numbers["parts"]) == names and result.stand_in is None
    assert [run["variant"] for run in result.numbers["parts"][names[1]]["runs"]] == ["mha", "sas"]
    assert result.notes[:1] == [place.at.note]  # once
    assert [panel.get_title() for panel in result.figure.axes] == names
    assert {path.name for path in (folder / "study").iterdir() if path.is_dir()} == set(names)
    result.save(folder / "out")
    assert read_result(folder / "out" / "result.json").numbers["parts"].keys() == set(names)


def test_each_part_names_its_stand_in(tmp_path):
    place = find_place("better", "table2", "cpu")
    told = "rated sentences on films for IMDB, rated sentences on products for Amazon reviews"
    assert stand_in(place, tmp_path) == told


@pytest.mark.parametrize(("size", "told"), [("cpu", "films for IMDB"), ("paper", "IMDB")])
def test_a_comparison_never_calls_our_data_by_the_papers_name(size, told):
    part = find_place("better", "table2", size).parts[0]
    (data,) = part.at.data
    runs = [FinishedRun(variant, data, 0, {"accuracy": 0.5, "loss": 1.0}, 9, None, {}) for variant in part.variants]
    beside = Beside(part, StudyReport(runs, metrics=(LOSS,)), data, "IMDB", "loss", part.item.metrics["loss"])
    assert [c.what for c in beside.comparisons][-1] == f"super-4 minus standard-4, loss, {told}"


def test_what_is_not_as_declared_is_in_the_heading(tmp_path):
    place = find_place("sas", "table7", "paper")
    assert stand_in(place, tmp_path) is None
    assert stand_in(place, tmp_path, ["training.max_steps=9"]) == "not as declared: training.max_steps=9"


@pytest.mark.parametrize("reached", [True, False])
def test_tokens_saved_stand_beside_the_printed_ones(reached):
    """Section 4.1 by curves with a known crossing: SAS is at MHA's last loss after 60 and 70 % of the steps."""
    place = find_place("sas", "section4.1", "cpu")
    runs = []
    for data in place.at.data:
        for seed, step in enumerate((60, 70)):
            curves = {"mha": [(0, 5.0), (100, 3.0)], "sas": [(0, 5.0), (step, 3.0), (100, 2.0)]}
            if not reached and seed == 1:
                curves["sas"] = [(0, 5.0), (100, 4.0)]
            for variant, curve in curves.items():
                metrics = dict.fromkeys(("loss", "perplexity"), curve[-1][1])
                runs.append(FinishedRun(variant, data, seed, metrics, 9, None, dict.fromkeys(metrics, curve)))
    found, notes = saved(place, StudyReport(runs, metrics=(LOSS, PERPLEXITY)))
    if not reached:
        assert not found and notes == [
            "With 1 of 2 seeds, sas never has what mha has in the end: no tokens are compared."
        ]
        return
    (tokens,) = found  # the paper prints none on the other data
    assert tokens.ours == pytest.approx(35) and tokens.printed == 40 and tokens.n == 2 and notes == []
    assert tokens.low < 35 < tokens.high and tokens.row()[1].startswith("+35.00")
