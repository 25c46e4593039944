"""Writing files so that a reader never meets half of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which becomes `path` when the block ends well; missing folders are made.

    Whatever goes wrong before the rename leaves the old file, or none, and no other trace.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(folder: Path, what: str) -> Path:
    """
    The folder itself or, where it is not there yet, the nearest one above it that is; nothing is made.

    Args:
        what: begins the error, such as "`output` is 'a.json'".

    Raises:
        PermissionError: when no file can be written there.
    """
    path = Path(folder).expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise PermissionError(f"{what}, but no file can be written into {there}: {error.strerror}.") from error
    return there


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` by [`new_file`]."""
    with new_file(path) as unfinished:
        unfinished.write_bytes(content)
