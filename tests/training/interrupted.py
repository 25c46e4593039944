"""A short training run that is killed inside a save or told to end: `python interrupted.py FOLDER MOMENT`."""

import os
import signal
import sys

import resumable

from sas_hf.training import DurableTrainer


KILLED_SAVE = 2 * resumable.SAVE_EVERY
MOMENTS = ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "before the rename", "_finish"]


def interrupted(moment: str) -> type[DurableTrainer]:
    """A trainer that is killed at its second save: after that method, or before the rename."""

    class Interrupted(DurableTrainer):
        def training_step(self, *args, **kwargs):
            if moment.startswith("SIG") and self.state.global_step == resumable.KILLED_AFTER:
                for told in moment.split():
                    os.kill(os.getpid(), getattr(signal, told))
            return super().training_step(*args, **kwargs)

        def _finish(self, *args):
            if moment == "before the rename":
                kill(self)
            super()._finish(*args)

    def kill(trainer):
        if trainer.state.global_step == KILLED_SAVE:
            os.kill(os.getpid(), signal.SIGKILL)

    if hasattr(DurableTrainer, moment):
        original = getattr(Interrupted, moment)

        def then_killed(self, *args, **kwargs):
            original(self, *args, **kwargs)
            kill(self)

        setattr(Interrupted, moment, then_killed)
    return Interrupted


if __name__ == "__main__":
    resumable.run(sys.argv[1], trainer_class=interrupted(sys.argv[2]), resume=True)
