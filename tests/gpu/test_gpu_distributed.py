"""DDP and FSDP2 on NCCL, on one process and on two, train as one process does in float64 on the CPU."""

import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from against_cpu import FIELDS
from helpers import gpt, python_environment, token_ids


def torchrun(count: int, folder: Path, device: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += [processes.__file__, str(folder), device]
    finished = subprocess.run(command, env=python_environment(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.parametrize(
    ("device", "count"), [("cpu", 2), *(pytest.param("cuda", count, marks=pytest.mark.gpu) for count in (1, 2))]
)
def test_processes_train_as_one(device, count, tmp_path):
    if device == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, and this machine has {torch.cuda.device_count()}")
    model, rows = gpt("sas", **FIELDS), token_ids(4, 32)
    model.save_pretrained(tmp_path)
    torch.save(rows, tmp_path / "rows.pt")
    started = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    torchrun(count, tmp_path, device)

    definition = gpt("sas", **FIELDS, attn_implementation="eager").double().train()
    definition.load_state_dict(model.state_dict())
    processes.train(definition, rows)
    expected = processes.whole(definition)
    for way, found in torch.load(tmp_path / "results.pt").items():
        assert found.keys() == expected.keys()
        moved = sum((expected[name] - started[name]).square().sum() for name in expected).sqrt()
        missed = sum((expected[name] - found[name]).square().sum() for name in expected).sqrt()
        assert missed < 0.01 * moved, f"{way}: {missed / moved:.2g} of what training moved"
