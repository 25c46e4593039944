"""A task end to end by the command: what it writes, that it goes on after a kill, and what it refuses."""

import json
import math
import signal
import subprocess
import sys

import pytest
from helpers import python_environment
from typer.testing import CliRunner

from sas_hf.capacity.report import CapacityResult, Trained, error_text, ratio_text
from sas_hf.capacity.run import RUNS_NAME, Job, run_capacity, seconds_left
from sas_hf.capacity.tasks import TASKS
from sas_hf.capacity.training import HELD_OUT, STREAMS, TRIED_BATCHES
from sas_hf.capacity.variants import Cost, Variant, count_cost, variants_of
from sas_hf.cli import app
from sas_hf.report.tables import TERMINAL


CHOSEN = ["--variants", "sas-2to4,mha-4", "--steps", "8", "--levels", "4", "--seeds", "0,1"]


def command(*arguments):
    return CliRunner().invoke(app, ["capacity", *map(str, arguments)])


def without_seconds(folder) -> dict:
    kept = json.loads((folder / RUNS_NAME).read_text())["figures"]
    return {key: {name: value for name, value in run.items() if name != "seconds"} for key, run in kept.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capacity") / "fetch"
    shown = command("fetch", *CHOSEN, "--output", folder)
    assert shown.exit_code == 0, shown.output
    return folder, shown.output


def test_the_command_writes_and_shows_what_was_found(whole):
    folder, shown = whole
    assert {path.name for path in folder.iterdir()} == {
        RUNS_NAME, "result.md", "result.json", "figure.png", "figure.svg"
    }  # fmt: skip
    content = json.loads((folder / "result.json").read_text())
    assert (
        content["command"]
        == f"sas-hf capacity fetch {' '.join([*CHOSEN[4:6], *CHOSEN[:2], *CHOSEN[6:], '--steps 8'])}"
    )
    found = {variant["name"]: variant for variant in content["variants"]}
    assert list(found) == ["mha-2", "mha-4", "sas-2to4"]
    kept = without_seconds(folder)
    assert len(kept) == 3 * (2 + 2)  # two rates, then two seeds
    for name, variant in found.items():
        tried = {rate: kept[f"4/{name}/rate {rate}"]["curve"][-1] for rate in content["rates"]}
        assert variant["rate"] == min(tried, key=tried.get) == kept[f"4/{name}/seed 1"]["rate"]
        errors = [kept[f"4/{name}/seed {seed}"]["error"] for seed in (0, 1)]
        assert errors[0] != errors[1] and variant["error"] == pytest.approx(sum(errors) / 2)
        assert (variant["low"], variant["high"]) == (min(errors), max(errors))
        cost = count_cost(TASKS["fetch"], 4, variants_of(TASKS["fetch"], 4)[name])
        assert (variant["parameters"], variant["operations"]) == (cost.parameters, cost.operations)
    pairs = [(kept[f"4/sas-2to4/seed {seed}"]["error"], kept[f"4/mha-2/seed {seed}"]["error"]) for seed in (0, 1)]
    ratio = math.exp(sum(math.log(now / before) for now, before in pairs) / 2)
    over = found["sas-2to4"]["over_base"]
    assert over["ratio"] == pytest.approx(ratio) and over["low"] < ratio < over["high"]
    assert found["mha-4"]["over_base"] is None
    for text in (shown, (folder / "result.md").read_text()):
        assert "sas-2to4" in text and error_text(found["mha-4"]["error"]) in text and ratio_text(ratio) in text
    assert "12 of 12; about" in shown and max(map(len, shown.splitlines())) <= TERMINAL


def test_what_is_kept_is_not_trained_again(whole):
    folder, _ = whole
    before = (folder / RUNS_NAME).read_bytes()
    shown = command("fetch", *CHOSEN, "--output", folder)
    assert shown.exit_code == 0 and "seed 0:" not in shown.output and (folder / RUNS_NAME).read_bytes() == before


def test_all_variants_of_a_seed_see_the_same_batches(whole, monkeypatch, tmp_path):
    seen, make = {}, TASKS["fetch"].make_batch

    def record(level, rows, generator):
        batch = make(level, rows, generator)
        seen.setdefault(generator.initial_seed(), []).append(batch["labels"][0].item())
        return batch

    monkeypatch.setitem(TASKS["fetch"].__dict__, "make_batch", record)
    run_capacity("fetch", [4], ["mha-1", "mha-2"], [5, 6], [0.01], 3, tmp_path / "seen")
    for seed in (5, 6):
        first, second = seen[STREAMS + seed][:3], seen[STREAMS + seed][3:]
        assert len(set(first)) == 3 and first == second
    # And each seed others, and none those that all are tried on.
    tried = seen[HELD_OUT][:TRIED_BATCHES]
    assert seen[HELD_OUT] == 4 * tried
    assert len({*seen[STREAMS + 5], *seen[STREAMS + 6], *tried}) == 3 + 3 + TRIED_BATCHES


KILLED = """
import os, signal, sys
from sas_hf.capacity.run import run_capacity
def kill(message):
    if "4 of 12" in message:
        os.kill(os.getpid(), signal.SIGKILL)
run_capacity("fetch", [4], ["sas-2to4", "mha-4"], [0, 1], steps=8, output=sys.argv[1], progress=kill)
"""


def test_killed_and_interrupted_it_goes_on_to_the_same_numbers(whole, tmp_path):
    """Killed after some trainings, then ended by Ctrl-C, then done: as if nothing had been."""
    folder = tmp_path / "again"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=python_environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    after_kill = without_seconds(folder)
    assert len(after_kill) == 3 and not (folder / "result.json").exists()

    def stop(message):
        if "8 of 12" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="7 of 12 trainings are kept; the same command goes on"):
        run_capacity("fetch", [4], ["sas-2to4", "mha-4"], [0, 1], steps=8, output=folder, progress=stop)
    assert len(without_seconds(folder)) == 7 and after_kill.items() <= without_seconds(folder).items()
    assert command("fetch", *CHOSEN, "--output", folder).exit_code == 0
    assert without_seconds(folder) == without_seconds(whole[0])


