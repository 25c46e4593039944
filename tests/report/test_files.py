"""Where files are written: one process at a time, and nothing half-written where the disk is full."""

import errno
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import threading

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import gpt, real_text, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from typer.testing import CliRunner

from sas_hf.cli import app, explain_errors
from sas_hf.conversion import convert_checkpoint, restore_checkpoint
from sas_hf.eval import EvaluationResult, PerplexityText, Report, evaluate, evaluate_images, prepare_data
from sas_hf.eval.answers import AnswerStore, answers_of
from sas_hf.eval.results import save_json
from sas_hf.hub.export import export_model
from sas_hf.report.files import LOCK_NAME, NoRoomError, locked, writing
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
    "eval --report": (lambda path: run_command("eval", "none", "--tasks", "none", "--report", path), True),
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


SIZE = 16 * 1024  # less than what each writes


@pytest.fixture(params=["full disk", "ulimit -f"])
def small_disk(request, tmp_path):
    """A folder in which no more than `SIZE` bytes have room, and what ends the want of room."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "full disk":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk; files of limited size take its place")
        yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        subprocess.run(["umount", "--lazy", folder], check=True)
        return
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def end():
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, unlimited[1]))
    try:
        yield folder, end
    finally:
        end()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Llama, its conversion, a text, an index of images and a result, all outside of the small disk."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = train_tokenizer()
    fields = {"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=4, max_position_embeddings=64))
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    convert_checkpoint(folder / "llama", folder / "sas", windows=1)
    rows = [{"question": random.randbytes(500).hex()} for _ in range(200)]
    place = folder / "hub" / "allenai" / "ai2_arc"
    for split in ("train", "validation", "test"):
        path = place / "ARC-Easy" / f"{split}-0.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    files = "".join(f"  - {{split: {name}, path: ARC-Easy/{name}-*}}\n" for name in ("train", "validation", "test"))
    (place / "README.md").write_text(f"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n{files}---\n")
    (folder / "text.txt").write_text(" ".join(real_text()[:60]))
    text = PerplexityText(folder / "text.txt", context_lengths=(16, 32, 64))  # three points to draw
    evaluate(folder / "sas", perplexity=text, batch_size=8, output=folder / "result.json")
    with pytest.MonkeyPatch.context() as patch:  # what is fetched lies in the cache, from here on
        patch.chdir(folder / "hub")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        prepare_data(folder / "data", "arc_easy")
    return folder


def keep_answers(path):
    requests = [("", [number], [number]) for number in range(4000)]
    AnswerStore(path, {}).put(dict.fromkeys(range(4000), (-1.0, True)), requests)


# What writes more than `SIZE` bytes to a path.
LARGE = {
    "convert": lambda made, path: convert_checkpoint(made / "llama", path, windows=1),
    "restore": lambda made, path: restore_checkpoint(made / "sas", path, windows=1),
    "export": lambda made, path: export_model(made / "sas", path),
    "eval --report": lambda made, path: Report([EvaluationResult.load(made / "result.json")]).save(path),
    "eval --output": lambda made, path: save_json(path, ["a result"] * SIZE),
    "eval --cache": lambda made, path: keep_answers(path),
    "eval-data": lambda made, path: prepare_data(path, "arc_easy"),
}


@pytest.mark.parametrize("writer", LARGE)
def test_a_full_disk_is_told_and_leaves_nothing_half_written(writer, made, small_disk, monkeypatch):
    monkeypatch.chdir(made / "hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", made / "cache")
    folder, make_room = small_disk
    path = folder / "new"
    with pytest.raises(OSError) as error:
        LARGE[writer](made, path)
    told = rf"{path}\S* cannot be written: .*; [\d.,]+ MB are free there now."
    foreseen = rf"The result needs about \d+ MB, but {folder} has 0 MB free."
    assert re.fullmatch(f"{told}|{foreseen}" if writer in ("convert", "restore") else told, str(error.value))
    made_anyway = [file for file in folder.rglob("*") if file.is_file()]
    assert [file.suffix for file in made_anyway] == ([".sqlite"] if writer == "eval --cache" else [])
    make_room()
    LARGE[writer](made, path)


def test_a_training_on_a_full_disk_keeps_its_checkpoints_and_goes_on(tmp_path):
    """The disk has room for two or three of the five checkpoints."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk; test_durable_trainer.py limits the size of files instead")
    small = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "head_dim=8", "simulated_head_dim=12"]
    training = ["max_steps=5", "save_steps=1", "warmup_steps=1", "save_total_limit=null", "use_cpu=true"]
    fields = [f"model.overrides.{field}" for field in small] + [f"training.{field}" for field in training]
    fields += ["data.sequence_length=32", "data.max_validation_sequences=4", f"training.output_dir={folder / 'run'}"]
    recipe = load_recipe("cpu", fields)
    try:
        with pytest.raises(NoRoomError, match=r"run/checkpoint-[2-4] cannot be written: .*disk is full"):
            train(recipe)
        names = {path.name for path in (folder / "run").iterdir()}
        kept = {f"checkpoint-{step}" for step in range(1, len(names) - 2)}
        assert kept and names == kept | {"recipe.yaml", "data.json", "log.jsonl"}
        for checkpoint in kept:
            torch.load(folder / "run" / checkpoint / "optimizer.pt")
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        assert train(recipe)["step"] == 5
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_cache_on_a_full_disk_is_named_by_the_command(capsys):
    @explain_errors
    def command():
        raise RuntimeError("while the data were made") from OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit):
        command()
    told = capsys.readouterr().err
    assert "No space left on device (the disk is full)" in told and "HF_HOME" in told


def test_an_error_that_is_raised_from_its_own_consequence_passes():
    """As what `datasets` wraps, and is unwrapped again; the chain of its causes has no end."""
    with pytest.raises(ValueError, match="short"), writing():
        try:
            raise RuntimeError("while the data were made") from ValueError("short")
        except RuntimeError as error:
            raise error.__cause__ from error


def test_an_interrupted_command_says_so_in_one_line(made, tmp_path, capsys):
    @explain_errors
    def command():
        convert_checkpoint(made / "llama", tmp_path / "new", progress=interrupt)

    def interrupt(message):
        if message.startswith("Saving"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 130
    told = capsys.readouterr().err
    assert told.splitlines()[-1] == "interrupted: Nothing half-written is left; what was whole stays."
    assert "Traceback" not in told
    assert not any(tmp_path.iterdir())
