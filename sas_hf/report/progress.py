"""A bar over long work, for people alone: where nobody looks at a terminal or a notebook, nothing is written."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track


Item = TypeVar("Item")


def bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """
    The items, with a bar while they are gone through, which vanishes in the end.

    Args:
        total: how many there are, where `items` does not know.
    """
    console = Console(stderr=True)
    hidden = not (console.is_terminal or console.is_jupyter)
    return track(items, description, total=total, console=console, transient=True, disable=hidden)
