"""Items that are trained: real tiny runs on the Python reference, shared between items; what is refused before any."""

import json

import pytest
import yaml
from helpers import sas_hf
from typer.testing import CliRunner

from sas_hf.cli import app
from sas_hf.papers.items import PAPERS, SIZES, find_place, item_names, load_item
from sas_hf.papers.page import needs, state
from sas_hf.papers.run import estimate_item, run_item
from sas_hf.papers.training import plan_parts


# Of every recipe, so that a run takes a second.
TINY = (
    *("training.max_steps=4", "training.eval_steps=2", "training.save_steps=4", "training.warmup_steps=1"),
    *("training.logging_steps=2", "data.max_validation_sequences=4", "training.per_device_train_batch_size=2"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("papers")


@pytest.fixture(scope="module")
def figure6(runs):
    told = []
    return run_item("sas", "figure6", seeds=[0, 1], runs=runs, overrides=TINY, progress=told.append), told


def test_our_rows_stand_beside_the_papers(figure6, runs):
    result, told = figure6
    assert told[-1].startswith("run 8 of 8: length-128, sas, seed 1")
    assert "(the Python reference, 164K parameters for Books3 at 125M and length 1,024; not as" in result.heading
    assert result.heading.endswith(f"not as declared: {', '.join(TINY)})")
    # What is said of the declared runs is not said of these.
    assert any(note.startswith("As declared, of technical text") for note in result.notes)
    compared = {comparison.what: comparison for comparison in result.comparisons}
    assert list(compared) == [f"{name} minus mha, perplexity" for name in ("sas-linear", "sas-1x", "sas")]
    sas = compared["sas minus mha, perplexity"]
    assert sas.printed == pytest.approx(-0.0668, abs=1e-4)  # ln(22.14 / 23.67)
    assert sas.n == 2
    losses = {
        (run["variant"], run["seed"]): run["loss"]
        for run in json.loads((runs / "cpu" / "sas-figure6" / "study" / "study.json").read_text())["runs"]
    }
    pairs = [losses["sas", seed] - losses["mha", seed] for seed in (0, 1)]
    assert sas.ours == pytest.approx(sum(pairs) / 2)
    beside = next(grid for grid in result.grids if "beside the paper" in grid.title)
    assert [row[2] for row in beside.rows] == ["23.67", "22.43", "22.96", "22.14"]
    assert any(note.startswith("Power: with n = 2") for note in result.notes)
    folder = runs / "cpu" / "sas-figure6"
    for name in ("result.md", "result.json", "figure.png", "beside.png"):
        assert (folder / name).is_file()
    assert "Python reference" in (folder / "result.md").read_text().splitlines()[0]


def test_items_share_their_runs(figure6, runs):
    weights = runs / "cpu" / "runs" / "text" / "length-128" / "mha" / "seed-0" / "model.safetensors"
    made, told = weights.stat().st_mtime_ns, []
    run_item("sas", "figure7", seeds=[0], runs=runs, overrides=TINY, progress=told.append)
    assert weights.stat().st_mtime_ns == made
    kept = [message for message in told if "kept" in message]
    assert [message.split(", ")[1] for message in kept] == ["mha", "sas"]
    assert (runs / "cpu" / "sas-figure6" / "result.json").is_file()


def test_another_recipe_does_not_mix_with_the_runs(figure6, runs):
    with pytest.raises(FileExistsError, match=r"max_steps: '4' there, '6' now"):
        run_item("sas", "figure6", seeds=[0], runs=runs, overrides=(*TINY[1:], "training.max_steps=6"))


@pytest.mark.parametrize("damaged", ["", "{", "[]"])
def test_damaged_results_of_a_run_are_named(damaged, figure6, runs):
    path = runs / "cpu" / "runs" / "text" / "length-128" / "mha" / "seed-0" / "all_results.json"
    whole = path.read_text()
    path.write_text(damaged)
    try:
        with pytest.raises(ValueError, match=r"seed-0/all_results.json is damaged .*; remove it"):
            run_item("sas", "figure6", seeds=[0, 1], runs=runs, overrides=TINY)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("options", [["--size", "paper"], ["--data", "."], ["--seeds", "0"], ["--dry-run"]])
def test_the_list_takes_no_options_of_an_item(options):
    result = CliRunner().invoke(app, ["paper", "sas", *options])
    assert result.exit_code == 1
    assert f"{options[0]} is of an item" in result.output


def test_a_folder_of_another_item_is_refused(figure6, runs):
    folder = runs / "cpu" / "sas-figure6"
    with pytest.raises(FileExistsError, match=r"holds sas figure6 at the size 'cpu', not sas figure5"):
        run_item("sas", "figure5", seeds=[0], runs=runs, output=folder, overrides=TINY)
    assert yaml.safe_load((folder / "item.yaml").read_text())["item"] == "figure6"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sas", "table9"), r"has no item 'table9'; there are, for instance, table"),
        (("sos", "table7"), r"There is no paper 'sos'; there are sas \(Simulated"),
        (("sas", "table7", "big"), r"`size` is 'big'; it must be cpu or paper"),
        (("sas", "figure4"), r"has no form at the size 'cpu': it is about larger models"),
        (
            ("sas", "table7", "paper"),
            r"needs data: give --data FOLDER that holds books3/train\* and books3/validation\*",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_built(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_item(*arguments, runs=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_the_data_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"--data has no .*text/train.txt; sas table7 needs text/train.txt and"
    ):
        run_item("sas", "table7", data=tmp_path / "data", runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_measured_items_have_no_recipe_to_change(tmp_path):
    with pytest.raises(ValueError, match=r"sas table2 is measured, not trained, and has no `seeds`, `overrides`"):
        run_item("sas", "table2", seeds=[0], overrides=["a=1"], runs=tmp_path)


def test_the_configurations_are_those_that_table_2_prints(tmp_path):
    result = run_item("sas", "table2", runs=tmp_path)
    assert {comparison.agreement for comparison in result.comparisons} == {"equal"}
    assert result.numbers["mqa-125m"]["attention parameters of a layer"] == 4 * 768 * 768


def test_a_dry_run_tells_what_an_item_takes_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = estimate_item("sas", "figure6", seeds=[0], overrides=TINY).grid()
    assert len(grid.rows) >= 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("paper", "name", "size"), [("sas", "figure6", "paper"), ("better", "table8", "cpu")])
def test_a_dry_run_needs_no_data(paper, name, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = find_place(paper, name, size)
    parts = plan_parts(place, tmp_path, tmp_path, None, [0], (), needs_data=False)
    assert [run.variant for run in parts[0].runs] == place.variants
    assert list(tmp_path.iterdir()) == []


def test_the_list_says_what_every_item_needs(runs, figure6):
    shown = CliRunner().invoke(app, ["paper", "--runs", str(runs)], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    for paper in PAPERS:
        for name in item_names(paper):
            assert name in shown.output
            assert all(needs(paper, name, size) for size in SIZES)
    assert "here, cpu" in state("sas", "figure6", runs)
    assert max(map(len, shown.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "folders"), [("table3", "arxiv/"), ("table7", "books3/"), ("figure2", "arxiv/ books3/")]
)
def test_an_item_needs_the_data_that_it_takes_of_its_grid(name, folders, tmp_path):
    assert needs("sas", name, "paper") == folders
    with pytest.raises(ValueError) as refused:
        run_item("sas", name, "paper", runs=tmp_path)
    for folder in ("arxiv/", "books3/"):
        assert (f"{folder}train* and {folder}validation*" in str(refused.value)) == (folder in folders)


def test_every_item_is_declared_at_some_size():
    for paper in PAPERS:
        for name in item_names(paper):
            item = load_item(paper, name)
            sizes = [size for size in SIZES if getattr(item, size) is not None]
            assert sizes, f"{paper} {name}"
            assert len(sizes) == 2 or item.missing, f"{paper} {name} does not say why a size is missing"
            for size in sizes:
                find_place(paper, name, size)


def test_the_command_shows_the_item(runs, figure6):
    shown = sas_hf("paper", "sas", "figure6", *TINY, "--seeds", "0,1", "--runs", str(runs))
    assert shown.returncode == 0, shown.stderr
    assert "agreement" in shown.stdout
    assert "Saved" in shown.stdout
