"""Memory of training on a CPU: what is freed is kept for the next step, instead of given back and fetched anew."""

import ctypes
import os
import platform


# glibc's malloc.h. The same from outside, for any program: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# What says that somebody has chosen already.
CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """
    Ask this process's malloc to keep what is freed.

    A step frees and allocates the same large tensors; glibc returns each to the system and has it zeroed again, which
    on some machines takes longer than to compute what goes in (docs/cost.md has the figures). The process then holds
    its largest need to its end. For CPU tensors alone: a GPU's memory is PyTorch's own matter.

    Returns:
        whether it was asked: not on other systems, with other allocators, or where the environment chooses.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in CHOICES):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, -1))


def give_freed_memory_back() -> None:
    """Once: what reading and tokenizing needed, which is many times the text, a training does not need again."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
