"""Score a source and its SAS conversion on the same questions and compare them request by request.

python benchmarks/evaluation_parity.py SOURCE CONVERTED --tasks arc_easy --data DIR
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sas_hf.eval import EvaluationResult, evaluate


def log_likelihoods(result: EvaluationResult, task: str) -> list[float]:
    samples = sorted(result.tasks[task].samples, key=lambda sample: sample["doc_id"])
    return [response[0] for sample in samples for response in sample["responses"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("converted")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()

    results = [
        evaluate(model, arguments.tasks, data=arguments.data, limit=arguments.limit, log_samples=True)
        for model in (arguments.source, arguments.converted)
    ]
    table = Table(title=f"{arguments.source} and {arguments.converted}")
    columns = ("task", "questions", "requests", "metric", "source", "SAS", "max |log-likelihood difference|")
    for column in columns:
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    figures = []
    for task in results[0].tasks:
        source, converted = (log_likelihoods(result, task) for result in results)
        difference = max(abs(a - b) for a, b in zip(source, converted, strict=True))
        for metric, score in results[0].tasks[task].metrics.items():
            other = results[1].tasks[task].metrics[metric]
            questions = results[0].tasks[task].num_samples
            figures.append(
                dict(
                    zip(
                        columns,
                        (task, questions, len(source), metric, score.value, other.value, difference),
                        strict=True,
                    )
                )
            )
            table.add_row(
                task,
                str(questions),
                str(len(source)),
                metric,
                f"{score.value:.4f}",
                f"{other.value:.4f}",
                f"{difference:.2g}",
            )
    table.caption = "; ".join(
        f"{name}: batches of {result.batch_size['smallest']} to {result.batch_size['largest']}, {result.seconds:.0f} s"
        for name, result in zip(("source", "SAS"), results, strict=True)
    )
    Console().print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
