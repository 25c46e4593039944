"""Writing files so that a reader never meets half of one, and no second writer is there meanwhile."""

import errno
import functools
import inspect
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


# What file systems say that know no locks, such as Lustre and NFS as some are mounted.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
LOCK_NAME = "_lock"  # in a folder; the Trainer pushes no such name to the Hub


@contextmanager
def locked(path: Path, where: str, in_place: bool = False) -> Iterator[None]:
    """
    Refuse every other process that would write to `path`, for as long as the block lasts.

    The lock is the operating system's (`flock`) and ends with its process, however that ends; on NFS it holds between
    machines. Its file is `.NAME.lock` beside `path`, or `_lock` in a folder that is written `in_place`; it goes with
    the block, and is in nobody's way where a killed process left it. The same thread may lock again inside the block;
    of the processes of one launch (torchrun, accelerate) the first locks for all.

    Args:
        path: a file, or a folder; missing folders above are made, and go again if nothing came into them.
        where: begins the errors, such as "`output` is 'runs/a'".

    Raises:
        BlockingIOError: when another process holds the lock; names it.
        FileExistsError: for a folder to be written in place that is a file.
        PermissionError: when nothing can be written there.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = path.absolute()
    if in_place and path.exists() and not path.is_dir():
        raise FileExistsError(f"{where}, a file; name a folder.")
    file = path / LOCK_NAME if in_place else path.parent / f".{path.name}.lock"
    check_writable(file.parent, where)
    made = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(file, where):
            yield
    finally:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # not empty
                break


@contextmanager
def _lock(file: Path, where: str) -> Iterator[None]:
    lock = FileLock(file, is_singleton=True, blocking=False, on_acquired=_sign)
    outermost = not lock.is_locked
    try:
        lock.acquire()
    except Timeout as error:
        try:
            holder = file.read_text().strip()
        except OSError:
            holder = ""
        raise BlockingIOError(
            f"{where}, where {holder or 'another process'} is at work; wait for its end, or name another place."
        ) from error
    except PermissionError as error:  # another user's
        raise PermissionError(f"{where}, but its lock {file} cannot be taken: {error.strerror}.") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{where}, on a file system without locks ({error.strerror}): nothing keeps another process from writing "
            "there too.",
            stacklevel=2,
        )
        yield
        return
    try:
        yield
    finally:
        if outermost:  # while it is held: who waits for this very file sees that it is gone
            file.unlink(missing_ok=True)
        lock.release()


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # a full disk is not the lock's affair
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def one_at_a_time(argument: str, in_place: bool = False) -> Callable[[Callable], Callable]:
    """Run a function inside of [`locked`], for the path that its argument of this name gives, if any."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def alone(*args, **kwargs):
            path = signature.bind(*args, **kwargs).arguments.get(argument)
            if path is None:
                return function(*args, **kwargs)
            with locked(Path(path), f"`{argument}` is {str(path)!r}", in_place):
                return function(*args, **kwargs)

        return alone

    return decorate


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
