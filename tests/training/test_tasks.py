"""A task is one object: one that is defined here is checked, trained, evaluated and studied; none is told by name."""

import ast
import graphlib
import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from helpers import real_text
from huggingface_hub import ModelCard
from peft import AutoPeftModel
from transformers import AutoModelForSequenceClassification

import sas_hf
from sas_hf import SASEncoderForSequenceClassification
from sas_hf.configurations import named_config
from sas_hf.training.arguments import training_arguments
from sas_hf.training.optimizer import RecipeTrainer
from sas_hf.training.recipe import load_recipe
from sas_hf.training.reporting import read_log
from sas_hf.training.run import train
from sas_hf.training.study import Study, load_study, run_study
from sas_hf.training.study_report import StudyReport
from sas_hf.training.study_results import FinishedRun
from sas_hf.training.tasks import TASKS, Metric, Task
from sas_hf.training.tasks.task import LOSS


PACKAGE = Path(sas_hf.__file__).parent
RECIPE = {
    "task": "sums",
    "model": {"config": "imdb-standard", "overrides": {"vocab_size": 16}},
    "data": {"train": "64", "validation": "32"},
    "training": {
        "output_dir": "unused",
        "max_steps": 8,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
    },
}
UNVALIDATED = {"data": {"validation": None}, "training": {"eval_strategy": "no"}}


class Sums(Task):
    """The mean of a row of numbers, of which `data` says how many rows."""

    name = "sums"
    auto_class = AutoModelForSequenceClassification
    metrics = (Metric("error", "mean absolute error", digits=3), LOSS)
    reads = ("data.shuffle_buffer",)

    def check_recipe(self, recipe):
        if not recipe.data.train.isdecimal():
            raise ValueError(f"`data.train` is {recipe.data.train!r}; it must be a number.")

    def check_sources(self, recipe):
        if int(recipe.data.train) > 1000:
            raise ValueError(f"`data.train` is {recipe.data.train}; so many do not fit.")

    def make_trainer(self, recipe, arguments, callbacks=()):
        torch.manual_seed(arguments.seed)
        config = named_config(recipe.model.config, num_labels=1, pad_token_id=0, **recipe.model.overrides)
        return RecipeTrainer(
            self.auto_class.from_config(config),
            arguments,
            train_dataset=self.rows(int(recipe.data.train), seed=0),
            eval_dataset=self.rows(int(recipe.data.validation), seed=1) if recipe.data.validation else None,
            compute_metrics=lambda found: {"error": np.abs(found.predictions[:, 0] - found.label_ids).mean()},
            callbacks=list(callbacks),
        )

    def rows(self, count, seed):
        numbers = np.random.default_rng(seed).integers(1, 16, (count, 8))
        return Dataset.from_dict({"input_ids": numbers.tolist(), "labels": numbers.mean(axis=1).tolist()})


@pytest.fixture
def sums(monkeypatch):
    monkeypatch.setitem(TASKS, "sums", Sums())


def recipe_of(folder, *changes):
    return load_recipe(RECIPE, [f"training.output_dir={folder}", *changes])


def test_one_object_is_enough_for_a_run(sums, tmp_path):
    best = ["training.load_best_model_at_end=true", "training.metric_for_best_model=error"]
    results = train(recipe_of(tmp_path / "run", *best, "training.lr_scheduler_type=constant"))
    logged = [line for line in read_log(tmp_path / "run") if "eval_error" in line]
    errors = {line["step"]: line["eval_error"] for line in logged}
    assert list(errors) == [2, 4, 6, 8] and max(errors.values()) > min(errors.values()) + 1
    # The lowest error is the best; the Trainer by itself takes what does not end in "loss" for better when higher.
    assert results["eval_error"] == errors[results["step"]] == min(errors.values())
    assert "perplexity" not in results and {line["tokens"] for line in logged} == {None}
    assert json.loads((tmp_path / "run" / "all_results.json").read_text()) == results
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.pipeline_tag == "text-classification" and ": sums, " in card.text
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config.num_labels == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task=summs", "`summs` is no `task` of a recipe; did you mean `sums`"),
        ("data.train=many", "`data.train` is 'many'; it must be a number"),
        ("data.text_column=words", "`data.text_column` is 'words', but `task: sums` does not look at it"),
        ("model.conversion={}", "`model.conversion` is {}, of a checkpoint"),
        ("data.augment=false", "`data.augment` is False, but `task: sums` does not look at it"),
        ("data.validation_split=test", "`data.validation_split` is 'test', but `task: sums` does not look at it"),
        ("data.validation=null", "there is nothing to evaluate on"),
        ("evaluation.tasks=[piqa]", "benchmarks of language models; leave it empty"),
        ("training.metric_for_best_model=accuracy", "is 'accuracy'; an evaluation of this task has loss, error"),
        ("training.train_sampling_strategy=group_by_length", "all its samples are of one length"),
    ],
)
def test_a_recipe_is_checked_by_what_the_object_says(change, message, sums):
    with pytest.raises(ValueError, match=message):
        recipe_of("unused", change)
    assert recipe_of("unused", "data.shuffle_buffer=5").data.shuffle_buffer == 5


