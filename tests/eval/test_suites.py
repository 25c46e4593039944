"""The papers' suites: stock tasks, the papers' columns and averages, from every way to run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from sas_hf.eval import evaluate
from sas_hf.eval.report import TABLE_OF_SUITE
from sas_hf.eval.task_loading import leaf_names, load_tasks, stock_config, task_manager
from sas_hf.report.printed import printed


SUITES = ("sas_table1", "sas_table1_2shot", "sas_table8")


@pytest.mark.parametrize("suite", SUITES)
def test_the_members_are_the_harness_s_own(suite):
    stock = Path(lm_eval.__file__).parent / "tasks"
    members = task_manager().task_index[suite].cfg["task"]
    for name in members:  # names alone: nothing of a task is changed
        assert isinstance(name, str)
    for name in leaf_names([suite]):
        assert task_manager().task_index[name].yaml_path.is_relative_to(stock)
        columns = task_manager().task_index[suite].cfg["metadata"]["columns"]
        if name in [column["task"] for column in columns.values()]:
            (metric,) = [column["metric"] for column in columns.values() if column["task"] == name]
            assert metric in [entry["metric"] for entry in stock_config(name)["metric_list"]]


@pytest.mark.parametrize("suite", TABLE_OF_SUITE)
def test_the_columns_are_the_paper_s(suite):
    table = printed("sas")[TABLE_OF_SUITE[suite]]
    columns = task_manager().task_index[suite].cfg["metadata"]["columns"]
    assert list(columns) == table.columns
    assert [column["metric"] for column in columns.values()] == table.metrics


def test_numbers_are_those_of_the_harness_s_own_model(checkpoint, benchmarks):
    """The stock tasks in the harness's `hf`, in the form in which it reads them from other files."""
    tasks = []
    for name in leaf_names(["sas_table1"]):
        config = stock_config(name)
        path = benchmarks / config["dataset_path"] / (config.get("dataset_name") or "default") / "validation.parquet"
        source = {"dataset_path": "parquet", "dataset_name": None, "training_split": None, "test_split": None}
        source |= {"dataset_kwargs": {"data_files": {"validation": str(path)}}, "validation_split": "validation"}
        tasks.append({"task": name, **source})
    expected = simple_evaluate(
        HFLM(str(checkpoint), device="cpu"), tasks=[{"group": "g", "task": tasks}], task_manager=task_manager()
    )
    result = evaluate(checkpoint, "sas_table1", data=benchmarks, batch_size=1, device="cpu", log_samples=True)

    suite, values = result.suites["sas_table1"], []
    for column in suite.columns.values():
        (name,) = column.tasks
        responses = [[response[0] for response in sample["resps"]] for sample in expected["samples"][name]]
        assert [sample["responses"] for sample in result.tasks[name].samples] == responses
        assert column.score.value == expected["results"][name][f"{column.metric},none"]
        assert column.score.stderr == expected["results"][name][f"{column.metric}_stderr,none"]
        values.append(column.score)
    assert suite.complete
    assert suite.average.value == pytest.approx(sum(score.value for score in values) / 7)
    assert suite.average.stderr == pytest.approx(sum(score.stderr**2 for score in values) ** 0.5 / 7)
    assert result.groups["sas_table1"]["average"] == suite.average
    assert result.tasks["arc_easy"].notes == ["evaluated on validation, which the folder has, instead of test"]
    assert result.tasks["hellaswag"].notes == []


def test_table_8_counts_mmlu_as_one_column(checkpoint, benchmarks):
    result = evaluate(checkpoint, "sas_table8", data=benchmarks, device="cpu")
    suite = result.suites["sas_table8"]
    mmlu = suite.columns["MMLU"]
    assert len(mmlu.tasks) == 57
    scores = [score for name in mmlu.tasks for score in result.tasks[name].scores["acc"]]
    assert mmlu.num_samples == len(scores) == 85
    assert mmlu.score.value == pytest.approx(sum(scores) / len(scores))
    assert suite.average.value == pytest.approx(sum(column.score.value for column in suite.columns.values()) / 9)


def test_two_shot_is_the_suite_with_two_examples(checkpoint, benchmarks):
    named = evaluate(checkpoint, "sas_table1_2shot", data=benchmarks, limit=2, device="cpu", truncation=True)
    asked = evaluate(checkpoint, "sas_table1", data=benchmarks, limit=2, num_fewshot=2, device="cpu", truncation=True)
    assert {task.num_fewshot for task in named.tasks.values()} == {2}
    assert {name: task.questions for name, task in named.tasks.items()} == {
        name: task.questions for name, task in asked.tasks.items()
    }
    assert named.suites["sas_table1_2shot"].average == asked.suites["sas_table1"].average
    for task in named.tasks.values():
        assert task.fewshot_split == "validation"
        assert task.notes[-1] == "examples from the evaluated split (validation), without the question itself"


def test_columns_can_be_chosen(checkpoint, benchmarks):
    result = evaluate(checkpoint, "sas_table1", columns=["PIQA", "ARC-E"], data=benchmarks, device="cpu")
    suite = result.suites["sas_table1"]
    assert list(suite.columns) == ["ARC-E", "PIQA"] and list(result.tasks) == ["arc_easy", "piqa"]
    assert not suite.complete
    _, tasks = load_tasks(["sas_table1"], benchmarks)  # the choice has gone
    assert len(tasks) == 7


def test_unknown_suites_and_columns():
    with pytest.raises(ValueError, match=r"no task 'sas_tabel1'.*'sas_table1'"):
        evaluate("unused", "sas_tabel1")
    with pytest.raises(ValueError, match=r"'sas_table1' has no column 'MMLU'; it has ARC-E, .*WinoGrande"):
        evaluate("unused", "sas_table1", columns=["ARC-E", "MMLU"])
    with pytest.raises(ValueError, match=r"`columns`.*'piqa' is a task of its own"):
        evaluate("unused", "piqa", columns=["PIQA"])
    with pytest.raises(ValueError, match="`columns` is empty"):
        evaluate("unused", "sas_table1", columns=[])


def test_all_that_is_missing_is_listed_at_once(checkpoint, data):
    with pytest.raises(FileNotFoundError) as error:
        evaluate(checkpoint, "sas_table1", data=data)
    for name in ("arc_challenge", "hellaswag", "piqa", "sciq", "social_iqa", "winogrande"):
        assert f"Task {name!r} needs" in str(error.value)
    assert "'arc_easy'" not in str(error.value)


def test_the_harness_s_command_line_knows_the_suites(checkpoint, hub, tmp_path):
    """Stock tasks as they are, data and all; here from a folder that stands for the Hub."""
    command = [sys.executable, "-m", "sas_hf.eval", "run", "--model", "sas_hf", "--tasks", "sas_table1"]
    command += ["--model_args", f"pretrained={checkpoint}", "--device", "cpu", "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["sas_table1"]
    average = evaluate(checkpoint, "sas_table1", batch_size=1, device="cpu").suites["sas_table1"].average
    assert found["average,none"] == pytest.approx(average.value)
    assert found["average_stderr,none"] == pytest.approx(average.stderr)
