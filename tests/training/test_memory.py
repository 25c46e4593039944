"""Freed memory is kept where it is asked to be, and the environment's choice is respected."""

import subprocess
import sys

import pytest
from helpers import python_environment

from sas_hf.training.memory import CHOICES


PROGRAM = """
import resource, sys, torch
from sas_hf.training.memory import keep_freed_memory

def steps(count):
    for _ in range(count):
        tensors = [torch.empty(8 << 20).fill_(1) for _ in range(4)]
        del tensors

print(keep_freed_memory() if sys.argv[1] == "keep" else False)
steps(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(keep: str, **environment: str) -> tuple[bool, int]:
    """Whether memory was asked to be kept, and how many pages twenty steps fetched anew."""
    clean = {name: value for name, value in python_environment().items() if name not in CHOICES}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, keep], env=clean | environment, capture_output=True, text=True, check=True
    )
    asked, pages = process.stdout.split()
    return asked == "True", int(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is asked")
def test_freed_memory_is_kept():
    asked, kept = run("keep")
    if not asked:
        pytest.skip("another malloc than glibc's")
    _, fetched = run("leave")
    assert kept < fetched / 4


def test_the_environment_has_chosen():
    assert not run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is asked")
def test_memory_that_is_kept_is_given_back_once():
    program = """
import psutil, torch
from sas_hf.training.memory import give_freed_memory_back, keep_freed_memory

held = lambda: psutil.Process().memory_info().rss
asked = keep_freed_memory()
small = [torch.ones(1 << 20) for _ in range(50)]
last = torch.ones(1 << 20)  # above the others, so that they are not the heap's end
del small
kept = held()
give_freed_memory_back()
print(asked, kept - held())
"""
    clean = {name: value for name, value in python_environment().items() if name not in CHOICES}
    process = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    asked, given = process.stdout.split()
    if asked == "False":
        pytest.skip("another malloc than glibc's")
    assert int(given) > 150 << 20
