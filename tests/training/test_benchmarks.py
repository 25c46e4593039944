"""Benchmarks while a model is trained: at the chosen steps, as the evaluation gives them, and without a trace."""

import json

import pytest
from helpers import USE_CPU, assert_identical
from safetensors.torch import load_file
from test_train_command import TINY
from toy_benchmarks import write_table_1

from sas_hf.data.text import python_reference, split_text
from sas_hf.eval import EvaluationResult, evaluate, make_continuation_task
from sas_hf.training.benchmarks import scores
from sas_hf.training.recipe import recipe_from_dict
from sas_hf.training.reporting import read_log
from sas_hf.training.run import train
from sas_hf.training.study import Study, plan_runs, run_study


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    make_continuation_task(split_text(python_reference())[1], folder, num_questions=8)
    return folder


def run(folder, cache, **evaluation):
    training = {"output_dir": str(folder), "max_steps": 5, "save_steps": 2, "logging_steps": 1, "use_cpu": USE_CPU}
    fields = {
        "model": {
            "config": "sas-125m",
            "tokenizer": "python-reference",
            "overrides": TINY | {"max_position_embeddings": 256},
        },
        "data": {"train": "python-reference", "sequence_length": 64, "cache": str(cache)},
        "evaluation": evaluation,
        "training": training | {"per_device_train_batch_size": 2},
    }
    return train(recipe_from_dict(fields))


def test_benchmarks_at_chosen_steps(questions, tmp_path):
    tasks = {"tasks": ["sas_continuation"], "data": str(questions), "limit": 6}
    metrics = run(tmp_path / "with", tmp_path, **tasks, steps=2)
    log = [line for line in read_log(tmp_path / "with") if any(name.startswith("benchmark/") for name in line)]
    assert [line["step"] for line in log] == [2, 4, 5]
    losses = [line for line in read_log(tmp_path / "with") if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4, 5] and all(line["tokens_per_second"] for line in losses)
    files = {path.name for path in (tmp_path / "with" / "benchmarks").iterdir()}
    assert files == {"step-2.json", "step-4.json", "step-5.json"}
    for line in log:
        saved = EvaluationResult.load(tmp_path / "with" / "benchmarks" / f"step-{line['step']}.json")
        checkpoint = tmp_path / "with" / f"checkpoint-{line['step']}"
        alone = evaluate(str(checkpoint), ["sas_continuation"], data=questions, limit=6, dtype="float32", device="cpu")
        assert saved.step == line["step"] and scores(saved) == scores(alone)
        assert scores(saved).items() <= line.items()
    assert scores(saved).items() <= metrics.items()

    with pytest.raises(FileNotFoundError, match="arc"):
        run(tmp_path / "missing", tmp_path, tasks=["arc_easy"], data=str(tmp_path))
    assert not (tmp_path / "missing").exists()

    run(tmp_path / "without", tmp_path)
    assert_identical(*(load_file(tmp_path / name / "model.safetensors") for name in ("with", "without")))


def test_a_study_compares_by_benchmarks(tmp_path):
    sentences = [line for line in python_reference().splitlines() if len(line.split()) > 6][:200]
    data = write_table_1(tmp_path / "benchmarks", sentences, 6)
    tiny, suites = TINY | {"max_position_embeddings": 64}, ["sas_table1", "sas_table1_2shot"]
    training = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "use_cpu": USE_CPU}
    study = Study(
        recipe={
            "model": {"config": "sas-125m", "tokenizer": "python-reference", "overrides": tiny},
            "data": {"train": "python-reference", "validation_documents": 1, "sequence_length": 32},
            "evaluation": {"tasks": suites, "data": str(data), "steps": 2, "limit": 3},
            "training": training | {"eval_strategy": "no"},
        },
        variants={"kernel-1": {}, "kernel-3": {"model": {"overrides": {"simulation_kernel_size": 3}}}},
        seeds=[0],
        output=str(tmp_path / "study"),
        metric="benchmark/sas_table1/PIQA",
        figure="bars",
    )
    report = run_study(study)
    assert report.metric.higher_is_better and "higher is better" in json.dumps([vars(grid) for grid in report.grids()])
    names = [f"benchmark/{suite}/{column}" for suite in suites for column in ("ARC-E", "WinoGrande", "average")]
    for run in report.runs:
        results = json.loads((tmp_path / "study" / run.variant / "seed-0" / "all_results.json").read_text())
        assert {name: run.metrics[name] for name in names} == {name: results[name] for name in names}
        assert [value for _, value in run.curves[study.metric]] == [run.metrics[study.metric]]
        files = {path.name for path in (tmp_path / "study" / run.variant / "seed-0" / "benchmarks").iterdir()}
        assert files == {"step-2.json", "step-2-2.json"}  # the suites share their tasks
    first, second = (run.metrics[study.metric] for run in report.runs)
    assert report.summaries[1].differences[study.metric]["difference"] == second - first

    study.metric = "benchmark/sas_table1/PICA"
    with pytest.raises(ValueError, match="did you mean `benchmark/sas_table1/PIQA`"):
        plan_runs(study)
    study.metric = "benchmark/sas_table1/PIQA"
    study.variants["kernel-3"]["evaluation"] = {"tasks": ["sas_table1_2shot"]}  # which only one of them has then
    with pytest.raises(ValueError, match="`benchmark/sas_table1/PIQA` is no `metric`"):
        plan_runs(study)
    study.metric = "benchmark/sas_table1_2shot/PIQA"
    assert len(plan_runs(study)) == 2
