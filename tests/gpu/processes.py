"""A few steps on one or more processes: `torchrun --nproc_per_node N processes.py FOLDER DEVICE`, by DDP and FSDP2.

Reads the model and the batch that test_gpu_distributed.py left in FOLDER; process 0 writes what became of the weights.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sas_hf import SASGPTForCausalLM


STEPS, RATE = 3, 0.5


def train(model: torch.nn.Module, rows: torch.Tensor) -> None:
    """Plain gradient descent on the mean loss of all rows."""
    for _ in range(STEPS):
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in model.named_parameters():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name.removeprefix("module.")] = tensor.detach().double().cpu()
    return found


def main(folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rows = torch.load(folder / "rows.pt").chunk(size)[rank].to(device)
    results = {}
    for way in ("ddp", "fsdp2"):
        model = SASGPTForCausalLM.from_pretrained(folder).to(device).train()
        if way == "ddp":
            model = DistributedDataParallel(model, device_ids=[rank] if device == "cuda" else None)
        else:
            mesh = dist.device_mesh.init_device_mesh(device, (size,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        train(model, rows)
        results[way] = whole(model)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
