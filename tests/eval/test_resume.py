"""A killed run goes on where it stopped; several processes share one run: the same result as in one go."""

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sas_hf.eval import evaluate, make_continuation_task


# What each process runs: `run` below.
SCRIPT = """
import sys
from sas_hf.eval import evaluate

model, data, cache, output = sys.argv[1:]
result = evaluate(
    model, "sas_continuation", data=data, cache=cache or None, num_fewshot=1, batch_size=2, device="cpu",
    truncation=True, log_samples=True,
)
if result is not None:
    result.save(output)
"""


@pytest.fixture
def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def questions(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    make_continuation_task(text, folder, num_questions=45)
    return folder


def run(checkpoint, questions, cache=None):
    return evaluate(
        checkpoint,
        "sas_continuation",
        data=questions,
        cache=cache,
        num_fewshot=1,
        batch_size=2,
        device="cpu",
        truncation=True,
        log_samples=True,
    )


@pytest.fixture(scope="module")
def in_one_go(checkpoint, questions):
    return run(checkpoint, questions)


def comparable(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("seconds", "num_reused", "num_processes")}


def kept(cache: Path) -> list[int]:
    """Answers in each store, as a reader finds them while they are written to."""
    counts = []
    for path in sorted(cache.glob("*.sqlite")):
        try:
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
                counts.append(connection.execute("SELECT count(*) FROM answers").fetchone()[0])
        except sqlite3.OperationalError:  # just being written
            counts.append(0)
    return counts


def test_a_killed_run_goes_on(checkpoint, questions, in_one_go, tmp_path):
    cache = tmp_path / "cache"
    # A forked process starts at once; it is killed as any other.
    child = multiprocessing.get_context("fork").Process(target=run, args=(checkpoint, questions, cache))
    child.start()
    deadline = time.monotonic() + 120
    while sum(kept(cache)) < 20 and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (done,) = kept(cache)
    assert 20 <= done < 180

    resumed = run(checkpoint, questions, cache)
    assert resumed.num_reused == done
    assert comparable(resumed.to_dict()) == comparable(in_one_go.to_dict())
    again = run(checkpoint, questions, cache)
    assert again.num_reused == 180 and comparable(again.to_dict()) == comparable(in_one_go.to_dict())


def test_two_processes_share_a_run(checkpoint, questions, in_one_go, environment, tmp_path):
    """A real `accelerate launch`; without GPUs it joins the processes by gloo."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    output, cache = tmp_path / "result.json", tmp_path / "cache"
    command += [str(tmp_path / "script.py"), str(checkpoint), str(questions), str(cache), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["num_processes"] == 2
    assert comparable(result) == comparable(in_one_go.to_dict())
    assert sum(kept(cache)) == 180 and min(kept(cache)) > 80  # each did its part
    assert run(checkpoint, questions, cache).num_reused == 180  # one process takes up what two have left


def test_answers_are_one_model_s_own(checkpoint, model, tokenizer, questions, data, tmp_path):
    options = {"data": data, "device": "cpu", "cache": tmp_path / "cache"}
    first = evaluate(checkpoint, "arc_easy", **options)
    assert evaluate(checkpoint, "arc_easy", **options).num_reused > 0
    assert evaluate(checkpoint, "arc_easy", dtype="bfloat16", **options).num_reused == 0
    assert evaluate(checkpoint, "arc_easy", batch_size=1, **options).num_reused == 0
    other = tmp_path / "other"
    model.model.embed_tokens.weight.data.mul_(0.5)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    changed = evaluate(other, "arc_easy", **options)
    assert changed.num_reused == 0
    model.model.embed_tokens.weight.data.mul_(2)
    model.save_pretrained(other)  # the same place and size, other weights
    restored = evaluate(other, "arc_easy", **options)
    assert restored.num_reused == 0
    times = {path: path.stat().st_mtime_ns for path in other.iterdir()}
    model.save_pretrained(other)
    for path, moment in times.items():
        os.utime(path, ns=(moment, moment))  # as some copying does
    assert evaluate(other, "arc_easy", **options).num_reused == 0
    assert restored.tasks["arc_easy"].metrics == first.tasks["arc_easy"].metrics


def test_unusable_stores(checkpoint, model, tokenizer, data, tmp_path):
    with pytest.raises(ValueError, match="`cache` is .*live models"):
        evaluate(model, "arc_easy", data=data, tokenizer=tokenizer, cache=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`cache` is .*a file"):
        evaluate(checkpoint, "arc_easy", data=data, cache=tmp_path / "file")
    evaluate(checkpoint, "arc_easy", data=data, limit=1, cache=tmp_path / "cache", device="cpu")
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(b"something else" * 100)
    with pytest.raises(ValueError, match="is not a store of answers"):
        evaluate(checkpoint, "arc_easy", data=data, limit=1, cache=tmp_path / "cache", device="cpu")
