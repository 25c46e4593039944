"""What a measurement is made on: processor, memory within the limits of the process's control groups, versions."""

import datetime
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from ..version import __version__


CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # bytes; what control groups write where there is no limit


def available_memory(device: torch.device) -> int | None:
    """Bytes free on a GPU or a CPU, swap not among them; `None` on other devices, where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    left = [max(0, limit - used) for limit, used in control_groups(CGROUPS)]
    return min([psutil.virtual_memory().available, *left])


def total_memory(device: torch.device) -> int | None:
    """Bytes of a GPU, or of a CPU swap included; `None` on other devices, where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    limits = [limit for limit, _ in control_groups(CGROUPS)]
    return min([psutil.virtual_memory().total, *limits]) + psutil.swap_memory().total


def control_groups(root: Path, membership: Path = Path("/proc/self/cgroup")) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each Linux control group with a limit that this process is in, of either version."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        version = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = top / place.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                limit, used = ((folder / f"memory.{name}").read_text(encoding="ascii").strip() for name in version)
                statistics = dict(map(str.split, (folder / "memory.stat").read_text(encoding="ascii").splitlines()))
            except OSError:  # seen from inside of a container
                continue
            if limit != "max" and int(limit) < UNLIMITED:
                # Pages of files read are counted as used, but given up when memory is short.
                cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
                yield int(limit), int(used) - int(cached)


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """What a measurement was made on."""
    cuda = device is not None and device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sas_hf": __version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def environment_text(made: dict[str, Any]) -> str:
    """The same, in part of a sentence."""
    threads = f"{made['threads']} of {made['cores']} cores"
    return f"{made['device']}, {threads}, torch {made['torch']}, transformers {made['transformers']}"
