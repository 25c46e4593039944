"""Figures that are kept in a file as they are measured, so that none is measured twice."""

import json
from pathlib import Path
from typing import Any

from .files import write_atomically


def kept_figures(path: Path | None, settings: dict[str, Any], where: str) -> dict[str, Any]:
    """What the file holds, `{"settings": ..., "figures": ...}`, or no figures yet.

    Args:
        path: `None` where nothing is kept.
        settings: under which they are measured, plain JSON.
        where: begins the errors, such as "--output a.json".

    Raises:
        ValueError: if it was measured under other settings, or is no such file.
    """
    if path is None or not path.exists():
        return {"settings": settings, "figures": {}}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        held, _ = results["settings"], results["figures"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} exists and is no file of figures: choose another.") from error
    for name, value in settings.items():
        if held.get(name) != value:
            raise ValueError(
                f"{where} holds figures with {name} {held.get(name)!r}, not {value!r}: choose another, or the same "
                "setting."
            )
    return results


def keep_figures(path: Path | None, results: dict[str, Any]) -> None:
    """Write them, if they are kept."""
    if path is not None:
        write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
