"""The two environments, made once, and a checkpoint with its answers."""

from pathlib import Path

import pytest
from answered_checkpoints import save_checkpoint
from environments import make_environment, run_script


@pytest.fixture(scope="session")
def python_without(tmp_path_factory) -> Path:
    """The Python of an environment in which sas_hf cannot be imported."""
    python = make_environment(tmp_path_factory.mktemp("without") / "venv", with_package=False)
    run = run_script(python, "import sas_hf", home=python.parent)
    assert "ModuleNotFoundError: No module named 'sas_hf'" in run.stderr
    return python


@pytest.fixture(scope="session")
def python_with(tmp_path_factory) -> Path:
    """The Python of an environment with sas_hf."""
    return make_environment(tmp_path_factory.mktemp("with") / "venv", with_package=True)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_checkpoint("sas_k5_gqa", tmp_path / "model")
    return tmp_path / "model"
