"""What an evaluation returns: metrics per task and all that is needed to repeat it, as dictionaries and JSON.

Not all of it comes from lm-evaluation-harness: perplexities and image classification are tasks of the same form.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from ..report.files import write_atomically
from ..version import versions


@dataclass
class Metric:
    """A value and its standard error, `None` where there is none (one sample, some metrics)."""

    value: float
    stderr: float | None


@dataclass
class TaskResult:
    """
    One task. What does not apply to it is `None` or empty.

    Attributes:
        metrics: by the harness's name ("acc", "acc_norm"), with the filter where there is one ("exact_match,strict").
        num_samples: how many samples were scored, of `num_available` in the split. The first ones, where fewer; images
            in a shuffled order.
        split: the split evaluated.
        data: the file or the dataset on the Hub that it was read from.
        num_fewshot: examples shown before each question.
        version: the task's own.
        fewshot_split: where the examples came from.
        notes: what differs from the stock task, in words.
        scores: by metric, one number per sample in the order of the data, for metrics that are their mean.
        questions: digest of the samples and their prompts; equal digests were asked the same.
        details: more on what was done, such as a perplexity's context length, stride and tokens; of multiple choice
            the `chance`, the accuracy of who guesses.
        samples: with `log_samples`, a dictionary per sample: `doc_id`, `doc_hash`, `prompt_hash`, `target`, the
            metrics, and `responses`, one per request: `[log-likelihood, is greedy]`, or the text generated. Of a
            translation always: `source`, `reference`, `translation`, and the reference's `loss` per token.
    """

    metrics: dict[str, Metric]
    num_samples: int
    num_available: int
    split: str
    data: str
    num_fewshot: int | None
    version: str | float | None
    fewshot_split: str | None = None
    notes: list[str] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    questions: str | None = None
    details: dict = field(default_factory=dict)
    samples: list[dict] | None = None


def is_text(task: TaskResult) -> bool:
    """Whether it is a text's perplexity at one context length."""
    return "context_length" in task.details  # the harness has tasks with a metric "perplexity", such as LAMBADA


def chance_of(tasks: Iterable[TaskResult]) -> float | None:
    """The accuracy of who guesses, over all samples of these tasks; `None` where it is not known of one."""
    tasks = list(tasks)
    if not tasks or any("chance" not in task.details for task in tasks):
        return None
    return sum(t.details["chance"] * t.num_samples for t in tasks) / sum(t.num_samples for t in tasks)


def is_translation(task: TaskResult) -> bool:
    """Whether it holds translations of pairs, whose BLEU is of all of them together."""
    return "signatures" in task.details and task.samples is not None


@dataclass
class SuiteColumn:
    """A column of a suite: the metric it shows, its value in per cent of one, and the tasks that it is made of."""

    metric: str
    score: Metric
    num_samples: int
    tasks: list[str]


@dataclass
class SuiteResult:
    """
    A suite of a paper.

    Attributes:
        columns: by the paper's label.
        average: plain mean of the columns.
        complete: whether all columns of the suite are there, so that the average is the paper's.
        version: the suite's own.
    """

    columns: dict[str, SuiteColumn]
    average: Metric
    complete: bool
    version: str | float | None


