"""Where the time of a training step goes: products of matrices, softmax, other passes over memory, for each model.

    python benchmarks/cost_profile.py --models mha sas sas-kept sas-k5 --layers 2 --vocabulary 1024

The profiler's times of every operation (those it calls left out), summed by kind, for one forward and backward pass of
the whole model; the quickest of several passes. The first column of ratios is of the whole step, the last of the
products alone, convolutions among them: what would be left if every other pass over memory were free. Both are to the
first model's whole step. Names of models: cost_rivals.py.
"""

import argparse
import time

import torch
from cost_measures import Training, silence
from cost_rivals import backbone, make_config, make_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from sas_hf.report.turns import take_turns


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_")
CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::mkldnn_convolution_backward", "aten::convolution_backward")
CONVOLUTIONS += ("aten::_slow_conv2d_forward", "aten::_slow_conv2d_backward", "mkldnn_convolution_backward")
ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)
KINDS = {"products": PRODUCTS, "convolutions": CONVOLUTIONS, "PyTorch's attention": ATTENTION}
COLUMNS = (*KINDS, "softmax", "other passes")


def kind_of(operation: str) -> str:
    for kind, names in KINDS.items():
        if operation in names:
            return kind
    return "softmax" if "softmax" in operation else "other passes"


class Product:
    """One large product of matrices."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype):
        self.matrices = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]

    def __call__(self) -> None:
        torch.mm(*self.matrices)

    def reset(self) -> None:
        pass


def best_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large product of matrices."""
    times = take_turns({"product": Product(size, device, dtype)}, 8, lambda *_: None, device)
    return 2 * size**3 / min(times["product"])


def measure(job: Training, rounds: int) -> tuple[float, dict[str, float], float]:
    """Milliseconds of the quickest pass and of its kinds of operations, and the operations in its products."""
    best = None
    for turn in range(rounds + 1):
        profiler = profile(activities=[ProfilerActivity.CPU], with_flops=True)
        with silence():
            profiler.start()
        start = time.perf_counter()
        job()
        whole = 1000 * (time.perf_counter() - start)
        with silence():
            profiler.stop()
        job.reset()
        if turn and (best is None or whole < best[0]):
            kinds = dict.fromkeys(COLUMNS, 0.0)
            for event in profiler.key_averages():
                if event.key.startswith(("aten::", "mkldnn")):
                    kinds[kind_of(event.key)] += event.self_cpu_time_total / 1000
            flops = sum(event.flops for event in profiler.key_averages() if event.key in PRODUCTS)
            best = whole, kinds, flops
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mha", "sas", "sas-kept", "sas-k5", "paper"])
    parser.add_argument("--size", default="125m")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=4, help="after one for warming up")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    shared = backbone(arguments.layers, arguments.vocabulary, arguments.length)
    try:
        for name in arguments.models:
            make_config(name, arguments.size, **shared)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)
    rate = best_rate(2048, torch.device("cpu"), torch.float32)
    ids = torch.randint(arguments.vocabulary, (1, arguments.length))
    table = Table(title=f"Milliseconds of a training step; one large product runs at {rate / 1e9:.0f} GFLOP/s")
    table.add_column("")
    for column in ("step", "ratio", *COLUMNS, "GFLOP", "GFLOP/s", "products alone"):
        table.add_column(column, justify="right")
    first = None
    for name in track(arguments.models, description="profiling", transient=True):
        job = Training(make_model(name, arguments.size, **shared), ids)
        whole, times, flops = measure(job, arguments.rounds)
        speed = flops / times["products"] / 1e6 if times["products"] else 0.0
        first = first or whole
        alone = sum(times[kind] for kind in KINDS) / first
        cells = [f"{times[kind]:.0f}" for kind in COLUMNS] + [f"{flops / 1e9:.0f}", f"{speed:.0f}", f"{alone:.2f}"]
        table.add_row(name, f"{whole:.0f}", f"{whole / first:.2f}", *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