@pytest.mark.parametrize(("metric", "greater"), [("error", False), ("eval_error", False), ("loss", False)])
def test_the_best_model_goes_by_the_metrics_own_direction(metric, greater, sums):
    recipe = recipe_of("unused", f"training.metric_for_best_model={metric}")
    assert training_arguments(recipe).greater_is_better is greater
    with pytest.raises(ValueError, match=f"is true, which takes the worst {metric} for the best"):
        recipe_of("unused", f"training.metric_for_best_model={metric}", "training.greater_is_better=true")


def study_of(folder, **fields):
    study = {
        "recipe": RECIPE,
        "variants": {"slow": {"training": {"learning_rate": 1e-3}}, "fast": {}},
        "seeds": [0, 1],
        "output": str(folder / "out"),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | fields, sort_keys=False))
    return load_study(path)


def test_one_object_is_enough_for_a_study(sums, tmp_path):
    report = run_study(study_of(tmp_path))
    by_variant = {
        variant: [run.metrics["error"] for run in report.runs if run.variant == variant]
        for variant in ("slow", "fast")
    }
    for run in report.runs:
        place = tmp_path / "out" / run.variant / f"seed-{run.seed}"
        results = json.loads((place / "all_results.json").read_text())
        assert run.metrics == {"error": results["eval_error"], "loss": results["eval_loss"]}
        assert run.curves["error"] == [
            (line["step"], line["eval_error"]) for line in read_log(place) if "eval_error" in line
        ]
    found = report.summaries[1].differences["error"]
    assert found["difference"] == pytest.approx(np.mean(by_variant["fast"]) - np.mean(by_variant["slow"]))
    assert found["difference"] < 0
    results, differences, by_step, _ = report.grids()
    assert results.header == ["variant", "mean absolute error", "validation loss", "parameters", "n"]  # tokens unknown
    assert differences.header[1] == "minus slow" and differences.rows[0][1] == f"{found['difference']:+.3f}"
    assert "differences of the final mean absolute error are paired" in differences.caption
    assert by_step.title == "Mean absolute error by step" and by_step.header == ["variant", "2", "4", "6", "8"]
    (panel,) = report.draw().axes
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("steps", "mean absolute error")
    saved = json.loads((tmp_path / "out" / "study.json").read_text())
    assert saved["metric"] == "error" and saved["summaries"][1]["difference"] == found["difference"]
    assert saved["summaries"][1]["differences"].keys() == {"loss"}

    # The same runs by another metric: nothing is trained again.
    by_loss = run_study(study_of(tmp_path, metric="loss", figure="bars"))
    loss = by_loss.summaries[1].differences["loss"]["difference"]
    assert by_loss.grids()[1].rows[0][1] == f"{loss:+.4f}"
    assert by_loss.draw().axes[0].get_ylabel() == "final validation loss"
    assert [run.metrics for run in by_loss.runs] == [run.metrics for run in report.runs]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "eror"}, "`eror` is no `metric` of the task sums; did you mean `error`"),
        ({"figure": "curves-over-time"}, "runs of the task sums do not count tokens per second; take curves"),
        ({"variants": {"a": {}, "b": {"data": {"train": "9999"}}}}, "Run b, seed 0: .* so many do not fit"),
        ({"variants": {"a": {}, "b": {"task": "image_classification"}}}, "have the tasks image_classification, sums;"),
        ({"variants": {"a": {}, "b": UNVALIDATED}}, "Run b, seed 0: `data` has nothing to validate on"),
    ],
    ids=str,
)
def test_a_study_that_cannot_be_compared_is_refused_before_any_run(fields, message, sums, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_study(study_of(tmp_path, **fields))
    assert not (tmp_path / "out").exists()


def test_results_without_a_metric_of_the_task_are_named(sums, monkeypatch, tmp_path):
    monkeypatch.setattr(Sums, "metrics", (Metric("bleu", "BLEU", higher_is_better=True), LOSS))
    with pytest.raises(ValueError, match="seed-0 has no 'bleu' among its results .*eval_error"):
        run_study(study_of(tmp_path))


def test_a_metric_that_is_better_when_higher_is_said_to_be(sums, monkeypatch):
    accuracy = Metric("error", "accuracy", higher_is_better=True)
    monkeypatch.setattr(Sums, "metrics", (LOSS, accuracy))
    for changes in ((), ("training.greater_is_better=true",)):
        recipe = recipe_of("unused", "training.metric_for_best_model=error", *changes)
        assert training_arguments(recipe).greater_is_better is True
    runs = [FinishedRun(variant, "", 0, {"error": 0.5, "loss": 1.0}, 9, None, {}) for variant in ("a", "b")]
    by_accuracy, by_loss = (StudyReport(runs, metrics=(LOSS, accuracy), metric=metric) for metric in (accuracy, None))
    assert "differences of the final accuracy (higher is better) are paired" in by_accuracy.grids()[1].caption
    assert "differences of the final validation loss are paired" in by_loss.grids()[1].caption


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
def test_the_task_of_the_contributors_page_runs(monkeypatch, tmp_path):
    """As it stands there, by the recipe that stands there: trained, studied, and it learns."""
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text().partition("## Adding a task")[2]
    source = re.search(r"^```python\n(.*?)^```", page, flags=re.M | re.S)[1]
    (tmp_path / "capitals.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", page, flags=re.M | re.S)[1])
    module = types.ModuleType("sas_hf.training.tasks.capitals")
    module.__package__ = "sas_hf.training.tasks"
    exec(compile(source, "CONTRIBUTING.md", "exec"), vars(module))
    monkeypatch.setitem(TASKS, "capitals", module.Capitals())

    lines = [line.strip() for text in real_text() for line in text.splitlines() if len(line.strip()) > 20]
    for name, some in (("train", lines[:400]), ("validation", lines[400:480])):
        both = [line.upper() if number % 2 else line.lower() for number, line in enumerate(some)]
        (tmp_path / f"{name}.txt").write_text("\n".join(both))
    recipe = {
        "base": str(tmp_path / "capitals.yaml"),
        "data": {name: str(tmp_path / f"{name}.txt") for name in ("train", "validation")} | {"cache": str(tmp_path)},
        "training": {"save_strategy": "no", "logging_steps": 50},
    }
    lora = {"lora": {"r": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}}
    variants = {"standard": {}, "adapters": {"model": lora, "training": {"learning_rate": 1e-2}}}
    report = run_study(Study(recipe=recipe, variants=variants, seeds=[0], output=str(tmp_path / "out"), figure="bars"))
    for run in report.runs:
        assert run.metrics["accuracy"] > 0.9 and len(run.curves["accuracy"]) == 3
    assert report.grids()[0].header[1] == "validation accuracy"
    adapted = tmp_path / "out" / "adapters" / "seed-0"
    assert "peft import AutoPeftModel\n" in (adapted / "README.md").read_text()
    loaded = AutoPeftModel.from_pretrained(adapted, import_allowlist=["sas_hf"])
    assert type(loaded.get_base_model()) is SASEncoderForSequenceClassification
    with pytest.raises(ValueError, match="`data.config` is 'x', but `task: capitals` does not look at it"):
        load_recipe(recipe, ["data.config=x"])
    with pytest.raises(
        ValueError, match="mnist-sas is a sas_vit that has no AutoModelForSequenceClassification, which"
    ):
        train(
            load_recipe(recipe, ["model.config=mnist-sas", "model.overrides={}", f"training.output_dir={tmp_path}/x"])
        )


