"""What the machine has: control groups of both versions limit the memory, and a group without a limit does not."""

import psutil
import pytest
import torch

from sas_hf.report import machine
from sas_hf.report.machine import available_memory, control_groups, processor, total_memory


CPU = torch.device("cpu")


def write(folder, names, maximum, used, statistics):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (maximum, used), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{statistics}\n")


def test_control_groups_of_version_2(tmp_path):
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("0::/job/step\n")
    names = ("max", "current")
    assert list(control_groups(root, membership)) == []
    write(root / "job" / "step", names, "max", 500, "inactive_file 0")
    assert list(control_groups(root, membership)) == []
    write(root / "job", names, 1000, 700, "inactive_file 200")
    assert list(control_groups(root, membership)) == [(1000, 500)]
    write(root / "job" / "step", names, 300, 250, "inactive_file 0")
    assert list(control_groups(root, membership)) == [(300, 250), (1000, 500)]
    assert list(control_groups(root, tmp_path / "missing")) == []


def test_control_groups_of_version_1(tmp_path):
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("3:cpu:/job\n2:memory:/job\n")
    names = ("limit_in_bytes", "usage_in_bytes")
    write(root / "memory" / "job", names, 1000, 700, "total_inactive_file 200")
    write(root / "memory", names, 9223372036854771712, 700, "total_inactive_file 0")  # without a limit
    assert list(control_groups(root, membership)) == [(1000, 500)]


def test_a_limit_is_the_memory_that_there_is(monkeypatch):
    assert 0 < available_memory(CPU) <= psutil.virtual_memory().total
    monkeypatch.setattr(machine, "control_groups", lambda root: iter([(3000, 1000), (2500, 2000)]))
    assert available_memory(CPU) == 500
    assert total_memory(CPU) == 2500 + psutil.swap_memory().total
    monkeypatch.setattr(machine, "control_groups", lambda root: iter([(3000, 4000)]))
    assert available_memory(CPU) == 0


@pytest.mark.parametrize("measure", [available_memory, total_memory])
def test_of_other_devices_nothing_is_known(measure):
    assert measure(torch.device("meta")) is None


def test_the_processor_has_a_name():
    assert processor()
