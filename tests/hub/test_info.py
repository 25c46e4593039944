"""`sas-hf info`: named configurations and checkpoints, counted without allocating them."""

import resource

import pytest
from helpers import gpt, sas_hf


def test_a_large_configuration_needs_no_memory():
    run = sas_hf("info", "sas-10.6b")
    assert run.returncode == 0, run.stderr
    assert "10,644,637,904" in run.stdout and "40 -> 120 of 128 -> 192" in run.stdout
    # All children of the tests so far stayed far below the 42 GB of its weights.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4e6


def test_a_checkpoint_is_described(tmp_path):
    gpt("sas").save_pretrained(tmp_path)
    run = sas_hf("info", tmp_path, "--context", "32")
    assert run.returncode == 0, run.stderr
    assert "4 -> 12 of 8 -> 12" in run.stdout and "context 32" in run.stdout


def test_all_names_are_listed():
    run = sas_hf("info")
    assert run.returncode == 0, run.stderr
    assert "mla-sas-125m" in run.stdout and "imdb-super" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"), [(["sas-125"], "sas-125m"), (["sas-125m", "--dtype", "int4"], "floating-point")]
)
def test_mistakes_are_explained(arguments, message):
    run = sas_hf("info", *arguments)
    assert run.returncode == 1
    assert message in run.stderr and "Traceback" not in run.stderr
