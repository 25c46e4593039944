"""The stock `Trainer`, whose checkpoints are whole or not there.

Killed at any moment, also inside a save, the same command goes on from the last whole checkpoint.
"""

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import cast

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint, rotate_checkpoints

from ..report.files import locked, writing
from .folders import output_folder
from .streaming import PackedStream


STREAM_NAME = "stream.json"
# Holds a checkpoint while it is written; no reader takes it for one.
UNFINISHED = ".unfinished"
# What ends a training after the step at hand; Windows has no SIGHUP.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class DurableTrainer(Trainer):
    """
    A `Trainer` that loses no work. Arguments as the stock one's.

    - A checkpoint is written aside and renamed when complete; what a killed save left is removed by the next `train`.
    - `train(resume_from_checkpoint=True)` starts from the beginning where there is no checkpoint yet, so that the same
      command serves every start.
    - SIGTERM (pre-emption) and SIGHUP (a closed terminal) end the training after the step at hand, with a
      checkpoint. So does Ctrl-C (SIGINT), which then raises a `KeyboardInterrupt` that says what was saved; a second
      one interrupts at once.
    - A loss or gradient that is not finite raises before the weights are saved.
    - The smoothed loss (`label_smoothing_factor`) of a causal model is that of the next token under `torch_compile`,
      FSDP2 and prefix tuning, too, where the stock Trainer loses the model's name and does not shift the labels.
    - The place of a [`PackedStream`] is part of each checkpoint: a resumed run goes on at the right document, without
      reading those before it. The sizes of a step may then change, which the stock Trainer would count wrongly.

    The output folder must be on one file system, as it is unless a checkpoint's folder is a mount of its own.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None and self._loss_shifts_labels:
            # The stock Trainer goes by the name of the outermost class, which is another then.
            self.label_smoother = partial(  # type: ignore[assignment]  # it is called like one
                self.label_smoother, shift_labels=True
            )
        self.told_to_end: int | None = None  # by which signal, also where the last step had been made
        self._saves_aside = False
        self._finite: torch.Tensor | None = None
        self._rows_before, self._steps_before = 0, 0  # of the stream, when this process took it up
        self._resumes_stream_from: str | None = None
        self._loaded_step: int | None = None  # of the best model, once it is in the last one's place
        self.add_callback(SaveOnTermination(self))

    def train(  # type: ignore[override]  # the others by keyword alone
        self, resume_from_checkpoint: str | bool | None = None, **kwargs
    ) -> TrainOutput:
        """
        As in `Trainer`.

        Raises:
            FloatingPointError: when a loss or gradient is not finite; names the step and the last whole checkpoint.
            FileNotFoundError: for a checkpoint without optimizer or schedule, as of `save_only_model`; with
                `load_best_model_at_end` where the best checkpoint is gone.
            OSError: when a checkpoint cannot be written (a full disk); those before it stay.
            BlockingIOError: where another process trains into the output folder.
            KeyboardInterrupt: after Ctrl-C.
        """
        output = output_folder(self.args)
        with locked(output, f"`output_dir` is {str(output)!r}", in_place=True), writing(output):
            return self._train(output, resume_from_checkpoint, **kwargs)

    def _train(self, output: Path, resume_from_checkpoint: str | bool | None, **kwargs):
        if self.args.should_save:
            shutil.rmtree(output / UNFINISHED, ignore_errors=True)
        if resume_from_checkpoint is True and not (output.is_dir() and get_last_checkpoint(output)):
            resume_from_checkpoint = None
        checkpoint = get_last_checkpoint(output) if resume_from_checkpoint is True else resume_from_checkpoint
        if checkpoint:
            _require_whole_state(Path(checkpoint))
        self._find_place(checkpoint or None)
        self._loaded_step = None
        self._interrupted, self.told_to_end = False, None
        with self._terminating_gently():
            found = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self._interrupted:
            last = get_last_checkpoint(output)  # none where it came after the last step, and nothing is saved by steps
            saved = f"{last} is saved, and the same command goes on from there" if last else "there is no checkpoint"
            raise KeyboardInterrupt(
                f"Ended by Ctrl-C at step {self.state.global_step} of {self.state.max_steps}; {saved}."
            )
        return found

    def _find_place(self, checkpoint: str | None) -> None:
        self._rows_before, self._steps_before, self._resumes_stream_from = 0, 0, None
        if not isinstance(self.train_dataset, PackedStream):
            return
        path = Path(checkpoint or "") / STREAM_NAME
        self.args.ignore_data_skip = bool(checkpoint) and path.is_file()  # the stream skips by itself
        if self.args.ignore_data_skip:
            saved = json.loads(path.read_text())
            self.train_dataset.load_state_dict(saved["place"])
            self._rows_before, self._steps_before = saved["rows"], saved["step"]
            self._resumes_stream_from = checkpoint

    def get_batch_samples(self, *args, **kwargs):
        batches = super().get_batch_samples(*args, **kwargs)
        if self._resumes_stream_from:
            # A DataLoader that starts draws from the random state: it is restored after the first batches, as by the
            # stock Trainer when it skips batches itself.
            self._load_rng_state(self._resumes_stream_from)
            self._resumes_stream_from = None
        return batches

    @contextmanager
    def _terminating_gently(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
            yield
            return
        process = os.getpid()  # workers of a DataLoader inherit the handler, and are told to end by this process

        def end_gently(told: int, frame) -> None:
            if os.getpid() != process:
                return
            if told == signal.SIGINT:
                if self._interrupted:
                    raise KeyboardInterrupt("Interrupted at once; earlier checkpoints are whole.")
                self._interrupted, who, more = True, "Ctrl-C", "; once more: at once"
            elif self.told_to_end is None:
                self.told_to_end, who, more = told, signal.Signals(told).name, ""
            else:
                return
            self.accelerator.set_trigger()
            with suppress(OSError):  # a terminal that is closed
                os.write(2, f"\n{who}: ending after the step at hand, with a checkpoint{more}.\n".encode())

        # Not those that nohup or a shell's background ignores, nor what is handled outside of Python.
        before = {told: signal.getsignal(told) for told in ENDING}
        before = {told: handler for told, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for told in before:
            signal.signal(told, end_gently)
        try:
            yield
        finally:
            for told, handler in before.items():
                signal.signal(told, handler)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # Read only where the device is waited for anyway: to log and to save.
        finite = torch.isfinite(loss)
        self._finite = finite if self._finite is None else self._finite & finite
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm, *args, **kwargs) -> None:
        if isinstance(self.train_dataset, PackedStream):  # all steps are one epoch, whose start a resumed run misses
            self.state.epoch = self.state.global_step / self.state.max_steps
        if self.control.should_log or self.control.should_save:
            self._require_finite(grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _require_finite(self, grad_norm: torch.Tensor | float | None) -> None:
        """Losses since the last check, and the gradients that made the weights about to be saved."""
        finite, self._finite = self._finite, None
        if (finite is None or finite.item()) and (grad_norm is None or math.isfinite(grad_norm)):
            return
        output = output_folder(self.args)
        last = get_last_checkpoint(output) if output.is_dir() else None
        raise FloatingPointError(
            f"The loss or its gradients became NaN or infinite by step {self.state.global_step}. "
            + (f"The last whole checkpoint is {last}. " if last else "There is no checkpoint yet. ")
            + "A smaller `learning_rate`, a longer warm-up or a smaller `max_grad_norm` may help."
        )

    @property
    def step_of_model(self) -> int:
        """The step that the model at hand is of: the last, or the best one's after `load_best_model_at_end`."""
        return self.state.global_step if self._loaded_step is None else self._loaded_step

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if checkpoint is None:
            return trained
        saved = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())["best_model_checkpoint"]
        if saved is not None and not Path(saved).is_dir():  # the folder may be another by now
            best = output_folder(self.args) / Path(saved).name
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
            if self.args.load_best_model_at_end:
                _require_best(best)
        # The stock Trainer trains one step more than `max_steps` when it resumes from the last one.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else trained

    def _load_best_model(self) -> None:
        best = cast(str, self.state.best_model_checkpoint)  # else the Trainer does not ask
        _require_best(Path(best))
        super()._load_best_model()
        self._loaded_step = int(best.rpartition("-")[2])

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saves_aside else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished, whole = run / UNFINISHED, run / name
        try:
            with writing(whole):
                self._saves_aside = True
                super()._save_checkpoint(model, trial)
                self._saves_aside = False
                self.accelerator.wait_for_everyone()  # each process writes its own random state
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(whole)
                if self.args.should_save:
                    self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))  # with the name it will have
                    if isinstance(self.train_dataset, PackedStream) and self.is_world_process_zero():
                        (unfinished / name / STREAM_NAME).write_text(json.dumps(self._place()))
                    self._finish(unfinished, whole)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            self._saves_aside = False
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _place(self) -> dict:
        """Where the steps are in the stream, which itself was read further ahead."""
        rows = (self.state.global_step - self._steps_before) * self.get_total_train_batch_size(self.args)
        rows += self._rows_before
        return {
            "step": self.state.global_step,
            "rows": rows,
            "place": cast(PackedStream, self.train_dataset).state_dict(rows),
        }

    def _finish(self, unfinished: Path, whole: Path) -> None:
        if whole.exists():  # of this step, whole as well
            shutil.rmtree(unfinished)
            return
        os.rename(unfinished / whole.name, whole)
        unfinished.rmdir()


