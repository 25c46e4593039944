"""Is it the same on two processes as on one? `python tests/distributed/equality.py` prints the table.

Real gloo processes on the CPU; what they must agree with is computed here, in one.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))  # helpers, also where no pytest put it there

import shared
import torch
from helpers import gpt, gpt_config, python_environment, train_tokenizer
from rich.console import Console
from rich.table import Table
from transformers import distributed

from sas_hf import SASGPTForCausalLM


@dataclass
class Row:
    """One comparison: the largest |difference| in any process, the largest entry to see it against, the DTensors."""

    difference: float
    scale: float
    sharded: list[str]


def torchrun(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script in two processes, at a rendezvous of their own."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(shared.PROCESSES),
    ]
    return subprocess.run(
        [*command, str(script), *arguments], env=python_environment(), capture_output=True, text=True
    )


def compare(found: list[dict], expected: dict, sharded: Iterable[str] = ()) -> Row:
    """Compare the tensors that each process found with the expected ones, by name."""
    differences = []
    for tensors in found:
        if tensors.keys() != expected.keys():
            raise ValueError(f"{sorted(tensors.keys() ^ expected.keys())} are on one side only.")
        differences += [(tensors[name] - tensor).abs().max().item() for name, tensor in expected.items()]
    return Row(max(differences), max(tensor.abs().max().item() for tensor in expected.values()), list(sharded))


def detached(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def prepare(folder: Path) -> torch.Tensor:
    """Write the models that all processes start from; returns the token ids."""
    torch.manual_seed(0)
    config = gpt_config("sas_k5_gqa", vocab_size=len(train_tokenizer()), initializer_range=0.02)
    SASGPTForCausalLM(config).save_pretrained(folder / "start")
    for variant in shared.TENSOR_PARALLEL:
        gpt(variant).double().save_pretrained(folder / variant)
    ids = shared.inputs()
    torch.save(ids, folder / "inputs.pt")
    return ids


def measure(folder: Path) -> dict[str, Row]:
    """Every comparison by its name; the models stay in `folder`."""
    ids = prepare(folder)
    run = torchrun(Path(__file__).with_name("two_processes.py"), str(folder))
    if run.returncode != 0:
        raise RuntimeError(f"The two processes failed:\n{run.stderr[-4000:]}")
    results = [torch.load(folder / f"results-{rank}.pt") for rank in range(shared.PROCESSES)]
    rows = training_rows(folder, results)
    rows |= tensor_parallel_rows(folder, [result["tp"] for result in results], ids)
    return rows | pipeline_rows(folder, [result["pp"] for result in results], ids)


def training_rows(folder: Path, results: list[dict]) -> dict[str, Row]:
    model = shared.load(folder / "start")
    losses = {"losses": torch.tensor(shared.train(model, folder / "one", processes=1), dtype=torch.float64)}
    rows = {}
    for kind, title in (("ddp", "DDP"), ("fsdp", "FSDP2")):
        found = [result[kind] for result in results]
        curves = [{"losses": torch.tensor(one["losses"], dtype=torch.float64)} for one in found]
        rows[f"{title}: losses of {shared.STEPS} steps"] = compare(curves, losses, found[0]["sharded"])
        weights = [one["parameters"] for one in found]
        rows[f"{title}: weights after them"] = compare(weights, detached(model), found[0]["sharded"])

    trained = results[0]["fsdp"]["parameters"]
    distributed.consolidate_distributed_checkpoint(folder / "shards", folder / "consolidated")
    shutil.copy(folder / "shards" / "config.json", folder / "consolidated")
    for saved in ("gathered", "consolidated"):
        loaded = detached(shared.load(folder / saved))
        rows[f"FSDP2: saved {saved}, loaded by one process"] = compare([loaded], trained)
    return rows


def tensor_parallel_rows(folder: Path, results: list[dict], ids: torch.Tensor) -> dict[str, Row]:
    rows = {}
    for variant in shared.TENSOR_PARALLEL:
        found = [result[variant] for result in results]
        model = shared.load(folder / variant, dtype=torch.float64)
        logits, gradients = shared.logits_and_gradients(model, ids)
        sharded = found[0]["sharded"]
        rows[f"TP {variant}: logits"] = compare([one["logits"] for one in found], logits, sharded)
        rows[f"TP {variant}: gradients"] = compare([one["gradients"] for one in found], gradients, sharded)
        if variant in shared.GENERATE:
            generated = [{"ids": one["generated"]} for one in found]
            rows[f"TP {variant}: generated ids"] = compare(generated, {"ids": shared.greedy(model, ids[0])}, sharded)
            loaded = detached(shared.load(folder / f"{variant}-gathered", dtype=torch.float64))
            rows[f"TP {variant}: saved, loaded by one process"] = compare([loaded], detached(model))
    return rows


def pipeline_rows(folder: Path, results: list[dict], ids: torch.Tensor) -> dict[str, Row]:
    rows = {}
    for variant in shared.PIPELINE:
        model = shared.load(folder / variant, dtype=torch.float64)
        with torch.no_grad():
            expected = {"logits": model(ids[0]).logits}
        rows[f"PP {variant}: logits"] = compare(
            [{"logits": result[variant]["logits"]} for result in results], expected
        )
    return rows


def print_table(rows: dict[str, Row]) -> None:
    table = Table("compared with one process", "max |difference|", "largest entry", "DTensors")
    for name, row in rows.items():
        table.add_row(name, f"{row.difference:.1e}", f"{row.scale:.3g}", str(len(row.sharded) or ""))
    Console(width=120).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        print_table(measure(Path(temporary)))
