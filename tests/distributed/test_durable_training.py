"""A training of two processes that is killed inside a save goes on to the weights of an uninterrupted one."""

from pathlib import Path

from equality import torchrun
from safetensors.torch import load_file


HERE = Path(__file__).parent


def test_two_processes_killed_inside_a_save(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert torchrun(HERE / "whole_then_killed.py", str(tmp_path)).returncode != 0
    assert (whole / "model.safetensors").exists()
    assert sorted(path.name for path in killed.iterdir()) == [".unfinished", "_lock", "checkpoint-4"]
    # Each process has a random state of its own, which dropout reads.
    states = sorted(path.name for path in killed.glob("checkpoint-4/rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]

    resumed = torchrun(HERE.parent / "training" / "interrupted.py", str(killed), "never")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert not (killed / ".unfinished").exists() and not (killed / "_lock").exists()
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
