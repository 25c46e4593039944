"""Studies: real tiny grids, one killed in its third run; what is refused before any run."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from helpers import python_environment, sas_hf
from scipy import stats
from study_runs import finished

from sas_hf.training.recipe import recipe_names
from sas_hf.training.study import load_study, plan_runs, run_study, study_names
from sas_hf.training.study_power import study_power
from sas_hf.training.study_report import StudyReport
from sas_hf.training.study_results import (
    count_parameters,
    mean_and_deviation,
    pairs_needed,
)
from sas_hf.training.study_time import seconds_left


PLAIN = {"num_simulated_heads": None, "simulated_head_dim": None}
STUDY = {
    "recipe": {
        "base": "cpu-study",
        "model": {"overrides": {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "simulated_head_dim": 12}},
        "data": {"sequence_length": 32, "max_validation_sequences": 16},
        "training": {"max_steps": 6, "warmup_steps": 1, "logging_steps": 2, "eval_steps": 2, "save_steps": 2},
    },
    "variants": {"mha": {"model": {"overrides": PLAIN}}, "sas": {}},
    "seeds": [3, 5],
}
KILLED = """
import os, signal, sys
from sas_hf.training.durable_trainer import DurableTrainer
from sas_hf.training.study import load_study, run_study

step = DurableTrainer.training_step
def killed(self, *args, **kwargs):
    if self.args.seed == 5 and self.state.global_step == 3:  # in the third run, after its first checkpoint
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
DurableTrainer.training_step = killed
run_study(load_study(sys.argv[1]))
"""


def write_study(folder, **fields):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"output": str(folder / "out")} | fields, sort_keys=False))
    return path


def timeless(folder):
    """Of `study.json`, what does not depend on the machine and the place."""
    content = json.loads((folder / "study.json").read_text())
    del content["study"]["output"]
    for entry in content["summaries"] + content["runs"]:
        assert entry.pop("tokens_per_second") > 0
    for run in content["runs"]:
        assert run.pop("seconds") > 0
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and report of a study that nothing interrupts."""
    folder, messages = tmp_path_factory.mktemp("whole"), []
    report = run_study(load_study(write_study(folder)), progress=messages.append)
    runs = ["mha, seed 3", "sas, seed 3", "mha, seed 5", "sas, seed 5"]
    assert [message.partition(" (")[0] for message in messages] == [
        f"run {number} of 4: {run}" for number, run in enumerate(runs, 1)
    ]
    first, *others = [message.partition(" (")[2] for message in messages]
    assert first == "" and all(re.fullmatch(r"about [\d.]+ (s|min) left\)", left) for left in others), messages
    return folder / "out", report


