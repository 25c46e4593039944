"""The papers' suites: groups of the harness's stock tasks whose columns and average are those of a printed table.

A suite is a group in `tasks/` whose `metadata` names its columns: label, stock task (or group) and metric.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from lm_eval.api.group import Group
from lm_eval.api.metrics import unweighted_mean_stderr
from lm_eval.tasks import TaskManager


SHIPPED_TASKS = Path(__file__).parent / "tasks"
# By the papers' label of a column, what its questions are.
ASKED = {
    "ARC-E": "school science, mostly of four choices: what word statistics answer",
    "ARC-C": "school science, mostly of four choices: what word statistics do not",
    "BoolQ": "yes or no to a question, by a passage that is given",
    "HellaSwag": "which of four texts goes on with an everyday scene",
    "OBQA": "school science of four choices, by a fact and common sense",
    "PIQA": "which of two ways reaches a practical goal",
    "WinoGrande": "which of two names belongs in a gap, by common sense",
    "MMLU": "exams in 57 subjects, of four choices",
    "SciQ": "science exams of four choices, with a passage that helps",
    "SocialIQA": "what people want, feel or do next, of three choices",
}


@dataclass
class SuiteGroup(Group):
    """A group whose one metric, "average", is the plain mean of its columns, as the papers print it."""

    @property
    def columns(self) -> dict[str, dict[str, str]]:
        """`{label: {"task": name of a task or group, "metric": "acc" or "acc_norm"}}`."""
        return self.metadata["columns"]

    @property
    def has_aggregation(self) -> bool:
        return True

    def aggregate(self, task_metrics: dict) -> dict:
        # Called by the harness with every metric by task and group, the groups below this one included.
        cells = [(task_metrics[column["task"]], column["metric"]) for column in self.columns.values()]
        values = [metrics[f"{metric},none"] for metrics, metric in cells]
        stderrs = [metrics[f"{metric}_stderr,none"] for metrics, metric in cells]
        count = sum(task_metrics[task.task_name]["sample_len"] for task in self.get_all_tasks())
        return {
            "alias": self.alias or self.name,
            "name": self.name,
            "sample_len": count,
            "average,none": sum(values) / len(values),
            "average_stderr,none": "N/A" if "N/A" in stderrs else unweighted_mean_stderr(stderrs),
            "sample_count": {"average,none": count},
        }


class SuiteTaskManager(TaskManager):
    """The harness's index of tasks with the shipped ones in it; suites it loads average their columns."""

    def __init__(self, *args, include_path: str | Path | list[str | Path] | None = None, **kwargs):
        given = include_path or []
        given = [given] if isinstance(given, (str, Path)) else given
        super().__init__(*args, include_path=[SHIPPED_TASKS, *given], **kwargs)

    def load(self, task_list) -> dict:
        loaded = super().load(task_list)
        loaded["groups"] = {name: _as_suite(group) for name, group in loaded["groups"].items()}
        return loaded


def is_suite(config: dict) -> bool:
    """Whether a group's configuration names columns."""
    return isinstance(config.get("metadata"), dict) and "columns" in config["metadata"]


def select_columns(config: dict, columns: list[str]) -> dict:
    """The configuration of a suite with these columns only, in the suite's order.

    Raises:
        ValueError: for a column that the suite does not have.
    """
    known = config["metadata"]["columns"]
    for label in columns:
        if label not in known:
            raise ValueError(f"`columns`: {config['group']!r} has no column {label!r}; it has {', '.join(known)}.")
    kept = {label: column for label, column in known.items() if label in columns}
    tasks = [column["task"] for column in kept.values()]
    return config | {"task": tasks, "metadata": config["metadata"] | {"columns": kept, "all_columns": len(known)}}


def _as_suite(group: Group) -> Group:
    if isinstance(group, SuiteGroup) or not is_suite({"metadata": group.metadata}):
        return group
    return SuiteGroup(**{field.name: getattr(group, field.name) for field in fields(Group)})
