"""Writing files so that a reader never meets half of one."""

import os
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


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` by [`new_file`]."""
    with new_file(path) as unfinished:
        unfinished.write_bytes(content)