def test_what_a_study_says(whole):
    folder, report = whole
    losses = {}
    for run in report.runs:
        place = folder / run.variant / f"seed-{run.seed}"
        results = json.loads((place / "all_results.json").read_text())
        assert run.metrics == {"loss": results["eval_loss"], "perplexity": results["perplexity"]}
        losses.setdefault(run.variant, []).append(run.metrics["loss"])
        for name, curve in run.curves.items():
            assert [tokens for tokens, _ in curve] == [2 * 8 * 32, 4 * 8 * 32, 6 * 8 * 32]
            assert curve[-1][1] == run.metrics[name]
    mha, sas = report.summaries
    assert (mha.variant, mha.n, mha.differences) == ("mha", 2, {})
    test, found = stats.ttest_rel(losses["sas"], losses["mha"]), sas.differences["loss"]
    assert found["p_value"] == pytest.approx(test.pvalue) and sas.n == 2
    assert found["difference"] == pytest.approx(sum(losses["sas"]) / 2 - sum(losses["mha"]) / 2)
    assert (found["low"], found["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert sas.parameters > mha.parameters
    document = (folder / "study.md").read_text()
    assert f"{found['difference']:+.4f}" in document and f"{mha.parameters:,}" in document and "curves.png" in document
    assert "| variant | validation loss | perplexity | parameters | tokens/s | n |" in document
    assert "| variant | minus mha | 95 % interval | p | sd | 80 % power at | n |" in document
    deviation = np.std(np.subtract(losses["sas"], losses["mha"]), ddof=1)
    assert (
        found["deviation"] == pytest.approx(deviation)
        and f"| {deviation:.4f} | {found['detectable']:.4f} | 2 |" in document
    )
    assert "differences of the final validation loss are paired by seed" in document
    saved = json.loads((folder / "study.json").read_text())
    assert [(run["loss"], run["curve"][-1][1]) for run in saved["runs"]] == [
        (loss, loss) for pair in zip(losses["mha"], losses["sas"], strict=True) for loss in pair
    ]
    assert [summary["difference"] for summary in saved["summaries"]] == [None, found["difference"]]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"<!-- {label} -->" in (folder / "curves.svg").read_text() for label in ("mha", "sas", "tokens"))


def logged(folder, run, name):
    """Steps and values of a metric as a run's log has them."""
    lines = (folder / run.variant / f"seed-{run.seed}" / "log.jsonl").read_text().splitlines()
    return [(line["step"], line[name]) for line in map(json.loads, lines) if name in line]


def test_every_metric_is_told_by_step(whole):
    folder, report = whole
    document = (folder / "study.md").read_text()
    for title, name, digits in (("Validation loss", "eval_loss", 4), ("Perplexity", "perplexity", 2)):
        table = document.partition(f"## {title} by step\n\n")[2]
        assert table.startswith("| variant | 2 | 4 | 6 |\n")
        for variant in ("mha", "sas"):
            curves = [dict(logged(folder, run, name)) for run in report.of("", variant)]
            spreads = [mean_and_deviation([curve[step] for curve in curves]) for step in (2, 4, 6)]
            cells = [f"{mean:.{digits}f} ± {deviation:.{digits}f}" for mean, deviation in spreads]
            assert f"| {variant} | {' | '.join(cells)} |" in table.partition("\n\n")[0]
    assert [run["steps"]["loss"] for run in json.loads((folder / "study.json").read_text())["runs"]] == [[2, 4, 6]] * 4
    assert "Perplexity by step" not in [grid.title for grid in report.grids()]  # the terminal has the study's own


def test_when_each_variant_is_where_the_first_ended(whole):
    """Against the logs, walked in small steps: seed by seed, of the first variant's own last loss."""
    folder, report = whole
    last = {run.seed: logged(folder, run, "eval_loss")[-1][1] for run in report.of("", "mha")}
    for arrival, run in zip(report.arrivals, report.of("", "mha") + report.of("", "sas"), strict=True):
        steps, losses = zip(*logged(folder, run, "eval_loss"), strict=True)
        walked = np.linspace(steps[0], steps[-1], 4001)
        there = walked[np.interp(walked, steps, losses) <= last[run.seed]]
        assert (arrival.variant, arrival.seed, arrival.value) == (run.variant, run.seed, last[run.seed])
        assert arrival.step == (pytest.approx(there[0], abs=0.002) if len(there) else None)
        assert arrival.share == (None if arrival.step is None else arrival.step / 6)
    assert [arrival.step for arrival in report.arrivals[:2]] == [6, 6]
    saved = json.loads((folder / "study.json").read_text())
    assert saved["arrivals"] == [vars(arrival) for arrival in report.arrivals]
    (grid,) = [grid for grid in report.grids() if grid.title == "Steps to the final validation loss of mha"]
    assert grid.rows[0] == ["mha", "2 of 2", "6", "6", "100 %", "100 %"]


def test_killed_it_trains_only_what_is_missing(whole, tmp_path):
    path, out = write_study(tmp_path), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(path)]
    killed = subprocess.run(command, env=python_environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(str(file.parent.relative_to(out)) for file in out.glob("*/*/all_results.json")) == [
        "mha/seed-3",
        "sas/seed-3",
    ]
    assert not (out / "study.json").exists()
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*/seed-3/*")}
    begun = (out / "mha" / "seed-5" / "checkpoint-2").stat().st_mtime_ns
    report = run_study(load_study(path))
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert timeless(out) == timeless(whole[0])
    first_line = json.loads((out / "mha" / "seed-5" / "log.jsonl").read_text().split("\n")[0])
    assert first_line["step"] == 2 and begun > 0  # the interrupted run's own
    (resumed,) = [run for run in report.runs if (run.variant, run.seed) == ("mha", 5)]
    assert resumed.seconds == logged(out, resumed, "seconds")[-1][1] > first_line["seconds"]


def test_the_command_shows_the_table_of_a_finished_study(whole):
    folder, _ = whole
    shown = sas_hf("study", folder.parent / "study.yaml")
    assert shown.returncode == 0, shown.stderr
    assert "Final losses" in shown.stdout and "Student" in shown.stdout and str(folder.name) in shown.stdout
    assert "cpu-kinds" in sas_hf("study").stdout
    needed = sas_hf("study", folder.parent / "study.yaml", "--power", "0.01")
    assert needed.returncode == 0 and "not known before 3 pairs" in needed.stdout, needed.stderr
    wrong = sas_hf("study", "cpu-kind")
    assert wrong.returncode == 1 and "cpu-kinds" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_study_in_another_studys_folder_is_refused(whole, tmp_path):
    study = load_study(write_study(tmp_path), output=whole[0])
    with pytest.raises(FileExistsError, match="training.max_steps"):
        run_study(study, ["training.max_steps=9"])


def test_how_many_pairs_a_study_needs(whole, tmp_path):
    """By what has ended: here a third seed, of which the files are the second's with other losses, but no fourth."""
    out, path = tmp_path / "out", write_study(tmp_path, seeds=[3, 5, 7, 9])
    shutil.copytree(whole[0], out)
    (grid,) = study_power(load_study(path), 0.01)
    assert grid.rows == [["sas", "-", "2", "not known before 3 pairs"]]
    differences = []
    for variant in ("mha", "sas"):
        shutil.copytree(out / variant / "seed-5", out / variant / "seed-7")
        recipe = out / variant / "seed-7" / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("seed: 5", "seed: 7"))
        results = out / variant / "seed-7" / "all_results.json"
        content = json.loads(results.read_text())
        results.write_text(json.dumps(content | {"eval_loss": content["eval_loss"] + 0.1 * (variant == "sas")}))
    for seed in (3, 5, 7):
        mha, sas = (
            json.loads((out / v / f"seed-{seed}/all_results.json").read_text())["eval_loss"] for v in ("mha", "sas")
        )
        differences.append(sas - mha)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    (grid,) = study_power(load_study(path), 0.01)
    deviation = float(np.std(differences, ddof=1))
    assert grid.rows == [["sas", f"{deviation:.4f}", "3", f"{pairs_needed(0.01, deviation):,}"]] and grid.fits
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    with pytest.raises(FileExistsError, match="Run mha, seed 3: .*run of another recipe .*weight_decay"):
        study_power(load_study(path), 0.01, ["training.weight_decay=0.2"])
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`--power` is .*; give the difference that is to be found"):
            study_power(load_study(path), wrong)


def test_a_sweep_takes_the_numbers_that_it_is_given(tmp_path):
    """By the study's `variable`, or to the report itself."""
    variable = {"sas": 8, "mha": 1}
    path = write_study(tmp_path, figure="sweep", variable=variable, variable_label="simulated heads")
    study = load_study(path)
    assert study.variable == variable and len(plan_runs(study)) == 4
    runs = [finished("sas", 0, 3.0), finished("mha", 0, 3.5)]
    (panel,) = StudyReport(runs, vars(study), "sweep", variable).draw().axes
    assert panel.get_xlabel() == "simulated heads" and list(panel.lines[0].get_xdata()) == [1, 8]
    (panel,) = StudyReport(runs, figure="sweep", variables=variable).draw().axes
    assert panel.get_xlabel() == "" and list(panel.lines[0].get_ydata()) == [3.5, 3.0]
    with pytest.raises(ValueError, match="`variables` has no number of mha; a sweep needs one of every variant"):
        StudyReport(runs, figure="sweep", variables={"sas": 8})


def test_how_long_a_study_still_takes(tmp_path):
    """Each run as those of its variant, or as the mean of all; less what it has behind it at its last checkpoint."""
    runs = plan_runs(load_study(write_study(tmp_path)))

    def log(run, seconds, ended=True):
        run.folder.mkdir(parents=True)
        lines = [{"step": step, "seconds": seconds * step / 6} for step in (2, 4, 6)]
        (run.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run.folder / "all_results.json").write_text("{}") if ended else (run.folder / "checkpoint-4").mkdir()

    def left():
        return seconds_left([((run.variant, run.data), run.folder) for run in runs])

    assert [run.name for run in runs] == ["mha, seed 3", "sas, seed 3", "mha, seed 5", "sas, seed 5"]
    assert left() is None  # nothing is known
    log(runs[3], 90.0)  # one that was there before, though its turn comes last
    assert left() == pytest.approx(3 * 90)
    log(runs[0], 30.0)
    assert left() == pytest.approx(90 + 30)
    log(runs[2], 27.0, ended=False)
    assert left() == pytest.approx(90 + 30 - 18)
    log(runs[1], 80.0)
    (runs[2].folder / "all_results.json").write_text("{}")
    assert left() is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"varients": {}}, "`varients` is no field of a study; did you mean `variants`"),
        ({"variants": {}}, "`variants` is empty"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"seeds": [1, 1]}, "each must be there once"),
        ({"seeds": [0, -1]}, "a seed is 0 or more"),
        ({"variants": {"mha": {}, "sas": {}}}, "Variants 'mha' and 'sas' are the same"),
        ({"model": {}}, "is a recipe, not a study; run it by `sas-hf train`"),
        ({"seeds": ["one"]}, "`seeds` is .* a whole number"),
        ({"output": ""}, "`output` is not given"),
        ({"recipe": None}, "`recipe` is not given"),
        ({"figure": "pie"}, "`figure` is 'pie'; it must be 'curves' or 'curves-over-time' or 'bars'"),
        ({"figure": "sweep"}, "a sweep needs a variable"),
        ({"figure": "sweep", "variable": "batch_size"}, "'mha' has None as `batch_size`"),
        ({"figure": "sweep", "variable": {"mha": 1}, "variable_label": "heads"}, "'sas' has None as `variable`"),
        (
            {"figure": "sweep", "variable": {"mha": 1, "sas": 2, "gqa": 3}, "variable_label": "heads"},
            "`variable.gqa` is no variant of the study",
        ),
        ({"figure": "sweep", "variable": {"mha": 1, "sas": math.nan}, "variable_label": "heads"}, "'sas' has nan"),
        ({"figure": "sweep", "variable": {"mha": "1", "sas": 2}}, "`variable` is .*text or fields and values"),
        ({"figure": "sweep", "variable": {"mha": 1, "sas": 2}}, "`variable_label` is not given"),
        ({"variable_label": "heads"}, "`variable_label` is 'heads', but there is no sweep"),
        ({"variants": {"../mha": {}}}, "has the name '../mha'"),
        ({"variants": {"mha": {"training": {"seed": 1}}}}, "sets `training.seed`, which the study decides"),
        ({"variants": {"mha": {"modle": {}}}}, "Variant 'mha': `modle` is no field of a recipe; did you mean `model`"),
        ({"variants": {"mha": {}, "sas": {"model": {"overrides": {"head_dimm": 1}}}}}, "sas, seed 3: .*head_dim`"),
        ({"data": {"long": {"sequence_length": 4096}}}, "Run long, mha, seed 3: .*max_position_embeddings"),
        ({"data": {"none": {"validation_documents": None}}}, "nothing to"),
        ({"data": {"lost": {"train": "no-such-file.txt"}}}, "no-such-file.txt"),
        ({"recipe": "cpu-stdy"}, "cpu-stdy is no file, nor a recipe"),
        ({"learning_rates": [0.1, 0.1]}, r"`learning_rates` is \[0.1, 0.1\]; each must be positive, and there once"),
        ({"learning_rates": [0.1, 0]}, r"`learning_rates` is \[0.1, 0\]; each must be positive"),
        ({"learning_rates": [0.1, 0.2], "seeds": [10**6]}, "`seeds` has 1000000, on which the `learning_rates` are"),
        (
            {"learning_rates": [0.1], "variants": {"mha": {"training": {"learning_rate": 0.1}}}},
            "'mha' sets `training.learning_rate`, which the study decides",
        ),
        (
            {
                "learning_rates": [0.1],
                "recipe": {
                    "base": "fine-tuning-study",
                    "training": {
                        "lr_scheduler_type": "cosine_with_min_lr",
                        "lr_scheduler_kwargs": {"min_lr": 0.01},
                    },
                },
            },
            "`training.lr_scheduler_kwargs` has `min_lr`, which would be the same for all `learning_rates`",
        ),
    ],
    ids=str,
)
def test_refused_before_any_run(fields, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_study(load_study(write_study(tmp_path, **fields)))
    assert not (tmp_path / "out").exists()


def test_what_one_variant_alone_sets_cannot_be_overridden(tmp_path):
    """Not even where it sets something empty, as `conversion: {}`."""
    variants = {"source": {}, "sas": {"model": {"conversion": {}}}}
    path = write_study(tmp_path, recipe={"base": "fine-tuning-study"}, variants=variants)
    with pytest.raises(ValueError, match="'model.conversion={}' changes `model.conversion`, in which"):
        plan_runs(load_study(path), ["model.conversion={}"])


def test_a_recipe_is_looked_for_beside_the_study(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("base: cpu-study\ntraining: {max_steps: 3}\n")
    monkeypatch.chdir("/")
    for recipe in ("mine.yaml", {"base": "mine.yaml"}):
        runs = plan_runs(load_study(write_study(tmp_path, recipe=recipe)))
        assert {run.recipe.training["max_steps"] for run in runs} == {3}


@pytest.mark.parametrize("change", ["training.seed=3", "training.output_dir=elsewhere"])
def test_what_the_study_decides_cannot_be_overridden(change, tmp_path):
    with pytest.raises(ValueError, match=f"{change.partition('=')[0]}.* sets what the study decides; give it as"):
        plan_runs(load_study(write_study(tmp_path)), [change])


def test_a_folder_of_something_else_is_refused(whole, tmp_path):
    folder, _ = whole

    def refuses(message, overrides=(), **fields):
        path = write_study(tmp_path, **{"output": str(folder)} | fields)
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        with pytest.raises(FileExistsError, match=message):
            run_study(load_study(path), overrides)
        assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    refuses(r"more or other `seeds` \(5\)", seeds=[3])
    refuses(r"more or other `variants` \(sas\)", variants={"mha": {"model": {"overrides": PLAIN}}, "wide": {}})
    refuses(r"another study \(.*recipe: None there, 'cpu-study' now", recipe="cpu-study")
    refuses(r"another study \(training.max_steps: None there, '7' now", overrides=["training.max_steps=7"])
    refuses(r"other `variants` \(sas\)", variants=STUDY["variants"] | {"sas": {"batch_size": 16}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refuses("which holds no study", output=str(tmp_path / "mine"))
    refuses("a file; name a folder", output=str(tmp_path / "mine" / "notes.txt"))
    unwritable = load_study(write_study(tmp_path, output="/proc/study"))
    with pytest.raises(PermissionError, match="`output` is '/proc/study', but no file can be written into /proc"):
        run_study(unwritable)


def test_studies_that_share_a_folder_take_each_others_runs(whole, tmp_path):
    """What the first trained the second keeps to the byte; of what is there it may be a part, not another recipe."""
    first, _ = whole
    shared = tmp_path / "shared"
    shutil.copytree(first, shared)
    kept = {file: file.read_bytes() for file in shared.rglob("*") if file.is_file()}
    variants = {"sas": {}, "wide": {"model": {"overrides": {"num_simulated_heads": 16}}}}
    fields = {"output": str(tmp_path / "second"), "runs": str(shared), "seeds": [3]}
    messages = []
    report = run_study(load_study(write_study(tmp_path, variants=variants, **fields)), progress=messages.append)
    assert messages[0].startswith("run 1 of 2: sas, seed 3 (has ended, kept")
    assert [run.variant for run in report.runs] == ["sas", "wide"] and (shared / "wide/seed-3/log.jsonl").is_file()
    assert {file: file.read_bytes() for file in kept} == kept
    assert {path.name for path in (tmp_path / "second").iterdir()} == {
        "declaration.yaml",
        "study.md",
        "study.json",
        "curves.png",
        "curves.svg",
    }
    run_study(load_study(write_study(tmp_path, variants={"sas": {}}, **fields)))  # fewer, in the same folder
    declared = yaml.safe_load((tmp_path / "second" / "declaration.yaml").read_text())
    assert declared["runs"] == str(shared) and list(declared["variants"]) == ["sas"]

    def refuses(error, message, *overrides, **changes):
        with pytest.raises(error, match=message):
            run_study(load_study(write_study(tmp_path, variants=variants, **fields | changes)), overrides)
        assert not (tmp_path / "third").exists()

    third = {"output": str(tmp_path / "third")}
    refuses(FileExistsError, "Run sas, seed 3: .*run of another recipe .*max_steps", "training.max_steps=9", **third)
    refuses(FileExistsError, "second', which holds another study .*max_steps", "training.max_steps=9")
    refuses(FileExistsError, "`runs` is .*, a file; name a folder", runs=str(tmp_path / "study.yaml"), **third)
    refuses(PermissionError, "`runs` is '/proc/runs', but no file", runs="/proc/runs", **third)
    refuses(ValueError, "`runs` is ''; name the folder", runs="", **third)


def test_a_folder_of_shared_runs_may_lie_in_the_studys(whole, tmp_path):
    runs = tmp_path / "out" / "runs"
    shutil.copytree(whole[0], runs)
    shutil.copy(whole[0] / "declaration.yaml", runs.parent)
    for seeds in ([3, 5], [3]):
        report = run_study(load_study(write_study(tmp_path, seeds=seeds, runs=str(runs))))
        assert len(report.runs) == 2 * len(seeds)


def test_a_name_given_twice_is_refused(tmp_path):
    path = write_study(tmp_path)
    path.write_text(path.read_text() + "data:\n  a: {}\n  a: {sequence_length: 16}\n")
    with pytest.raises(ValueError, match="'a' is there twice"):
        load_study(path)


@pytest.mark.parametrize("override", ["model.overrides.num_simulated_heads=4", "model.overrides={}"])
def test_an_override_of_what_variants_differ_in_is_refused(override, tmp_path):
    with pytest.raises(ValueError, match="in which the study's runs differ"):
        plan_runs(load_study(write_study(tmp_path)), [override])


@pytest.mark.parametrize("name", study_names())
def test_the_packages_studies_can_be_planned(name):
    """Every recipe of the grid holds; the paper's ones need data, and without it say so."""
    study = load_study(name)
    assert study.output == f"runs/{name}"
    if not name.startswith("cpu-"):
        with pytest.raises(ValueError, match="`data.train` is not given"):
            plan_runs(study)
    runs = plan_runs(study, [] if name.startswith("cpu-") else ["data.train=books.parquet"])
    searches = len(study.variants) * len(study.learning_rates) if len(study.learning_rates) > 1 else 0
    in_a_seed = (len(study.variants) + len(study.matched)) * max(1, len(study.data))
    assert len({run.folder for run in runs}) == len(runs) == searches + in_a_seed * len(study.seeds)
    assert "cpu-study" in recipe_names()


def test_parameters_are_counted_in_the_file(whole):
    from sas_hf import SASGPTForCausalLM

    folder = whole[0] / "sas" / "seed-3"
    model = SASGPTForCausalLM.from_pretrained(folder)
    assert count_parameters(folder) == sum(parameter.numel() for parameter in model.parameters())
