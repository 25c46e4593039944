"""What a recipe can train: one object a task, a module each. How to add one is in CONTRIBUTING.md."""

from ..fields import check_names
from .chat import Chat
from .image_classification import ImageClassification
from .language_modeling import LanguageModeling
from .masked_language_modeling import MaskedLanguageModeling
from .task import Metric, Task
from .text_classification import TextClassification
from .translation import Translation


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        LanguageModeling(),
        Chat(),
        ImageClassification(),
        MaskedLanguageModeling(),
        TextClassification(),
        Translation(),
    )
}
"""Every task, by the name that a recipe's `task` gives it."""

__all__ = ["TASKS", "Metric", "Task", "find_task"]


def find_task(name: str) -> Task:
    """The task that a recipe names; a ValueError with the nearest known one where there is none of that name."""
    check_names([name], TASKS, kind="no `task` of a recipe")
    return TASKS[name]
