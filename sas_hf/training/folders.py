"""Whose an output folder is: free, or of a run or study that wrote its declaration there."""

from pathlib import Path
from typing import Any, cast

from transformers import TrainingArguments

from ..report.files import LOCK_NAME, check_writable


METRICS_NAME = "all_results.json"
# Of a study's training that tried a learning rate: that it was too high.
DIVERGED_NAME = "diverged.json"


def holds(folder: Path, declaration: str, where: str, kind: str) -> bool:
    """
    Whether a folder holds a run or study; no: it is free.

    Args:
        declaration: file that a run or study writes first.
        where: begins the errors, such as "`output` is 'runs/a'".
        kind: "run" or "study".

    Raises:
        FileExistsError: for a file, or a folder that holds something else.
        PermissionError: where nothing can be written.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{where}, a file; name a folder.")
    check_writable(folder, where)
    # Looked at once: another process of the same launch may be about to write there.
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if declaration in names:
        return True
    if any(not name.startswith((".", LOCK_NAME)) for name in names):
        raise FileExistsError(f"{where}, which holds no {kind}; name a free folder.")
    return False


def has_trained(folder: Path) -> bool:
    """Whether a run's folder has a checkpoint or a result."""
    return any(folder.glob("checkpoint-*")) or has_ended(folder)


def output_folder(arguments: TrainingArguments) -> Path:
    """Where a run writes; Transformers names one where none is given."""
    return Path(cast(str, arguments.output_dir))


def has_ended(folder: Path) -> bool:
    """Whether a run's folder has a result, be it that it diverged where a study tried a learning rate."""
    return (folder / METRICS_NAME).is_file() or (folder / DIVERGED_NAME).is_file()


def flat(fields: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Fields inside of fields by their whole names, such as "model.config"; empty ones are values."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= flat(value, f"{where}{name}.") if isinstance(value, dict) and value else {where + name: value}
    return found


def differences(there: dict[str, Any], now: dict[str, Any], but: tuple[str, ...] = ()) -> str:
    """The flat fields in which two differ, as a sentence; "" where there are none."""
    names = sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name) and name not in but)
    return "; ".join(f"{name}: {there.get(name)!r} there, {now.get(name)!r} now" for name in names)
