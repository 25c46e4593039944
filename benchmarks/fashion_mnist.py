"""Fashion-MNIST with every attention of the second paper, and SAS, at its MNIST configuration: table and curves.

    python benchmarks/fashion_mnist.py FOLDER_OF_IDX_FILES --workers 2

Each kind and seed is one run of examples/train_image_classifier.py in a process of its own, with the same recipe.
Finished runs are kept in `--runs`, interrupted ones go on from their last checkpoint. The results go to `--output`
(JSON), with a figure beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.progress import track
from rich.table import Table


matplotlib.use("agg")
from matplotlib import pyplot as plt


KINDS = ("standard", "optimised", "efficient", "super", "sas")
CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
HALF_EPOCH = 469  # steps
RECIPE = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 250,
    "learning_rate": 1.5e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # share of all steps
    "max_grad_norm": 1.0,
    "eval_strategy": "steps",
    "eval_steps": HALF_EPOCH,
    "save_strategy": "steps",
    "save_steps": HALF_EPOCH,
    "save_total_limit": 1,
    "logging_steps": 67,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "report_to": "none",
}


def run(data: Path, folder: Path, kind: str, seed: int, epochs: float) -> dict:
    """The result of one run, trained now if it is not there."""
    result = folder / "result.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).parents[1] / "examples" / "train_image_classifier.py"
        options = RECIPE | {"num_train_epochs": epochs, "seed": seed, "output_dir": folder, "class_names": CLASSES}
        command = [sys.executable, script, "--dataset", data, "--model", f"mnist-{kind}"]
        command += [part for name, value in options.items() for part in (f"--{name}", value)]
        with open(folder / "log.txt", "a") as log:
            subprocess.run([str(part) for part in command], stdout=log, stderr=log, check=True)
    return json.loads(result.read_text())


def summary(kind: str, seed: int, result: dict) -> dict:
    """What is kept of a run: its final scores, its time and its curve."""
    history = result["history"]
    return {
        "kind": kind,
        "seed": seed,
        "accuracy": result["eval_accuracy"],
        "top5_accuracy": result["eval_top5_accuracy"],
        "loss": result["eval_loss"],
        "parameters": result["parameters"],
        "curve": [
            {"epoch": row["epoch"], "accuracy": row["eval_accuracy"], "loss": row["eval_loss"]}
            for row in history
            if "eval_accuracy" in row
        ],
    }


def table(runs: list[dict]) -> Table:
    """A row per kind: means and standard deviations over the seeds."""
    shown = Table(title="Fashion-MNIST, 10,000 test images: mean ± standard deviation over seeds")
    for column in ("attention", "parameters", "seeds", "accuracy", "top-5", "loss"):
        shown.add_column(column, justify="left" if column == "attention" else "right")
    for kind in KINDS:
        of_kind = [run for run in runs if run["kind"] == kind]
        if not of_kind:
            continue
        cells = []
        for name, scale in (("accuracy", 100), ("top5_accuracy", 100), ("loss", 1)):
            values = [run[name] * scale for run in of_kind]
            deviation = f" ± {statistics.stdev(values):.{2 if scale > 1 else 4}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{2 if scale > 1 else 4}f}{deviation}")
        shown.add_row(kind, f"{of_kind[0]['parameters']:,}", str(len(of_kind)), *cells)
    return shown


def plot(runs: list[dict], path: Path) -> None:
    """Accuracy and loss on the test images over training: a line per kind, a band over its seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("accuracy", "loss"), strict=True):
        for kind in KINDS:
            curves = [run["curve"] for run in runs if run["kind"] == kind]
            if not curves:
                continue
            epochs = [point["epoch"] for point in curves[0]]
            columns = list(zip(*([point[name] for point in curve] for curve in curves), strict=True))
            (line,) = axis.plot(epochs, [statistics.mean(values) for values in columns], label=kind)
            lowest, highest = [min(values) for values in columns], [max(values) for values in columns]
            axis.fill_between(epochs, lowest, highest, alpha=0.2, color=line.get_color())
        axis.set(xlabel="epochs", ylabel=f"test {name}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-mnist"))
    parser.add_argument("--output", type=Path, default=Path("runs/fashion-mnist/fashion_mnist.json"))
    arguments = parser.parse_args()

    cells = list(product(arguments.seeds, arguments.kinds))
    with ThreadPoolExecutor(arguments.workers) as pool:
        results = pool.map(
            lambda cell: run(
                arguments.data, arguments.runs / f"{cell[1]}-{cell[0]}", cell[1], cell[0], arguments.epochs
            ),
            cells,
        )
        done = track(zip(cells, results, strict=True), "Training", total=len(cells))
        runs = [summary(kind, seed, result) for (seed, kind), result in done]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({"epochs": arguments.epochs, "recipe": RECIPE, "runs": runs}, indent=1) + "\n"
    )
    plot(runs, arguments.output.with_suffix(".png"))
    Console().print(table(runs))


if __name__ == "__main__":
    main()
