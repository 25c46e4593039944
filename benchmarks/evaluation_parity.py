"""A source and its SAS conversion in `sas_hf`, and the source in the harness's own `hf`: the same numbers? How fast?

    python benchmarks/evaluation_parity.py SOURCE CONVERTED --data DIR [--questions 40] [--output DIR]

Scores the ten benchmarks of the paper's Tables 1 and 8 (or `--tasks`), the first `--questions` of each, of each of
MMLU's subjects `--mmlu-questions`: a deterministic subset. `hf` reads the same files in the form that the harness has
for it (tasks in a group of their own, with `data_files`). Compared are all log-likelihoods, request by request, in
these runs:

- source and SAS in `sas_hf`, automatic batches;
- source in `sas_hf` and in `hf` at the same batch size, where every bit should agree;
- source in `hf` at its default batch size, 1.

Throughput counts requests by the wall clock of scoring alone, without loading or building requests; run it on an idle
machine. With `--repeats` the runs of a pair alternate and the best of each counts.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from rich.console import Console

from sas_hf.eval import SASHFLM
from sas_hf.eval.task_loading import leaf_names, local_source, stock_config, task_manager
from sas_hf.report.tables import Grid


SUITES = ("sas_table1", "sas_table8")
SAME_BATCH_SIZE = 8


def harness_tasks(names: list[str], data: Path) -> list[dict]:
    """Tasks in the form in which the harness itself lets a stock task read another source."""
    tasks = []
    for name in dict.fromkeys(leaf_names(names)):
        config = stock_config(name)
        files = local_source(config, data)["dataset_kwargs"]["data_files"]
        splits = {field: config.get(field) for field in ("training_split", "validation_split", "test_split")}
        splits = {field: split if split in files else None for field, split in splits.items()}
        source = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        tasks.append({"task": name} | source | splits)
    return tasks


class Run:
    """One evaluation: log-likelihoods by request, metrics, and how long the scoring took."""

    def __init__(self, model: HFLM, tasks: list[dict], subset: dict[str, list[int]]):
        self.batches = 0
        with self._timed(model):
            report = simple_evaluate(
                model,
                tasks=[{"group": "benchmarks", "task": tasks}],
                samples=subset,
                num_fewshot=0,
                task_manager=task_manager(),
                bootstrap_iters=0,
            )
        self.metrics = {name: report["results"][name] for name in subset}
        self.answers = {
            (name, row["doc_id"], number): responses[0][0]
            for name, rows in report["samples"].items()
            for row in rows
            for number, responses in enumerate(row["resps"])
        }
        self.rate = len(self.answers) / self.seconds

    @contextmanager
    def _timed(self, model: HFLM) -> Iterator[None]:
        score, call = model._loglikelihood_tokens, model._model_call

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return score(*args, **kwargs)
            finally:
                self.seconds = time.perf_counter() - start

        def counted(*args, **kwargs):
            self.batches += 1
            return call(*args, **kwargs)

        model._loglikelihood_tokens, model._model_call = timed, counted
        try:
            yield
        finally:
            del model._loglikelihood_tokens, model._model_call


def difference(first: Run, second: Run, name: str | None = None) -> float:
    """The largest difference of two log-likelihoods, of one task or of all."""
    assert first.answers.keys() == second.answers.keys()
    keys = [key for key in first.answers if name in (None, key[0])]
    return max(abs(first.answers[key] - second.answers[key]) for key in keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("converted")
    parser.add_argument("--data", type=Path, required=True, help="as `sas-hf eval-data` makes it")
    parser.add_argument("--tasks", nargs="+", default=SUITES, help="suites, groups or tasks")
    parser.add_argument("--questions", type=int, default=40, help="of each benchmark")
    parser.add_argument("--mmlu-questions", type=int, default=1, help="of each subject")
    parser.add_argument("--batch-size", type=int, default=SAME_BATCH_SIZE, help="of the runs at the same batch size")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="folder for parity.md and parity.json")
    arguments = parser.parse_args()

    tasks = harness_tasks(arguments.tasks, arguments.data)
    loaded = task_manager().load([{"group": "benchmarks", "task": tasks}])["tasks"]
    subset = {}
    for name, task in loaded.items():
        wanted = arguments.mmlu_questions if name.startswith("mmlu_") else arguments.questions
        if wanted:
            subset[name] = list(range(min(wanted, len(task.eval_docs))))
    tasks = [task for task in tasks if task["task"] in subset]

    options = {"device": arguments.device, "dtype": arguments.dtype, "truncation": True}
    kinds = {
        "source, sas_hf, automatic batches": (SASHFLM, arguments.source, "auto"),
        "SAS, sas_hf, automatic batches": (SASHFLM, arguments.converted, "auto"),
        f"source, sas_hf, batches of {arguments.batch_size}": (SASHFLM, arguments.source, arguments.batch_size),
        f"source, hf, batches of {arguments.batch_size}": (HFLM, arguments.source, arguments.batch_size),
        "source, hf, batches of 1 (its default)": (HFLM, arguments.source, 1),
    }
    runs: dict[str, Run] = {}
    for _ in range(arguments.repeats):
        for label, (kind, model, batch_size) in kinds.items():
            run = Run(kind(str(Path(model).resolve()), batch_size=batch_size, **options), tasks, subset)
            if label not in runs or run.rate > runs[label].rate:
                runs[label] = run
    automatic, converted, same, own, default = runs.values()

    named = [name for name in subset if not name.startswith("mmlu_")]
    rows = [
        [
            name,
            str(len(subset[name])),
            metric.removesuffix(",none"),
            *(f"{run.metrics[name][metric]:.4f}" for run in (automatic, converted, own)),
            f"{difference(automatic, converted, name):.1e}",
            f"{difference(same, own, name):.1e}",
            f"{difference(automatic, own, name):.1e}",
        ]
        for name in named
        for metric in automatic.metrics[name]
        if metric in ("acc,none", "acc_norm,none")
    ]
    mmlu = [name for name in subset if name not in named]
    if mmlu:
        counts = [len(subset[name]) for name in mmlu]
        pooled = [
            sum(run.metrics[name]["acc,none"] * count for name, count in zip(mmlu, counts, strict=True)) / sum(counts)
            for run in (automatic, converted, own)
        ]
        pairs = ((automatic, converted), (same, own), (automatic, own))
        largest = [max(difference(*pair, name) for name in mmlu) for pair in pairs]
        rows.append(["mmlu", str(sum(counts)), "acc", *(f"{v:.4f}" for v in pooled), *(f"{v:.1e}" for v in largest)])
    scores = Grid(
        "The same questions in sas_hf and hf",
        ["task", "questions", "metric", "source", "SAS", "hf", "|source - SAS|", "|sas_hf - hf|", "|automatic - hf|"],
        rows,
        "Largest difference of a request's log-likelihood: source and SAS in automatic batches; sas_hf and hf at the "
        f"same batch size ({arguments.batch_size}); sas_hf in automatic batches and hf. The first questions of each "
        f"split, {len(automatic.answers):,} requests, zero-shot, {arguments.dtype} on {arguments.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}.",
    )
    speed = Grid(
        "Throughput",
        ["run", "batches", "seconds", "requests per second", "against hf at its default"],
        [
            [label, str(run.batches), f"{run.seconds:.1f}", f"{run.rate:.2f}", f"{run.rate / default.rate:.2f} x"]
            for label, run in runs.items()
        ],
        f"At the same batch size sas_hf runs at {same.rate / own.rate:.2f} times the speed of hf.",
    )
    for grid in (scores, speed):
        Console().print(grid.rich())
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "parity.md").write_text(f"{scores.markdown()}\n{speed.markdown()}")
        content = {
            "questions": {name: len(numbers) for name, numbers in subset.items()},
            "runs": {
                label: {"seconds": run.seconds, "requests": len(run.answers), "batches": run.batches}
                for label, run in runs.items()
            },
            "largest_differences": {
                "source and SAS": difference(automatic, converted),
                "sas_hf and hf, same batches": difference(same, own),
                "sas_hf, automatic batches, and hf": difference(automatic, own),
                "sas_hf, automatic batches, and hf one by one": difference(automatic, default),
            },
        }
        (arguments.output / "parity.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
