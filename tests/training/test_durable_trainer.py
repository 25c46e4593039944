"""Whatever interrupts a training: the same command again ends with the weights of an uninterrupted one."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import interrupted
import pytest
import resumable
import torch
from helpers import python_environment

from sas_hf import SASGPTForCausalLM
from sas_hf.report.files import NoRoomError
from sas_hf.training import DurableTrainer
from sas_hf.training.durable_trainer import _require_whole_state


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = resumable.run(str(folder), trainer_class=DurableTrainer, resume=True)
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-8", "checkpoint-9"]
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_resumes(folder, whole):
    resumable.run(str(folder), trainer_class=DurableTrainer, resume=True)
    resumed = dict(SASGPTForCausalLM.from_pretrained(folder).named_parameters())
    assert all(torch.equal(resumed[name], parameter) for name, parameter in whole.items())
    assert not list(folder.glob(".*"))


def start(folder, moment, **options):
    command = [sys.executable, str(Path(interrupted.__file__)), str(folder), moment]
    return subprocess.run(command, env=python_environment(), check=False, capture_output=True, text=True, **options)


@pytest.mark.parametrize("moment", interrupted.MOMENTS)
def test_killed_inside_a_save(moment, whole, tmp_path):
    folder = tmp_path / "run"
    assert start(folder, moment).returncode == -signal.SIGKILL
    renamed = ["checkpoint-8"] if moment == "_finish" else []
    assert checkpoints(folder) == ["checkpoint-4", *renamed]
    assert (folder / ".unfinished").exists() != bool(renamed)
    if not renamed:  # what is left may be of a step that the next run does not save at
        (folder / ".unfinished" / "checkpoint-8").rename(folder / ".unfinished" / "checkpoint-7")
    assert_resumes(folder, whole)


@pytest.mark.parametrize("told", ["SIGTERM", "SIGHUP"])
def test_told_to_end_it_saves_first(told, whole, tmp_path):
    if signal.getsignal(getattr(signal, told)) is signal.SIG_IGN:
        pytest.skip(f"{told} is ignored here, as under nohup, and a run heeds that")
    folder = tmp_path / "run"
    ended = start(folder, told)
    assert ended.returncode == 0 and f"{told}: ending after the step at hand, with a checkpoint." in ended.stderr
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-7"]  # the step at hand was the seventh
    assert_resumes(folder, whole)


def test_ctrl_c_saves_first_and_raises(whole, tmp_path, capfd):
    folder = tmp_path / "run"
    told = rf"Ended by Ctrl-C at step 7 of 9; {folder}/checkpoint-7 is saved, and the same command goes on from there"
    with pytest.raises(KeyboardInterrupt, match=told):
        resumable.run(str(folder), trainer_class=interrupted.interrupted("SIGINT"))
    assert "Ctrl-C: ending after the step at hand, with a checkpoint; once more: at once." in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-7"]
    assert_resumes(folder, whole)


def test_ctrl_c_saves_first_where_nobody_is_left_to_read(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(2)
    os.dup2(writer, 2)
    try:
        with pytest.raises(KeyboardInterrupt, match="checkpoint-7 is saved"):
            resumable.run(str(tmp_path / "run"), trainer_class=interrupted.interrupted("SIGINT"))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writer)


def test_ctrl_c_twice_interrupts_at_once(whole, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match="at once"):
        resumable.run(str(folder), trainer_class=interrupted.interrupted("SIGINT SIGINT"))
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
    assert_resumes(folder, whole)


def test_a_full_disk_leaves_the_last_checkpoint(whole, tmp_path):
    """Files may grow to 100 bytes from the second save on, as `ulimit -f` allows."""
    folder = tmp_path / "run"
    folder.mkdir()

    class Full(DurableTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            if self.state.global_step == interrupted.KILLED_SAVE:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            super()._save_optimizer_and_scheduler(output_dir)

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails as on a full disk
    try:
        with pytest.raises(NoRoomError, match=rf"^{folder}/checkpoint-8 cannot be written: "):
            resumable.run(str(folder), trainer_class=Full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, before)
    assert checkpoints(folder) == ["checkpoint-4"] and not (folder / ".unfinished").exists()
    assert_resumes(folder, whole)


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    class Breaking(DurableTrainer):
        def training_step(self, model, *args, **kwargs):
            if self.state.global_step == resumable.KILLED_AFTER:
                with torch.no_grad():
                    model.get_input_embeddings().weight.fill_(float("nan"))
            return super().training_step(model, *args, **kwargs)

    with pytest.raises(FloatingPointError, match=r"by step 8\. The last whole checkpoint is .*checkpoint-4"):
        resumable.run(str(tmp_path), trainer_class=Breaking)
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_weights_from_gradients_that_are_not_finite_are_never_saved(tmp_path):
    """The loss of the eighth step is a number, its gradients are not; the weights of that step would be saved."""

    class Breaking(DurableTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == interrupted.KILLED_SAVE - 1:
                model.get_input_embeddings().weight.grad[0, 0] = float("inf")
            return loss

    with pytest.raises(FloatingPointError, match=r"gradients became NaN or infinite by step 8"):
        resumable.run(str(tmp_path), trainer_class=Breaking)
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_the_best_checkpoint_is_known_by_the_name_it_got(tmp_path):
    class Judged(DurableTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=kwargs["train_dataset"], **kwargs)

        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": 1.0 if self.state.global_step == 4 else 2.0}
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    trainer = resumable.run(
        str(tmp_path),
        trainer_class=Judged,
        eval_strategy="steps",
        eval_steps=4,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert "checkpoint-4" in checkpoints(tmp_path) and "checkpoint-8" not in checkpoints(tmp_path)
    best = SASGPTForCausalLM.from_pretrained(tmp_path / "checkpoint-4").named_parameters()
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in best)


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_that_cannot_be_gone_on_from(lost, tmp_path):
    """The stock Trainer takes a new optimizer and begins the schedule again, without a word."""
    resumable.run(str(tmp_path), trainer_class=DurableTrainer, save_only_model=lost == "optimizer.pt")
    (tmp_path / "checkpoint-9" / lost).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=f"checkpoint-9 lacks .*{lost}.* cannot go on from it"):
        resumable.run(str(tmp_path), trainer_class=DurableTrainer, resume=True)


def test_deepspeed_keeps_optimizer_and_schedule_in_a_folder_of_its_own(tmp_path):
    """As it leaves a checkpoint where the schedule is its own, too: the Trainer writes none of the two then."""
    (tmp_path / "trainer_state.json").touch()
    with pytest.raises(FileNotFoundError, match=r"lacks scheduler.pt, optimizer.pt"):
        _require_whole_state(tmp_path)
    (tmp_path / "global_step9").mkdir()
    _require_whole_state(tmp_path)


def test_a_training_that_has_reached_its_last_step_is_not_trained_on(whole, tmp_path):
    """As if killed after its last checkpoint; the stock Trainer takes a step more when it resumes there."""
    resumable.run(str(tmp_path), trainer_class=DurableTrainer, resume=True)
    (tmp_path / "model.safetensors").unlink()
    again = resumable.run(str(tmp_path), trainer_class=DurableTrainer, resume=True)
    assert again.state.global_step == resumable.STEPS and checkpoints(tmp_path)[-1] == "checkpoint-9"
    assert all(torch.equal(parameter, whole[name]) for name, parameter in again.model.named_parameters())
