"""What a training shows and writes, in real trainings that are whole, killed and resumed, and on two terminals."""

import io
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import resumable
from helpers import python_environment
from rich.console import Console
from transformers import PrinterCallback

from sas_hf.training import DurableTrainer, reporting
from sas_hf.training.reporting import TrainingLog, plot_training, read_log


TOKENS = 24  # per sequence; 4 sequences, accumulated twice
TIMES = {"seconds", "tokens_per_second"}
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_reporting, resumable

class Killed(test_reporting.Logged):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 7:  # four lines were written, two of them after the checkpoint
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)

resumable.run(sys.argv[1], trainer_class=Killed, **test_reporting.OPTIONS)
"""
OPTIONS = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3}


class Logged(DurableTrainer):
    """With the log in the place of the Trainer's own printing, and something to evaluate on."""

    console: Console | None = None

    def __init__(self, model, args, train_dataset=None, **kwargs):
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=train_dataset[:8], **kwargs)
        self.remove_callback(PrinterCallback)
        log = TrainingLog(Path(args.output_dir), tokens_per_sequence=TOKENS)
        log.console = self.console or log.console
        self.add_callback(log)


def timeless(folder):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_log(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupts, and what it printed."""
    folder, Logged.console = tmp_path_factory.mktemp("whole"), Console(file=io.StringIO(), width=200)
    try:
        trainer = resumable.run(str(folder), trainer_class=Logged, **OPTIONS)
        trainer.evaluate()  # again, as at the end of a run: is no second line
        return folder, Logged.console.file.getvalue(), trainer
    finally:
        Logged.console = None


def test_a_line_per_log_and_evaluation(whole):
    folder, _, trainer = whole
    lines = read_log(folder)
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        (2, False),
        (3, True),
        (4, False),
        (6, False),
        (6, True),
        (8, False),
        (9, True),
    ]
    history = {(log["step"], name): log[name] for log in trainer.state.log_history for name in log}
    for line in lines:
        assert line["tokens"] == line["step"] * 2 * 4 * TOKENS
        if "eval_loss" in line:
            assert line["eval_loss"] == history[line["step"], "eval_loss"]
            assert line["perplexity"] == math.exp(line["eval_loss"])
        else:
            assert {name: line[name] for name in ("loss", "learning_rate", "grad_norm")} == {
                name: history[line["step"], name] for name in ("loss", "learning_rate", "grad_norm")
            }
            assert line["tokens_per_second"] > 0
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_plain_lines_where_nobody_watches(whole):
    _, printed, _ = whole
    assert printed.count("\n") == 8 and "\x1b" not in printed
    assert printed.startswith("Training from step 0 to 9 of 192 tokens\n")
    assert "step 8/9: loss " in printed and "tokens/s " in printed and " left" in printed
    assert "step 9/9: validation loss " in printed


def test_one_line_of_progress_on_a_terminal(tmp_path, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=200)
    monkeypatch.setattr(Logged, "console", terminal)
    resumable.run(str(tmp_path), trainer_class=Logged, **OPTIONS)
    last = terminal.file.getvalue().split("\r")[-1]
    for part in ("9/9", "loss ", "validation loss ", "learning rate ", "tokens/s "):
        assert part in last
    assert "\x1b[?25h" in terminal.file.getvalue()  # the cursor is shown again


def test_resumed_it_is_the_log_of_an_uninterrupted_run(whole, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, env=python_environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [line["step"] for line in read_log(tmp_path)] == [2, 3, 4, 6, 6]
    beyond = [line | {"tokens": -1} for line in read_log(tmp_path)[3:]]  # so that a line that stays is known by it
    kept = (tmp_path / "log.jsonl").read_text().split("\n")[:3]
    unfinished = '{"step": 7, "los'  # as a kill inside a write leaves it
    (tmp_path / "log.jsonl").write_text("\n".join([*kept, *map(json.dumps, beyond), unfinished]))
    before = read_log(tmp_path)
    resumable.run(str(tmp_path), trainer_class=Logged, resume=True, **OPTIONS)
    assert timeless(tmp_path) == timeless(whole[0])
    after = read_log(tmp_path)
    assert after[:3] == before[:3] and after[3]["seconds"] > before[2]["seconds"]


def test_begun_anew_it_begins_anew(whole, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 0, "tokens": 0, "seconds": 1.0, "loss": 1.0}) + "\n")
    resumable.run(str(tmp_path), trainer_class=Logged, **OPTIONS)
    assert timeless(tmp_path) == timeless(whole[0])


def test_only_the_first_process_writes(tmp_path):
    class Second(Logged):
        def is_world_process_zero(self):
            return False

    resumable.run(str(tmp_path), trainer_class=Second, **OPTIONS)
    assert not (tmp_path / "log.jsonl").exists()


def test_tensorboard_is_the_trainers_own(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))

    board = TensorBoardCallback()  # what `report_to: tensorboard` adds

    class Watched(Logged):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(board)

    resumable.run(str(tmp_path), trainer_class=Watched, **OPTIONS)
    if board.tb_writer is not None:  # an evaluation after the training opens it again
        board.tb_writer.close()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    losses = {event.step: event.value for event in events.Scalars("eval/loss")}
    assert losses == {
        line["step"]: pytest.approx(line["eval_loss"]) for line in read_log(tmp_path) if "perplexity" in line
    }


def test_the_curves(whole):
    paths = plot_training(whole[0])
    assert [path.name for path in paths] == ["loss.png", "loss.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    # matplotlib marks each text in an SVG with a comment
    assert all(f"<!-- {label} -->" in paths[1].read_text() for label in ("training", "validation", "tokens", "loss"))


def test_no_curves_without_a_log(tmp_path):
    with pytest.raises(FileNotFoundError, match="log.jsonl"):
        plot_training(tmp_path)
    (tmp_path / reporting.LOG_NAME).write_text("")
    assert plot_training(tmp_path) == []
