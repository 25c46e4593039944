"""What a training shows and writes while it runs: one line of progress, `log.jsonl`, and its curves at the end.

TensorBoard is the Trainer's own: `report_to: tensorboard`.
"""

import datetime
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ..report.figures import label_axes, legend_below, require_matplotlib, save_figure
from ..report.files import write_atomically, writing


LOG_NAME = "log.jsonl"
# Of the Trainer's logs: times, which the log's own replace, and what is the same in every run.
LEFT_OUT = ("_runtime", "_per_second", "total_flos", "epoch", "num_input_tokens_seen")


class TrainingLog(TrainerCallback):
    """
    Shows the progress of a `Trainer` and writes `log.jsonl`; takes the place of `ProgressCallback` and
    `PrinterCallback`, which must be removed.

    A line of `log.jsonl` is one log or evaluation: `step`, `tokens` seen, `seconds` of training, then what the Trainer
    logged (`loss`, the mean since the log before; `learning_rate`, `grad_norm`; `eval_loss` and other metrics) with
    `tokens_per_second` since the log before (evaluations and checkpoints not counted; `steps_per_second` where tokens
    are unknown) or `perplexity` (exp of `eval_loss`). A resumed training drops the lines beyond the step it resumes
    from: but for times, the file is that of an uninterrupted one, where checkpoints fall on steps that are logged.
    Elsewhere the first `loss` after the resumption is the mean since then.

    Args:
        folder: of the training; made where it is missing. Only the first process writes.
        tokens_per_sequence: of every sequence (T, packed); `None`: unknown, and neither tokens nor what follows from
            the loss are written.
        from_loss: by name, what follows from `eval_loss`; that of language models by default.

    Raises:
        OSError: when the log cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        tokens_per_sequence: int | None,
        from_loss: dict[str, Callable[[float], float]] | None = None,
    ):
        self.from_loss = {"perplexity": perplexity} if from_loss is None else from_loss
        self.path = Path(folder) / LOG_NAME
        self.tokens_per_sequence = tokens_per_sequence
        self.console = Console()
        self._progress: Progress | None = None
        self._training_since: float | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        self._tokens_per_step = None
        if self.tokens_per_sequence is not None:
            replicas = args.world_size // (getattr(model, "tp_size", None) or 1)
            sequences = state.train_batch_size * args.gradient_accumulation_steps * replicas
            self._tokens_per_step = sequences * self.tokens_per_sequence
        kept = []
        if state.global_step and self.path.is_file():
            kept = [line for line in read_log(self.path.parent) if line["step"] <= state.global_step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._written = {(line["step"], frozenset(line)) for line in kept}
        self._began = time.perf_counter() - (kept[-1]["seconds"] if kept else 0.0)
        self._first_step, self._first_time = state.global_step, time.perf_counter()
        self._logged_step, self._trained, self._training_since = state.global_step, 0.0, time.perf_counter()
        self._numbers: dict[str, str] = {}
        if not self.console.is_interactive:
            size = "" if self._tokens_per_step is None else f" of {self._tokens_per_step:,} tokens"
            self.console.print(f"Training from step {state.global_step:,} to {state.max_steps:,}{size}", style="cyan")
        else:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, numbers=""
            )
            self._progress.start()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self._training_since is None:
            self._training_since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if control.should_log or control.should_evaluate or control.should_save:
            self.pause()
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, description="training")

    def pause(self) -> None:
        """What comes until the next step is no training, and does not count in `tokens_per_second`."""
        if self._training_since is not None:
            self._trained += time.perf_counter() - self._training_since
            self._training_since = None

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._progress is not None:
            self._progress.update(self._task, description="evaluating")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:  # a summary of the whole
            return
        line = self._line(state.global_step, logs)
        key = (state.global_step, frozenset(line))
        if key in self._written:  # evaluated again after the end, or after a resumption
            return
        self._written.add(key)
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            os.truncate(self.path, whole)
            raise
        self._show(line, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """End the line of progress; call it where a training ended in an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _line(self, step: int, logs: dict) -> dict:
        tokens = None if self._tokens_per_step is None else step * self._tokens_per_step
        line: dict[str, Any] = {"step": step, "tokens": tokens, "seconds": round(time.perf_counter() - self._began, 3)}
        line |= {name: value for name, value in logs.items() if not name.endswith(LEFT_OUT)}
        if tokens is not None and "eval_loss" in line:
            line |= {name: follow(line["eval_loss"]) for name, follow in self.from_loss.items()}
        elif tokens is not None and "loss" in line:
            new = (step - self._logged_step) * self._tokens_per_step
            line["tokens_per_second"] = round(new / self._trained, 1) if self._trained else None
            self._logged_step, self._trained = step, 0.0
        elif tokens is None and "loss" in line:
            line["steps_per_second"] = round((step - self._logged_step) / self._trained, 4) if self._trained else None
            self._logged_step, self._trained = step, 0.0
        return line

    def _show(self, line: dict, state) -> None:
        shown = {"loss": ".4f", "eval_loss": ".4f", "perplexity": ".2f", "learning_rate": ".2e"}
        shown |= {name: ".4f" for name in line if name.startswith("eval_")}  # what a task measures beside its loss
        shown |= {"tokens_per_second": ",.0f"}
        new = {name: format(line[name], style) for name, style in shown.items() if line.get(name) is not None}
        if benchmarks := {name: f"{value:.4f}" for name, value in line.items() if name.startswith("benchmark/")}:
            self.console.print(f"step {state.global_step}: {_sentence(benchmarks)}", highlight=False, soft_wrap=True)
            return
        self._numbers |= new
        if self._progress is not None:
            self._progress.update(self._task, numbers=_sentence(self._numbers))
            return
        left = ""
        if state.global_step > self._first_step:
            per_step = (time.perf_counter() - self._first_time) / (state.global_step - self._first_step)
            seconds = round((state.max_steps - state.global_step) * per_step)
            left = f", {datetime.timedelta(seconds=seconds)} left"
        message = f"step {state.global_step}/{state.max_steps}: {_sentence(new)}{left}"
        self.console.print(message, highlight=False, soft_wrap=True)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token; infinite where that is no float."""
    return math.exp(loss) if loss < 700 else math.inf


def read_log(folder: Path) -> list[dict]:
    """
    The lines of a training's `log.jsonl`; one that a killed process left unfinished at the end is left out.

    Raises:
        FileNotFoundError: where there is no log.
    """
    *lines, _unfinished = (Path(folder) / LOG_NAME).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def logged_seconds(folder: Path, step: int | None = None) -> float | None:
    """
    Seconds of a training, interrupted or not, until its log's last line; `None` where the log does not know them.

    Args:
        step: until the last line that is not beyond it.
    """
    try:
        lines = read_log(folder)
    except FileNotFoundError:
        return None
    seconds = [line["seconds"] for line in lines if "seconds" in line and (step is None or line["step"] <= step)]
    return seconds[-1] if seconds else None


def plot_training(folder: Path) -> list[Path]:
    """
    Draw training and validation loss (nats per token) over tokens, or over steps where tokens are not known.

    Args:
        folder: of a training, with its `log.jsonl`.

    Returns:
        `loss.png` and `loss.svg` in the folder; none where nothing was logged.

    Raises:
        FileNotFoundError: where there is no log.
        ImportError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    folder, figure = Path(folder), Figure(figsize=(6, 4), layout="constrained")
    lines, axes = read_log(folder), figure.add_subplot()
    across = "step" if any(line["tokens"] is None for line in lines) else "tokens"
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("loss", "training", {}),
        ("eval_loss", "validation", {"marker": "o", "markersize": 3}),
    )
    for name, label, style in styles:
        points = [(line[across], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if not axes.lines:
        return []
    label_axes(axes, across, "loss")
    legend_below(figure, axes)
    return save_figure(figure, folder, "loss")


def _sentence(numbers: dict[str, str]) -> str:
    names = {"eval_loss": "validation loss", "learning_rate": "learning rate", "tokens_per_second": "tokens/s"}
    return ", ".join(f"{names.get(name, name.removeprefix('eval_'))} {value}" for name, value in numbers.items())
