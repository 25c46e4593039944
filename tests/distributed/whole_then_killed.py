"""One training to its end, then the same one killed inside a save: `torchrun ... whole_then_killed.py FOLDER`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import resumable
from interrupted import interrupted

from sas_hf.training import DurableTrainer


if __name__ == "__main__":
    resumable.run(f"{sys.argv[1]}/whole", trainer_class=DurableTrainer)
    resumable.run(f"{sys.argv[1]}/killed", trainer_class=interrupted("_save_rng_state"))
