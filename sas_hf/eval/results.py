"""What an evaluation returns: metrics per task and all that is needed to repeat it, as JSON or as a table."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from .files import write_atomically


@dataclass
class Metric:
    """A value and its standard error, `None` where the harness gives none (one sample, some metrics)."""

    value: float
    stderr: float | None


@dataclass
class TaskResult:
    """
    One task.

    Attributes:
        metrics: by the harness's name ("acc", "acc_norm"), with the filter where there is one ("exact_match,strict").
        num_samples: how many samples were scored, of `num_available` in the split.
        split: the split evaluated.
        data: the file or the dataset on the Hub that it was read from.
        num_fewshot: examples shown before each question.
        version: the task's own.
        samples: with `log_samples`, a dictionary per sample: `doc_id`, `doc_hash`, `prompt_hash`, `target`, the
            metrics, and `responses`, one per request: `[log-likelihood, is greedy]`, or the text generated.
    """

    metrics: dict[str, Metric]
    num_samples: int
    num_available: int
    split: str
    data: str
    num_fewshot: int
    version: str | float | None
    samples: list[dict] | None = None


@dataclass
class EvaluationResult:
    """
    One evaluation of one model.

    Attributes:
        model: path, Hub id, or the class of a live model.
        num_parameters: of the model, tied weights counted once.
        tasks: results by task.
        groups: aggregated metrics by group of tasks, for groups that define them.
        limit: as given.
        batch_size: "requested", and the "smallest" and "largest" batch of the run (its tasks share batches).
        dtype, device: what the model ran in and on.
        versions: of lm_eval, transformers, torch and sas_hf.
        seconds: wall time of building the requests and scoring them, without loading the model.
    """

    model: str
    num_parameters: int
    tasks: dict[str, TaskResult]
    groups: dict[str, dict[str, Metric]]
    limit: int | float | None
    batch_size: dict[str, int | str]
    dtype: str
    device: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain dictionaries, ready for JSON; numbers that are not finite become `None`."""
        return _finite(asdict(self))

    def save(self, path: str | Path) -> None:
        """Write [`to_dict`] as JSON; a reader finds the old file or the whole new one."""
        content = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(Path(path), (content + "\n").encode())


def results_table(result: EvaluationResult) -> Table:
    """A table for `rich.print`: a row per task and metric, then the groups."""
    sizes = sorted({result.batch_size["smallest"], result.batch_size["largest"]})
    table = Table(
        title=f"{result.model} ({result.num_parameters:,} parameters)",
        caption=f"{result.dtype} on {result.device}, batches of {' to '.join(map(str, sizes))}, "
        f"{result.seconds:.0f} s, " + ", ".join(f"{name} {number}" for name, number in result.versions.items()),
    )
    for header in ("task", "split", "samples", "shots", "metric", "value", "± stderr"):
        justify = "right" if header in ("samples", "shots", "value", "± stderr") else "left"
        table.add_column(header, justify=justify, overflow="fold")
    for name, task in result.tasks.items():
        row = (name, task.split, str(task.num_samples), str(task.num_fewshot))
        _add_metrics(table, row, task.metrics)
    for name, metrics in result.groups.items():
        _add_metrics(table, (name, "", "", ""), metrics)
    return table


def _add_metrics(table: Table, row: tuple[str, ...], metrics: dict[str, Metric]) -> None:
    for metric, score in metrics.items():
        table.add_row(*row, metric, f"{score.value:.4f}", "" if score.stderr is None else f"{score.stderr:.4f}")
        row = ("",) * len(row)
    table.add_section()


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
