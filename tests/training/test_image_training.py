"""Image classifiers under the stock Trainer: exact under accumulation, and the example script learns and resumes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import USE_CPU, assert_all_close, assert_identical, python_environment, vit, write_idx
from peft import AutoPeftModel
from safetensors.torch import load_file, save_file
from test_trainer import KeepGradients
from transformers import Trainer, TrainingArguments, default_data_collator

from sas_hf import SASViTForImageClassification
from sas_hf.training.recipe import DataRecipe, ModelRecipe, TrainingRecipe
from sas_hf.training.study import Study, run_study
from sas_hf.training.tasks import find_task


def multi_label(row: int) -> list[float]:
    return [float(row % number == 0) for number in range(1, 8)]


TASKS = {
    "single label": ({}, lambda row: row % 7),
    "regression": ({"num_labels": 1, "problem_type": "regression"}, lambda row: row / 4 - 1),
    "multi-label": ({"problem_type": "multi_label_classification"}, multi_label),
}


def first_gradients(task: str, folder, **options) -> dict[str, torch.Tensor]:
    fields, label = TASKS[task]
    torch.manual_seed(0)
    model = vit("sas_k5_gqa", initializer_range=0.1, **fields)
    data = [{"pixel_values": torch.randn(3, 12, 12), "labels": label(row)} for row in range(8)]
    keep = KeepGradients()
    arguments = TrainingArguments(
        str(folder), max_steps=1, max_grad_norm=0.0, report_to="none", use_cpu=USE_CPU, disable_tqdm=True, **options
    )
    Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator, callbacks=[keep]).train()
    return keep.gradients


@pytest.mark.parametrize(("batch", "steps"), [(4, 2), (3, 3)])
@pytest.mark.parametrize("task", TASKS)
def test_gradient_accumulation_changes_nothing(task, batch, steps, tmp_path):
    expected = first_gradients(task, tmp_path / "a", per_device_train_batch_size=8)
    found = first_gradients(task, tmp_path / "b", per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    assert_all_close(found, expected, 1e-5)


def train_example(data: Path, output: Path, *options: object) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[2] / "examples" / "train_image_classifier.py"
    command = [sys.executable, script, "--dataset", data, "--output_dir", output, *options]
    command += ["--per_device_train_batch_size", 20, "--learning_rate", 3e-3, "--lr_scheduler_type", "constant"]
    command += ["--report_to", "none", "--use_cpu", "--disable_tqdm", "True"]
    return subprocess.run([str(part) for part in command], env=python_environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Grey images whose class is the quarter that is bright."""
    folder, random = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 60)):
        labels = np.arange(count) % 4
        pictures = random.integers(0, 100, (count, 28, 28))
        for picture, label in zip(pictures, labels, strict=True):
            picture[label // 2 * 14 :][:14, label % 2 * 14 :][:, :14] += 120
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pictures)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return folder


def test_the_example_learns_and_fine_tunes(squares, tmp_path):
    options = ("--augment", "False", "--class_names", "ul,ur,ll,lr")
    run = train_example(squares, tmp_path / "new", "--model", "mnist-sas", "--max_steps", 30, *options)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert result["eval_accuracy"] > 0.9 and result["eval_top5_accuracy"] == 1.0
    model = SASViTForImageClassification.from_pretrained(tmp_path / "new")
    assert list(model.config.id2label.values()) == ["ul", "ur", "ll", "lr"]
    # A checkpoint instead of a name is fine-tuned: after one step it is still far better than guessing.
    run = train_example(squares, tmp_path / "tuned", "--model", tmp_path / "new", "--max_steps", 1, *options)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "tuned" / "result.json").read_text())["eval_accuracy"] > 0.5


def test_an_interrupted_run_goes_on_to_the_same_weights(squares, tmp_path):
    options = ("--model", "mnist-super", "--augment", "False", "--save_steps", 3, "--max_steps")
    assert train_example(squares, tmp_path / "whole", *options, 6).returncode == 0
    assert train_example(squares, tmp_path / "part", *options, 3).returncode == 0
    (tmp_path / "part" / "result.json").unlink()
    assert train_example(squares, tmp_path / "part", *options, 6).returncode == 0
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert_identical(part, whole)
    assert [step["step"] for step in json.loads((tmp_path / "part" / "result.json").read_text())["history"]][-1] == 6


