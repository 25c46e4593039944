"""Training and gradients on two gloo processes: `torchrun --nproc_per_node 2 two_processes.py FOLDER`.

Reads the models and inputs that equality.py left in FOLDER; each process writes what it got, `results-RANK.pt`.
"""

import sys
from pathlib import Path

import shared
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig


def sharded(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]


def whole(tensors: dict) -> dict:
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def fully_sharded(folder: Path) -> dict:
    model = shared.load(folder / "start", distributed_config=DistributedConfig(fsdp_size=2))
    names = sharded(model)
    assert names == [name for name, _ in model.named_parameters()]
    losses = shared.train(model, folder / "fsdp", shared.PROCESSES)
    assert sharded(model) == names
    model.save_pretrained(folder / "gathered")
    model.save_pretrained(folder / "shards", distributed_checkpoint=True)
    parameters = {name: tensor.detach() for name, tensor in whole(dict(model.named_parameters())).items()}
    return {"losses": losses, "sharded": names, "parameters": parameters}


def data_parallel(folder: Path) -> dict:
    model = shared.load(folder / "start")
    losses = shared.train(model, folder / "ddp", shared.PROCESSES)
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return {"losses": losses, "sharded": sharded(model), "parameters": parameters}


def tensor_parallel(folder: Path, variant: str, ids: torch.Tensor) -> dict:
    configuration = DistributedConfig(tp_size=2)
    model = shared.load(folder / variant, distributed_config=configuration, dtype=torch.float64)
    logits, gradients = shared.logits_and_gradients(model, ids)
    result = {"sharded": sharded(model), "logits": logits, "gradients": whole(gradients)}
    if variant in shared.GENERATE:
        result["generated"] = shared.greedy(model, ids[0])
        model.save_pretrained(folder / f"{variant}-gathered")
    return result


def pipeline(folder: Path, variant: str, ids: torch.Tensor) -> dict:
    configuration = DistributedConfig(pp_size=2)
    model = shared.load(folder / variant, distributed_config=configuration, dtype=torch.float64)
    held = [index for index, layer in enumerate(model.model.layers) if list(layer.parameters())]
    assert held == [dist.get_rank()]  # one layer of two
    with torch.no_grad():
        return {"logits": model(ids[0]).logits}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    ids = torch.load(folder / "inputs.pt")
    results = {"fsdp": fully_sharded(folder), "ddp": data_parallel(folder)}
    results["tp"] = {variant: tensor_parallel(folder, variant, ids) for variant in shared.TENSOR_PARALLEL}
    results["pp"] = {variant: pipeline(folder, variant, ids) for variant in shared.PIPELINE}
    assert dist.get_world_size() == 2
    assert dist.get_backend() == "gloo"
    torch.save(results, folder / f"results-{dist.get_rank()}.pt")
    dist.destroy_process_group()
