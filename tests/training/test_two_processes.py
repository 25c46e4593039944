"""`accelerate launch -m sas_hf train` on two processes: the training of one, written once, killed at no loss."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from helpers import assert_all_close, assert_identical, python_environment
from safetensors.torch import load_file
from test_train_command import TINY

import sas_hf.training
from sas_hf.data.text import python_reference, split_text
from sas_hf.eval import EvaluationResult, evaluate, make_continuation_task
from sas_hf.training.benchmarks import scores
from sas_hf.training.recipe import load_recipe
from sas_hf.training.reporting import read_log
from sas_hf.training.run import train


STEPS, SAVE_EVERY = 24, 4
DDP = Path(sas_hf.training.__file__).parent / "accelerate" / "ddp.yaml"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    make_continuation_task(split_text(python_reference())[1], folder, num_questions=8)
    return folder


@pytest.fixture(scope="module")
def file(questions, tmp_path_factory):
    """Four rows a device and step: one device accumulates two batches, two take one each."""
    folder = tmp_path_factory.mktemp("recipe")
    fields = {
        "model": {
            "config": "sas-125m",
            "tokenizer": "python-reference",
            "overrides": TINY | {"hidden_dropout": 0.0, "max_position_embeddings": 256},
        },
        "data": {
            "train": "python-reference",
            "validation_documents": 4,
            "max_validation_sequences": 16,
            "sequence_length": 64,
            "cache": str(folder / "cache"),
        },
        "evaluation": {"tasks": ["sas_continuation"], "data": str(questions), "steps": 16},
        "batch_size": 8,
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "logging_steps": SAVE_EVERY,
            "save_steps": SAVE_EVERY,
            "eval_strategy": "steps",
            "eval_steps": 12,
            "use_cpu": True,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def start(file, folder, *changes):
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(DDP)]
    command = [*launcher, "--main_process_port", "0", "-m", "sas_hf", "train", str(file)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command += [f"training.output_dir={folder}", *changes]
    return subprocess.Popen(command, env=python_environment(), **pipes)


def processes_of(folder) -> list[psutil.Process]:
    """The launcher and those it started, which are in sessions of their own."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"training.output_dir={folder}" in (process.info["cmdline"] or [])
    ]


@pytest.fixture(scope="module")
def two(file, tmp_path_factory):
    """The folder of a run of two processes that nothing interrupts, and what the terminal showed."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    process = start(file, folder)
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder, shown, errors


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_two_processes_train_as_one(two, file, tmp_path):
    folder, shown, errors = two
    train(load_recipe(file, [f"training.output_dir={tmp_path / 'one'}"]))
    one, found = read_log(tmp_path / "one"), read_log(folder)
    assert [(line["step"], line["tokens"], *line) for line in found] == [
        (line["step"], line["tokens"], *line) for line in one
    ]
    for name, tolerance in (("loss", 1e-5), ("eval_loss", 1e-4)):
        expected = [line[name] for line in one if name in line]
        assert len(expected) >= 2
        assert [line[name] for line in found if name in line] == pytest.approx(expected, abs=tolerance)
    assert_all_close(weights(folder), weights(tmp_path / "one"), 1e-3)
    assert shown.count("Saved") == 1 and "find_unused_parameters" not in errors


def test_they_write_one_run(two, file):
    folder, _, _ = two
    assert load_recipe(folder / "recipe.yaml") == load_recipe(file, [f"training.output_dir={folder}"])
    names = {path.name for path in folder.iterdir()}
    assert {"all_results.json", "loss.png", "tokenizer.json", f"checkpoint-{STEPS}"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_they_share_the_questions_of_benchmarks(two, questions):
    folder, _, _ = two
    lines = [line for line in read_log(folder) if any(name.startswith("benchmark/") for name in line)]
    assert [line["step"] for line in lines] == [16, STEPS]
    for line in lines:
        saved = EvaluationResult.load(folder / "benchmarks" / f"step-{line['step']}.json")
        checkpoint = str(folder / f"checkpoint-{line['step']}")
        alone = evaluate(checkpoint, ["sas_continuation"], data=questions, dtype="float32", device="cpu")
        assert saved.num_processes == 2 and saved.num_reused == 0
        assert scores(saved) == scores(alone) and scores(saved).items() <= line.items()
    assert scores(saved).items() <= json.loads((folder / "all_results.json").read_text()).items()


def stop(file, folder, step: int, told: signal.Signals) -> str:
    """Start, wait for the checkpoint of that step and stop; returns what was said."""
    process = start(file, folder)
    deadline = time.monotonic() + 300
    while not (folder / f"checkpoint-{step}").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    workers = processes_of(folder)
    assert len(workers) == 3  # with the launcher
    for worker in workers if told == signal.SIGKILL else [process]:
        worker.send_signal(told)
    _, errors = process.communicate()
    psutil.wait_procs(workers, timeout=60)
    assert process.returncode != 0 and not processes_of(folder) and not (folder / "all_results.json").exists()
    return errors


def test_stopped_thrice_the_same_command_ends_with_the_same_weights(two, file, tmp_path):
    """SIGTERM to the launcher, as a cluster's scheduler does, Ctrl-C, and SIGKILL to all, as where a machine dies."""
    folder = tmp_path / "run"
    assert "the same command goes on from there" in stop(file, folder, SAVE_EVERY, signal.SIGTERM)
    told = stop(file, folder, 3 * SAVE_EVERY, signal.SIGINT)
    assert told.count("the same command goes on from there") == 1
    stop(file, folder, 4 * SAVE_EVERY, signal.SIGKILL)
    process = start(file, folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_identical(weights(folder), weights(two[0]))
    results = [json.loads((path / "all_results.json").read_text()) for path in (folder, two[0])]
    assert results[0] == results[1]


def test_a_refusal_is_shown_once_and_ends_every_process(file, tmp_path):
    process = start(file, tmp_path / "run", "data.sequence_length=257")
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert errors.count("`data.sequence_length` is 257, but the model's `max_position_embeddings` is 256") == 1
    assert not processes_of(tmp_path / "run")