def _require_whole_state(checkpoint: Path) -> None:
    """The stock Trainer goes on without what it does not find: a new optimizer, the schedule from its start."""
    there = [path.name for path in checkpoint.iterdir()]
    absent = [] if TRAINER_STATE_NAME in there else [TRAINER_STATE_NAME]
    if not any(name.startswith("global_step") for name in there):  # where DeepSpeed keeps its own of both
        absent += [] if SCHEDULER_NAME in there else [SCHEDULER_NAME]
        absent += [] if any("optimizer" in name for name in there) else [OPTIMIZER_NAME]  # or folders of shards
    if absent:
        raise FileNotFoundError(
            f"{checkpoint} lacks {', '.join(absent)}, so that a training cannot go on from it (it may have been saved "
            "with `save_only_model`); load it as a model to train anew from it, or name another `output_dir`."
        )


def _require_best(checkpoint: Path) -> None:
    """The stock Trainer takes the last model where it does not find the best."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"`load_best_model_at_end`: {checkpoint} is gone, the best model's checkpoint; put it back, or go on with "
            "`load_best_model_at_end=False` for the last model."
        )


class SaveOnTermination(TrainerCallback):
    """Once any process was told to end: a checkpoint after the step at hand, then the end of the training."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        # All processes must save and stop at the same step, whichever got the signal first.
        if self.trainer.accelerator.check_trigger():
            control.should_save = control.should_training_stop = True
