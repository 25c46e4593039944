"""Studies: real tiny grids, one killed in its third run; statistics against scipy; what is refused before any run."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from helpers import python_environment, sas_hf
from scipy import stats

from sas_hf.training.recipe import recipe_names
from sas_hf.training.study import load_study, plan_runs, run_study, study_names
from sas_hf.training.study_report import FinishedRun, StudyReport, count_parameters, mean_and_deviation, paired_test


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
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and report of a study that nothing interrupts."""
    folder, messages = tmp_path_factory.mktemp("whole"), []
    report = run_study(load_study(write_study(folder)), progress=messages.append)
    assert messages == [
        "run 1 of 4: mha, seed 3",
        "run 2 of 4: sas, seed 3",
        "run 3 of 4: mha, seed 5",
        "run 4 of 4: sas, seed 5",
    ]
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
    assert "| variant | validation loss | perplexity | parameters | tokens/s | n | minus mha |" in document
    assert "differences of the final validation loss are paired by seed" in document
    saved = json.loads((folder / "study.json").read_text())
    assert [(run["loss"], run["curve"][-1][1]) for run in saved["runs"]] == [
        (loss, loss) for pair in zip(losses["mha"], losses["sas"], strict=True) for loss in pair
    ]
    assert [summary["difference"] for summary in saved["summaries"]] == [None, found["difference"]]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"<!-- {label} -->" in (folder / "curves.svg").read_text() for label in ("mha", "sas", "tokens"))


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
    run_study(load_study(path))
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert timeless(out) == timeless(whole[0])
    first_line = json.loads((out / "mha" / "seed-5" / "log.jsonl").read_text().split("\n")[0])
    assert first_line["step"] == 2 and begun > 0  # the interrupted run's own


def test_the_command_shows_the_table_of_a_finished_study(whole):
    folder, _ = whole
    shown = sas_hf("study", folder.parent / "study.yaml")
    assert shown.returncode == 0, shown.stderr
    assert "Final losses" in shown.stdout and "Student" in shown.stdout and str(folder.name) in shown.stdout
    assert "cpu-kinds" in sas_hf("study").stdout
    wrong = sas_hf("study", "cpu-kind")
    assert wrong.returncode == 1 and "cpu-kinds" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_study_in_another_studys_folder_is_refused(whole, tmp_path):
    study = load_study(write_study(tmp_path), output=whole[0])
    with pytest.raises(FileExistsError, match="training.max_steps"):
        run_study(study, ["training.max_steps=9"])


def test_statistics_against_scipy():
    first, second = [3.1, 3.4, 2.9, 3.3], [3.0, 3.1, 2.95, 3.05]
    test = stats.ttest_rel(second, first)
    found = paired_test(first, second)
    assert found["difference"] == pytest.approx(-0.15)
    assert found["p_value"] == pytest.approx(test.pvalue)
    # by hand: differences -0.1, -0.3, 0.05, -0.25 have the deviation 0.158114, and t of 3 degrees is 3.182446
    assert (found["low"], found["high"]) == pytest.approx((-0.15 - 0.251595, -0.15 + 0.251595), abs=1e-5)
    assert mean_and_deviation([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, 1.527525), abs=1e-6)


def test_what_one_seed_or_equal_differences_cannot_tell():
    assert paired_test([3.0], [2.5]) == {"difference": -0.5, "low": None, "high": None, "p_value": None}
    assert paired_test([3.0, 2.0], [2.5, 1.5]) == {"difference": -0.5, "low": -0.5, "high": -0.5, "p_value": None}
    assert mean_and_deviation([2.0]) == (2.0, None)


def finished(variant, seed, loss, data="", speed=None):
    curves = {"loss": [(100, loss + 1), (200, loss)]}
    return FinishedRun(variant, data, seed, {"loss": loss}, 10, speed, curves)


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
    else:
        assert list(panels[1].lines[0].get_xdata()) == [1, 2, 4]
        assert list(panels[1].lines[0].get_ydata()) == pytest.approx([3.6, 3.2, 3.1])
        assert panels[1].get_xlabel() == "num attention heads"
    assert [path.name for path in report.save(tmp_path)][2:] == [f"{figure}.png", f"{figure}.svg"]


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
        ({"variants": {"../mha": {}}}, "has the name '../mha'"),
        ({"variants": {"mha": {"training": {"seed": 1}}}}, "sets `training.seed`, which the study decides"),
        ({"variants": {"mha": {"modle": {}}}}, "Variant 'mha': `modle` is no field of a recipe; did you mean `model`"),
        ({"variants": {"mha": {}, "sas": {"model": {"overrides": {"head_dimm": 1}}}}}, "sas, seed 3: .*head_dim`"),
        ({"data": {"long": {"sequence_length": 4096}}}, "Run long, mha, seed 3: .*max_position_embeddings"),
        ({"data": {"none": {"validation_documents": None}}}, "nothing to"),
        ({"data": {"lost": {"train": "no-such-file.txt"}}}, "no-such-file.txt"),
        ({"recipe": "cpu-stdy"}, "cpu-stdy is no file, nor a recipe"),
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
    assert (
        len({run.folder for run in runs})
        == len(runs)
        == len(study.variants) * len(study.seeds) * max(1, len(study.data))
    )
    assert "cpu-study" in recipe_names()


def test_parameters_are_counted_in_the_file(whole):
    from sas_hf import SASGPTForCausalLM

    folder = whole[0] / "sas" / "seed-3"
    model = SASGPTForCausalLM.from_pretrained(folder)
    assert count_parameters(folder) == sum(parameter.numel() for parameter in model.parameters())
