"""Where files are written: one process at a time."""

import multiprocessing
import os
import socket
import threading

import pytest
from helpers import gpt, train_tokenizer
from transformers import TrainingArguments
from typer.testing import CliRunner

from sas_hf.cli import app
from sas_hf.conversion import convert_checkpoint, restore_checkpoint
from sas_hf.eval import evaluate, evaluate_images, prepare_data
from sas_hf.eval.answers import answers_of
from sas_hf.export import export_model
from sas_hf.files import LOCK_NAME, locked
from sas_hf.training import DurableTrainer
from sas_hf.training.recipe import load_recipe
from sas_hf.training.run import train
from sas_hf.training.study import load_study, run_study


@pytest.fixture
def hold():
    """Start a process that locks and waits; gives the process."""
    holders = []

    def start(path, in_place=False):
        context = multiprocessing.get_context("fork")
        holding = context.Event()

        def wait():
            with locked(path, "", in_place):
                holding.set()
                threading.Event().wait()

        holders.append(context.Process(target=wait, daemon=True))
        holders[-1].start()
        assert holding.wait(60)
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()
        holder.join()


def run_command(*arguments):
    shown = CliRunner().invoke(app, [*map(str, arguments)])
    if shown.exit_code:
        raise BlockingIOError(shown.stderr)


def train_durably(path):
    arguments = TrainingArguments(path, use_cpu=True, report_to="none")
    DurableTrainer(gpt(), arguments, train_dataset=[{"input_ids": [1], "labels": [1]}]).train()


# What writes to a path, and whether it does so in place. None of the sources is there: the lock comes before a look.
WRITERS = {
    "convert": (lambda path: convert_checkpoint("./none", path), False),
    "restore": (lambda path: restore_checkpoint("./none", path), False),
    "export": (lambda path: export_model("./none", path), False),
    "train": (lambda path: train(load_recipe("cpu", [f"training.output_dir={path}"])), True),
    "study": (lambda path: run_study(load_study("cpu-kinds", path)), True),
    "DurableTrainer": (train_durably, True),
    "eval --output": (lambda path: evaluate("./none", "sas_table1", output=path), False),
    "eval --images --output": (lambda path: evaluate_images("./none", "./none", output=path), False),
    "eval --report": (lambda path: run_command("eval", "./none", "--tasks", "none", "--report", path), True),
    "eval-data": (lambda path: prepare_data(path, "none"), True),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_second_writer_is_refused_at_once_and_told_who_the_first_is(writer, hold, tmp_path):
    write, in_place = WRITERS[writer]
    path = tmp_path / "runs" / "a"
    holder = hold(path, in_place)
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(BlockingIOError) as error:
        write(path)
    told = " ".join(str(error.value).split())
    assert f"{str(path)!r}, where process {holder.pid} on {socket.gethostname()} is at work" in told
    assert sorted(path.parent.rglob("*")) == before


def test_two_evaluations_of_one_model_do_not_share_a_cache_meanwhile(hold, tmp_path):
    """Those of two models may."""
    for name in ("first", "second"):
        gpt(vocab_size=400).save_pretrained(tmp_path / name)
        train_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("The with statement is used to wrap the execution of a block. " * 9)
    cache = tmp_path / "cache"

    def score(name):
        return evaluate(tmp_path / name, perplexity=tmp_path / "text.txt", cache=cache, batch_size=1)

    holder = hold(answers_of(cache, str(tmp_path / "first"), None))
    with pytest.raises(BlockingIOError, match=rf"`cache` is .* for .*first, where process {holder.pid} on "):
        score("first")
    assert score("second").num_reused == 0
    holder.kill()
    holder.join()
    assert score("first").num_reused == 0 and score("first").num_reused > 0


def test_a_killed_process_leaves_no_lock(hold, tmp_path):
    holder = hold(tmp_path / "run", in_place=True)
    holder.kill()
    holder.join()
    assert (tmp_path / "run" / LOCK_NAME).exists()  # its file, which locks nothing
    with locked(tmp_path / "run", "", in_place=True):
        assert (tmp_path / "run" / LOCK_NAME).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert not any((tmp_path / "run").iterdir())
