"""How much memory is free."""

from pathlib import Path

import psutil
import torch


def available_memory(device: torch.device) -> int:
    """Bytes free on `device`; for the CPU within the control group's limit, where there is one (containers)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, control_group_memory())


def control_group_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that the process's Linux control groups (version 2) leave it; a large number where there is no limit."""
    free = 1 << 62
    try:
        groups = [line.removeprefix("0::/") for line in membership.read_text().splitlines() if line.startswith("0::/")]
    except OSError:
        return free
    for group in groups:
        folder = root / group
        while folder.is_relative_to(root):
            try:
                limit = (folder / "memory.max").read_text().strip()
                used = int((folder / "memory.current").read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # no limits at this level
                limit = "max"
            if limit != "max":
                # Pages of files read are counted as used, but given up when memory is short.
                free = min(free, max(0, int(limit) - used + int(statistics["inactive_file"])))
            folder = folder.parent
    return free