@dataclass
class EvaluationResult:
    """
    One evaluation of one model.

    Attributes:
        model: path, Hub id, or the class of a live model.
        num_parameters: of the model, tied weights counted once.
        tasks: results by task.
        dtype, device: what the model ran in and on.
        batch_size: "requested", and the "smallest" and "largest" batch of the run (its tasks share batches).
        seconds: wall time of building the requests and scoring them, without loading the model.
        versions: of lm_eval, transformers, torch and sas_hf.
        groups: aggregated metrics by group of tasks, for groups that define them.
        suites: the papers' suites among the groups, column by column.
        limit: as given.
        adapter: peft adapter on the model.
        beginning_of_text: "token": what stands before a text without context; "always": whether the tokenizer puts
            its own before every text; "requested": as given.
        max_length: tokens of the model's context.
        num_truncated: requests cut to it.
        num_reused: requests whose answer an earlier run had kept.
        num_processes: that shared the work.
        unused_weights: of the checkpoint, by name: those that the model of its configuration does not have.
        step: training step of the checkpoint, from its folder's name or `trainer_state.json`.
    """

    model: str
    num_parameters: int
    tasks: dict[str, TaskResult]
    dtype: str
    device: str
    batch_size: dict[str, int | str]
    seconds: float
    versions: dict[str, str]
    groups: dict[str, dict[str, Metric]] = field(default_factory=dict)
    suites: dict[str, SuiteResult] = field(default_factory=dict)
    limit: int | float | None = None
    adapter: str | None = None
    beginning_of_text: dict | None = None
    max_length: int | None = None
    num_truncated: int = 0
    num_reused: int = 0
    num_processes: int = 1
    unused_weights: list[str] = field(default_factory=list)
    step: int | None = None

    def to_dict(self) -> dict:
        """Plain dictionaries, ready for JSON; numbers that are not finite become `None`."""
        return finite(asdict(self))

    @classmethod
    def from_dict(cls, content: dict) -> "EvaluationResult":
        """The inverse of [`to_dict`].

        Raises:
            ValueError: for a dictionary of another form.
        """
        try:
            tasks = {
                name: TaskResult(**task | {"metrics": _scores(task["metrics"])})
                for name, task in _of(content, "tasks")
            }
            groups = {name: _scores(metrics) for name, metrics in _of(content, "groups")}
            suites = {name: _suite(suite) for name, suite in _of(content, "suites")}
            return cls(**content | {"tasks": tasks, "groups": groups, "suites": suites})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This is not the result of an evaluation: {type(error).__name__}: {error}.") from error

    def save(self, path: str | Path) -> None:
        """Write [`to_dict`] as JSON; a reader finds the old file or the whole new one."""
        save_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResult":
        """Read what [`save`] wrote; a `ValueError` for anything else, a `FileNotFoundError` for no file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is no file; give what `sas-hf eval --output` wrote.")
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).rstrip('.')}; give what `sas-hf eval --output` wrote.") from error


def one_task_result(
    model: PreTrainedModel,
    task: str,
    found: TaskResult,
    *,
    name: str,
    limit: int | float | None,
    requested: int | str,
    size: int,
    start: float,
    library: str,
    output: str | Path | None,
    num_truncated: int = 0,
) -> EvaluationResult:
    """
    The result of an evaluation of one task, written to `output` if there is one.

    Args:
        task, found: its name and its result.
        name: of the model.
        limit: as given.
        requested, size: samples at a time, as given and as it was.
        start: when the scoring began, by `time.perf_counter`.
        library: whose version counts, beside those that always do.
        num_truncated: samples that were cut.
    """
    result = EvaluationResult(
        model=name,
        num_parameters=model.num_parameters(),
        tasks={task: found},
        limit=limit,
        batch_size={"requested": requested, "smallest": size, "largest": size},
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        num_truncated=num_truncated,
        seconds=time.perf_counter() - start,
        versions=versions(library),
    )
    if output is not None:
        result.save(output)
    return result


def perplexities(result: EvaluationResult) -> dict[int, TaskResult]:
    """Tasks of perplexity by context length."""
    return {task.details["context_length"]: task for task in result.tasks.values() if is_text(task)}


def save_json(path: Path, content: dict | list) -> None:
    """Write JSON, a line for each list of numbers; a reader finds the old file or the whole new one."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # A line break inside a string is written \n, so real ones are the layout's.
    text = re.sub(r"\[\n\s+([-+.\deE,\s]+?)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_atomically(path, (text + "\n").encode())


def digest(parts: Iterable[str]) -> str:
    """Short, and equal for equal parts: by it two results know that they are of the same questions."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def finite(value):
    """Numbers that are not finite, which JSON does not know, become `None`."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _of(content: dict, name: str):
    return content.get(name, {}).items()


def _scores(metrics: dict) -> dict[str, Metric]:
    return {name: Metric(**metric) for name, metric in metrics.items()}


def _suite(content: dict) -> SuiteResult:
    columns = {
        label: SuiteColumn(**column | {"score": Metric(**column["score"])})
        for label, column in content["columns"].items()
    }
    return SuiteResult(**content | {"columns": columns, "average": Metric(**content["average"])})