def image_trainer(output: Path, model: dict, data: dict, **options):
    recipe = TrainingRecipe(task="image_classification", model=ModelRecipe(**model), data=DataRecipe(**data))
    options |= {"per_device_train_batch_size": 20, "report_to": "none", "use_cpu": USE_CPU, "disable_tqdm": True}
    return find_task("image_classification").make_trainer(recipe, TrainingArguments(str(output), **options))


def test_a_recipe_trains_chosen_parameters_and_augments_what_it_trains_on_only(squares, tmp_path):
    data = {"train": str(squares), "validation": str(squares), "validation_split": "test"}
    model = {"config": "mnist-sas", "trainable": ["classifier"], "overrides": {"num_hidden_layers": 1}}
    trainer = image_trainer(tmp_path, model, data, max_steps=2, save_strategy="no")
    assert len(trainer.train_dataset) == 200 and len(trainer.eval_dataset) == 60
    first, again = (trainer.train_dataset[:8]["pixel_values"] for _ in range(2))
    assert not torch.equal(first, again)
    first, again = (trainer.eval_dataset[:8]["pixel_values"] for _ in range(2))
    assert torch.equal(first, again)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    assert not any("layer.1." in name for name in before)
    trainer.train(resume_from_checkpoint=True)
    after = trainer.model.named_parameters()
    changed = {name for name, parameter in after if not torch.equal(parameter, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
def test_a_classifier_of_other_classes_begins_anew_and_that_is_said(squares, tmp_path):
    """Its base is the checkpoint's; with adapters the new classifier is kept, and what is saved loads again."""
    start = tmp_path / "start"
    small = {"num_hidden_layers": 1}
    new = image_trainer(start, {"config": "mnist-sas", "overrides": small}, {"train": str(squares)}, max_steps=1)
    new.model.save_pretrained(start)
    new.processing_class.save_pretrained(start)
    data = {"train": str(squares), "class_names": ["ul", "ur", "ll", "lr"]}
    with pytest.warns(UserWarning, match="was trained on the classes 0, 1, 2, 3, .*on with ul, ur, ll, lr"):
        image_trainer(tmp_path / "named", {"checkpoint": str(start)}, data, max_steps=1)
    config = new.model.config.to_dict() | {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    two = SASViTForImageClassification(type(new.model.config).from_dict(config))
    two.save_pretrained(start)
    with pytest.warns(UserWarning, match="The classifier begins anew: .* of 2 classes, the images have 4"):
        model = image_trainer(tmp_path / "new", {"checkpoint": str(start)}, data, max_steps=1).model
    assert model.classifier.out_features == 4
    found, expected = model.vit.state_dict(), two.vit.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    lora = {"r": 2, "target_modules": ["q_proj"]}
    with (
        pytest.warns(UserWarning, match="begins anew"),
        pytest.raises(ValueError, match="not trained: add it to `model.lora.modules_to_save`"),
    ):
        image_trainer(tmp_path / "lost", {"checkpoint": str(start), "lora": lora}, data)
    lora["modules_to_save"] = ["classifier"]
    with pytest.warns(UserWarning, match="begins anew"):
        trainer = image_trainer(tmp_path / "lora", {"checkpoint": str(start), "lora": lora}, data, max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded = AutoPeftModel.from_pretrained(tmp_path / "lora", import_allowlist=["sas_hf"]).eval()
    pixels = torch.randn(2, *trainer.eval_dataset[0]["pixel_values"].shape)
    assert torch.equal(loaded(pixels).logits, trainer.model.eval()(pixels).logits)
    # A weight of its layers that is missing is never begun anew.
    weights = load_file(start / "model.safetensors")
    del weights["vit.layernorm.weight"]
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.warns(UserWarning, match="begins anew"),
        pytest.raises(ValueError, match="start lacks weights of SASViTForImageClassification: vit.layernorm.weight"),
    ):
        image_trainer(tmp_path / "hole", {"checkpoint": str(start)}, data)


def test_a_checkpoint_of_the_same_classes_keeps_their_order(squares, tmp_path):
    """Its classifier would else learn each class in another's place."""
    named = {"train": str(squares), "class_names": ["ul", "ur", "ll", "lr"]}
    small = {"config": "mnist-sas", "overrides": {"num_hidden_layers": 1}}
    new = image_trainer(tmp_path, small, named, max_steps=1)
    other = ["lr", "ul", "ll", "ur"]
    config = new.model.config.to_dict() | {"id2label": dict(enumerate(other))}
    config["label2id"] = {name: number for number, name in enumerate(other)}
    SASViTForImageClassification(type(new.model.config).from_dict(config)).save_pretrained(tmp_path)
    new.processing_class.save_pretrained(tmp_path)
    trainer = image_trainer(tmp_path / "on", {"checkpoint": str(tmp_path)}, named, max_steps=1)
    assert list(trainer.model.config.id2label.values()) == other
    for ours, theirs in ((trainer.train_dataset, new.train_dataset), (trainer.eval_dataset, new.eval_dataset)):
        expected = [other.index(named["class_names"][number]) for number in theirs[:20]["labels"]]
        assert list(ours[:20]["labels"]) == expected


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"config": "mnist-sa"}, {}, "There is no configuration named 'mnist-sa'"),
        ({"config": "imdb-super"}, {}, "imdb-super is a sas_encoder that is no image classifier; the task needs one."),
        ({"config": "mnist-sas", "overrides": {"hiden_size": 64}}, {}, "did you mean `model.overrides.hidden_size`?"),
        ({"config": "mnist-sas"}, {"train": None}, "`data.train` is None; for images it must be one folder or Hub id"),
        ({"config": "mnist-sas"}, {"split": "training"}, "no split 'training'; it has train, test"),
        ({"config": "mnist-sas"}, {"validation_split": "tests"}, "no split 'tests'; it has train, test"),
        (
            {"config": "mnist-sas"},
            {"validation_split": "train"},
            "is both trained and validated on",
        ),
        (
            {"config": "mnist-sas"},
            {"validation": "@.", "validation_split": "train"},
            "is both trained and validated on",
        ),
        ({"config": "mnist-sas"}, {"class_names": ["a"]}, "`class_names` has 1 names"),
        ({"config": "mnist-sas", "trainable": ["clasifier"]}, {}, "'clasifier', which matches no parameter"),
    ],
)
def test_other_image_recipes_are_refused(squares, tmp_path, model, data, message):
    data = data | ({"validation": f"{squares}/."} if "validation" in data else {})
    with pytest.raises(ValueError) as error:
        image_trainer(tmp_path / "out", model, {"train": str(squares)} | data)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_study_of_images_compares_their_accuracy(squares, tmp_path):
    """Its split to validate on is found by itself, as in a run; curves are over steps."""
    overrides = {"num_hidden_layers": 1}
    training = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "use_cpu": USE_CPU}
    training |= {"per_device_train_batch_size": 20, "learning_rate": 3e-3, "report_to": "none"}
    study = Study(
        recipe={
            "task": "image_classification",
            "model": {"config": "mnist-sas", "overrides": overrides},
            "data": {"train": str(squares), "augment": False},
            "training": training,
        },
        variants={"sas": {}, "standard": {"model": {"config": "mnist-standard"}}},
        seeds=[0, 1],
        output=str(tmp_path / "study"),
    )
    report = run_study(study)
    accuracies = {"sas": [], "standard": []}
    for run in report.runs:
        results = json.loads((tmp_path / "study" / run.variant / f"seed-{run.seed}" / "all_results.json").read_text())
        assert run.metrics["accuracy"] == results["eval_accuracy"] and "perplexity" not in results
        assert run.chance == {"accuracy": 0.25, "top5_accuracy": 1.0}
        assert [step for step, _ in run.curves["accuracy"]] == [2, 4]
        accuracies[run.variant].append(results["eval_accuracy"])
    results, differences, *_ = report.grids()
    assert results.header[:5] == ["variant", "validation accuracy", "top-5 accuracy", "validation loss", "parameters"]
    difference = sum(accuracies["standard"]) / 2 - sum(accuracies["sas"]) / 2
    assert differences.rows[0][1] == f"{difference:+.4f}" and differences.header[1] == "minus sas"
    assert "differences of the final validation accuracy (higher is better) are paired by seed" in differences.caption
    (panel,) = report.draw().axes
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("steps", "validation accuracy")
    saved = json.loads((tmp_path / "study" / "study.json").read_text())
    assert saved["metric"] == "accuracy" and saved["summaries"][1]["difference"] == pytest.approx(difference)
    assert {run["accuracy"] for run in saved["runs"]} == {*accuracies["sas"], *accuracies["standard"]}
