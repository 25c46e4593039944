"""Two models on the same questions: the mean difference and how sure one can be of it."""

import math
from dataclasses import dataclass

from scipy.stats import t as student_t

from ..report.translation import SAMPLES, score_differences
from .results import EvaluationResult, TaskResult, is_text, is_translation


METHOD = (
    "difference of the two models' scores question by question (window by window); standard error from their sample "
    "variance, 95 % confidence interval by Student's t; an average over columns has the root of the columns' summed "
    "squares over their number, and the t of the column with the fewest questions; of BLEU and chrF, sacrebleu's "
    f"paired bootstrap ({SAMPLES:,} resamples: standard error, interval between percentiles 2.5 and 97.5, and p)"
)
# Bits per byte that two models must differ by in a window: less is the rounding of float32.
BITS_ROUNDING = 1e-6


@dataclass(frozen=True)
class PairedDifference:
    """
    Attributes:
        name: a suite and its column ("sas_table1: ARC-E"), its average, or a task and its metric ("piqa: acc").
        difference: mean of second minus first, in the metric's unit.
        stderr: of the difference; `None` for one question.
        low, high: ends of its 95 % confidence interval.
        num_samples: questions that both answered, or windows of a text that both read.
        unit: of the three numbers: "share" of one, "bits per byte", "nats" of a loss, or "of 100" (BLEU and chrF).
        p_value: of sacrebleu's paired bootstrap, for BLEU and chrF.
    """

    name: str
    difference: float
    stderr: float | None
    low: float | None
    high: float | None
    num_samples: int
    unit: str = "share"
    p_value: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def compare(first: EvaluationResult, second: EvaluationResult) -> list[PairedDifference]:
    """
    Paired differences, second minus first, for every suite's column and average and every other task's metrics.

    Tasks that only one has, those without a score per question, and texts that the models cut into different windows
    or tokens are left out.

    Raises:
        ValueError: when a task of both did not ask the same questions in the same words.
    """
    shared = {name: task for name, task in first.tasks.items() if name in second.tasks}
    different = {name for name, task in shared.items() if task.questions != second.tasks[name].questions}
    for name in different:
        if not is_text(shared[name]):
            raise ValueError(
                f"{first.model} and {second.model} were asked different questions in task {name!r} (data, limit or "
                "examples differ); evaluate them alike to compare them."
            )
    found, in_suites = [], set()
    for name in (name for name in first.suites if name in second.suites):
        cells = []
        for label, column in first.suites[name].columns.items():
            if label not in second.suites[name].columns:
                continue
            in_suites |= set(column.tasks)
            cells.append(_difference(f"{name}: {label}", first, second, column.tasks, column.metric))
        found += cells
        if cells and len(cells) == len(first.suites[name].columns) == len(second.suites[name].columns):
            found.append(_average(name, cells))
    for name in (name for name in shared if name not in different | in_suites):
        if is_translation(shared[name]):
            found += _of_translations(name, shared[name], second.tasks[name])
            if shared[name].details["tokens"] != second.tasks[name].details["tokens"]:
                continue  # what is predicted token by token is not the same
        metrics = [metric for metric in first.tasks[name].scores if metric in second.tasks[name].scores]
        found += [_difference(f"{name}: {metric}", first, second, [name], metric) for metric in metrics]
    return found


def _difference(
    name: str, first: EvaluationResult, second: EvaluationResult, tasks: list[str], metric: str
) -> PairedDifference:
    differences = [
        b - a
        for task in tasks
        for a, b in zip(first.tasks[task].scores[metric], second.tasks[task].scores[metric], strict=True)
    ]
    unit = {"bits_per_byte": "bits per byte", "loss": "nats"}.get(metric, "share")
    if metric == "bits_per_byte":
        differences = [value if abs(value) > BITS_ROUNDING else 0.0 for value in differences]
    count = len(differences)
    mean = math.fsum(differences) / count
    stderr = None
    if count > 1:
        stderr = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (count - 1) / count)
    return _interval(name, mean, stderr, count, count, unit)


def _of_translations(name: str, first: TaskResult, second: TaskResult) -> list[PairedDifference]:
    ours, theirs = ([sample["hypothesis"] for sample in task.samples or ()] for task in (first, second))
    references = [sample["reference"] for sample in first.samples or ()]
    return [
        PairedDifference(
            f"{name}: {metric}",
            found.difference,
            found.stderr,
            found.low,
            found.high,
            len(references),
            "of 100",
            found.p_value,
        )
        for metric, found in score_differences(ours, theirs, references, first.details["language"]).items()
    ]


def _average(suite: str, cells: list[PairedDifference]) -> PairedDifference:
    stderrs = [cell.stderr for cell in cells if cell.stderr is not None]
    stderr = None if len(stderrs) < len(cells) else math.sqrt(math.fsum(value**2 for value in stderrs)) / len(cells)
    mean = math.fsum(cell.difference for cell in cells) / len(cells)
    counts = [cell.num_samples for cell in cells]
    return _interval(f"{suite}: average", mean, stderr, sum(counts), min(counts))


def _interval(
    name: str, mean: float, stderr: float | None, count: int, fewest: int, unit: str = "share"
) -> PairedDifference:
    reach = None if stderr is None else float(student_t.ppf(0.975, fewest - 1)) * stderr
    low, high = (None, None) if reach is None else (mean - reach, mean + reach)
    return PairedDifference(name, mean, stderr, low, high, count, unit)
