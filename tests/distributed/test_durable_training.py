"""A training of two processes that is killed inside a save goes on to the weights of an uninterrupted one."""

import sys
from pathlib import Path

from equality import torchrun
from safetensors.torch import load_file


TRAINING = Path(__file__).parents[1] / "training"
sys.path.insert(0, str(TRAINING))

import interrupted  # noqa: E402


def test_two_processes_killed_inside_a_save(tmp_path):
    script = Path(interrupted.__file__)
    whole = torchrun(script, str(tmp_path / "whole"), "never")
    assert whole.returncode == 0, whole.stderr[-2000:]
    folder = tmp_path / "run"
    assert torchrun(script, str(folder), "_save_rng_state").returncode != 0
    assert sorted(path.name for path in folder.iterdir()) == [".unfinished", "checkpoint-4"]
    # Each process has a random state of its own, and dropout reads it.
    assert sorted(path.name for path in folder.glob("checkpoint-4/rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]

    resumed = torchrun(script, str(folder), "never")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert not (folder / ".unfinished").exists()
    expected, found = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", folder))
    assert expected.keys() == found.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