def test_tokens_are_learnt_by_the_language_model(tmp_path):
    result = run_capacity("copying", [16], ["mha-1"], [0], [0.01], 60, tmp_path / "copying")
    (trained,) = result.trained
    assert trained.runs[0]["curve"][0] > 2 and trained.error < 0.2


def test_a_training_that_diverges_counts_as_chance_and_says_so(tmp_path, monkeypatch):
    make = TASKS["fetch"].make_batch

    def broken(level, rows, generator):
        batch = make(level, rows, generator)
        return batch | {"labels": batch["labels"] / 0} if rows == TASKS["fetch"].rows else batch

    monkeypatch.setitem(TASKS["fetch"].__dict__, "make_batch", broken)
    result = run_capacity("fetch", [4], ["mha-1"], [0], [0.003, 0.01], 3, tmp_path / "broken")
    assert result.trained[0].errors == [1.0] and result.notes() == [
        "fetch, 4 things, mha-1: 1 diverged, and count as chance."
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fetsh"], "There is no task 'fetsh'; known are fetch, mqar"),
        (["fetch", "--levels", "5"], "`levels` holds 5; fetch has the things 4, 8."),
        (["fetch", "--variants", "sas-2to5"], "`variants` holds 'sas-2to5'; fetch with 4 things has mha-1, mha-2"),
        (["fetch", "--seeds", "0,0"], "`seeds` is 0, 0; name each once."),
        (["fetch", "--seeds=-1"], "`seeds` holds -1; they must be from 0 to 999,999."),
        (["fetch", "--seeds", ","], "`seeds` is empty"),
        (["fetch", "--rates", "0.1,2"], "`rates` holds 2.0; they must be above 0 and below 1"),
        (["fetch", "--rates", "fast"], "`--rates` is 'fast'; it must be numbers with commas, such as 0.003,0.01."),
        (["fetch", "--steps", "0"], "`steps` is 0; it must be at least 1."),
        (["--steps", "5"], "--steps is of a task; name one, such as fetch."),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, told, tmp_path):
    folder = tmp_path / "none"
    shown = command(*arguments, *(["--output", folder] if arguments[0] != "--steps" else []))
    (line,) = shown.stderr.splitlines()
    assert shown.exit_code == 1 and told in line and not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mqar"], "holds figures with task 'fetch', not 'mqar'"),
        (["fetch", "--steps", "9"], "holds figures with steps 8, not 9"),
        (["fetch", "--steps", "8", "--rates", "0.003"], "holds figures with rates [0.003, 0.01], not [0.003]"),
    ],
)
def test_a_folder_of_another_task_or_of_other_settings(whole, arguments, told):
    before = {path.name: path.read_bytes() for path in whole[0].iterdir()}
    shown = command(*arguments, "--output", whole[0])
    (line,) = shown.stderr.splitlines()
    assert shown.exit_code == 1 and told in line
    assert {path.name: path.read_bytes() for path in whole[0].iterdir()} == before


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    assert "which holds no capacity task; name a free folder." in command("fetch", "--output", tmp_path).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_list_of_tasks(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "runs/capacity" not in command().output
    (tmp_path / "runs/capacity/mqar").mkdir(parents=True)
    (tmp_path / "runs/capacity/mqar/result.json").write_text("{}")
    shown = command().output
    assert all(name in shown for name in TASKS) and shown.count("runs/capacity/") == 1
    assert max(map(len, shown.splitlines())) <= TERMINAL


@pytest.mark.parametrize("name", TASKS)
def test_tables_fit_a_terminal_and_a_picture_is_drawn(name):
    """With the longest names there are, and errors and ratios from the floor to chance."""
    task = TASKS[name]
    level = task.levels[-1]
    trained = []
    for place, (known, variant) in enumerate(variants_of(task, level).items()):
        low, high = (3e-6, 0.97) if place % 2 else (0.0345, 0.0512)
        runs = {
            seed: {"error": error, "diverged": False} for seed, error in enumerate((low, (low * high) ** 0.5, high))
        }
        trained.append(Trained(level, variant, Cost(123_456, 1_234_567), 0.003, runs))
        assert known == variant.name
    made = {"device": "a", "cores": 2, "threads": 1, "torch": "2", "transformers": "5", "date": "today"}
    result = CapacityResult(task, "sas-hf capacity", 5, [0.003], 1.0, made, trained)
    by_heads, variants = result.grids()
    assert max(by_heads.width, variants.width) <= TERMINAL
    figure = result.draw()
    (legend,) = figure.legends
    lines = [text.get_text() for text in legend.get_texts()]
    bases = sorted({each.variant.base for each in trained if each.variant.form == "heads"})
    assert lines[: 1 + len(bases)] == ["real heads", *(f"simulated from {base}" for base in bases)]
    assert len(lines) == 1 + len(bases) + len({each.variant.form for each in trained} - {"mha", "heads"}) + 2
    levels = {"who reads nothing": task.chance(level), "counts as solved below": task.solved}
    handles = dict(zip(lines, legend.legend_handles, strict=True))
    for told, error in levels.items():
        (line,) = [each for each in figure.axes[0].lines if set(each.get_ydata()) == {100 * error}]
        assert (handles[told].get_linestyle(), handles[told].get_color()) == (line.get_linestyle(), line.get_color())
    drawn = [dict(zip(*container.lines[0].get_data(), strict=True)) for container in figure.axes[0].containers]
    found = {each.variant.name: 100 * each.error for each in trained}
    middle = task.heads(level)
    assert drawn[0] == {each.variant.heads: 100 * each.error for each in trained if each.variant.form == "mha"}
    assert {middle: found[f"mha-{middle}"], 2 * middle: found[f"sas-{middle}to{2 * middle}"]} in drawn
    assert sum(map(len, drawn)) == len(trained) + len(bases)  # every line of simulation begins at its base


def test_levels_share_their_axis_and_its_name():
    made = {"device": "a", "cores": 2, "threads": 1, "torch": "2", "transformers": "5", "date": "today"}
    task = TASKS["fetch"]
    trained = [
        Trained(level, variant, Cost(1, 1), 0.003, {0: {"error": 0.1, "diverged": False}})
        for level in task.levels
        for variant in variants_of(task, level).values()
    ]
    first, *others = CapacityResult(task, "sas-hf capacity", 5, [0.003], 1.0, made, trained).draw().axes
    assert others and first.get_shared_y_axes().joined(first, *others)
    shown = [axes for axes in (first, *others) if axes.get_ylabel()]
    assert shown == [first]


def test_time_left_counts_what_a_kind_took():
    variants = [Variant(f"mha-{heads}", heads, heads, "mha", {}) for heads in (1, 2)]
    figures = {
        "4/mha-1/seed 0": {"seconds": 2.0},
        "4/mha-1/seed 1": {"seconds": 4.0},
        "8/mha-1/seed 0": {"seconds": 99.0},
    }
    operations = {"4/mha-1": 10, "4/mha-2": 30}
    waiting = [Job(4, variants[0], 2), Job(4, variants[1], 0)]
    assert seconds_left(waiting, {}, operations) is None
    assert seconds_left(waiting, figures, operations) == 3.0 + 30 * (6.0 / 20)