MODULES = {path.relative_to(PACKAGE.parent): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def test_no_module_outside_of_the_tasks_tells_one_by_its_name():
    """Neither in a comparison nor in a table by task: what differs between tasks is asked of the task."""

    def names_a_task(node: ast.AST) -> bool:
        constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
        return not constants.isdisjoint(TASKS) or ast.unparse(node).endswith("recipe.task")

    found = []
    for path, tree in MODULES.items():
        for node in ast.walk(tree) if not path.is_relative_to("sas_hf/training/tasks") else ():
            match node:
                case ast.Compare():
                    told = any(map(names_a_task, (node.left, *node.comparators)))
                case ast.Subscript():
                    told = names_a_task(node.slice)
                case ast.MatchValue():
                    told = names_a_task(node.value)
                case ast.Dict():
                    told = sum(names_a_task(key) for key in node.keys if key is not None) > 1
                case _:
                    told = False
            found += [f"{path}:{node.lineno}"] if told else []
    assert found == []


def test_the_training_room_has_no_circle_of_imports():
    """Not even inside of functions, or for types alone."""
    training = {path: tree for path, tree in MODULES.items() if path.is_relative_to("sas_hf/training")}
    graph = {}
    for path, tree in training.items():
        graph[path] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                inside = [place.with_suffix(".py"), place / "__init__.py"]
                inside += [place / f"{name.name}.py" for name in node.names]
                graph[path] |= {other for other in inside if other in training}
    assert Path("sas_hf/training/recipe_checks.py") in graph[Path("sas_hf/training/recipe.py")]
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle
