"""Writing files so that a reader never meets half of one, no second writer is there meanwhile, and a full disk is
called so.
"""

import errno
import functools
import inspect
import os
import re
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout


# What file systems say that know no locks, such as Lustre and NFS as some are mounted.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
LOCK_NAME = "_lock"  # in a folder; the Trainer pushes no such name to the Hub
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "more than `ulimit -f` allows",
}
# How a failed write is told without an errno: by Rust (safetensors, tokenizers), by SQLite, by torch.save.
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
FAILED_WRITE = re.compile(
    r"database or disk is full|disk I/O error|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos"
)


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


Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def one_at_a_time(
    argument: str, in_place: bool = False, check: Callable[[Path], object] = lambda path: None
) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]:
    """Run a function inside of [`locked`], for the path that its argument of this name gives, if any; `check` may
    refuse the path in words of its own before."""

    def decorate(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def alone(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
            path = signature.bind(*args, **kwargs).arguments.get(argument)
            if path is None:
                return function(*args, **kwargs)
            check(Path(path))
            with locked(Path(path), f"`{argument}` is {str(path)!r}", in_place):
                return function(*args, **kwargs)

        return alone

    return decorate


class NoRoomError(OSError):
    """A file cannot be written for want of room: says which and how much is free; its cause is what was raised."""

    def __str__(self) -> str:
        return self.strerror or ""


@contextmanager
def writing(place: Path | None = None) -> Iterator[None]:
    """
    Turn the error of any library that finds no room to write into a [`NoRoomError`]; all others pass.

    Args:
        place: what is written. `None`: something in a cache or among the temporary files.
    """
    try:
        yield
    except Exception as error:
        known = next((link for link in _chain(error) if isinstance(link, NoRoomError)), None)
        if known is not None and known is not error:
            raise known from error
        number = next((number for link in _chain(error) if (number := _write_error(link))), None)
        if known is error or number is None:
            raise
        if number == errno.EIO and place is not None and _free(place) < 1:
            number = errno.ENOSPC
        reason = f"{os.strerror(number)} ({NO_ROOM.get(number) or str(error).splitlines()[0]})"
        if place is not None:
            said = f"{place} cannot be written: {reason}; {_free(place):,.1f} MB are free there now."
        else:
            from huggingface_hub.constants import HF_HOME

            caches = {"HF_HOME": Path(HF_HOME), "TMPDIR": Path(tempfile.gettempdir())}
            free = ", ".join(f"{_free(folder):,.1f} MB in {name} ({folder})" for name, folder in caches.items())
            said = f"A file cannot be written: {reason}. Free are {free}."
        raise NoRoomError(number, said) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:  # one that is raised from its own consequence goes in a circle
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _write_error(error: BaseException) -> int | None:
    """The errno of a write that found no room, EIO where the library does not tell it; `None` for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if found := RUST_ERROR.search(str(error)):
        number = int(found[1])
    if number in NO_ROOM:
        return number
    if isinstance(error, OSError) or not FAILED_WRITE.search(str(error)):
        return None
    return errno.ENOSPC if "disk is full" in str(error) else errno.EIO


def _free(place: Path) -> float:
    """Megabytes."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free / 1e6


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which becomes `path` when the block ends well; missing folders are made.

    Whatever goes wrong before the rename leaves the old file, or none, and no other trace.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
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
        tempfile.TemporaryFile(dir=there, prefix=".").close()  # where it has a name, not to be taken for content
    except OSError as error:
        raise PermissionError(f"{what}, but no file can be written into {there}: {error.strerror}.") from error
    return there


def unwritable_cache(error: BaseException) -> str | None:
    """What to say where an error comes from a cache of Hugging Face that cannot be written; `None` for others."""
    met = [Path(name) for link in _chain(error) if isinstance(name := getattr(link, "filename", None), str)]
    if not met:
        return None
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    caches = {"HF_HUB_CACHE": Path(HF_HUB_CACHE), "HF_HOME": Path(HF_HOME)}
    for name, folder in caches.items():
        if name in os.environ or name == "HF_HOME":
            try:
                if any(path in (folder, *folder.parents) or folder in path.parents for path in met):
                    check_cache(name, folder)
            except PermissionError as reason:
                return str(reason)
    return None


def check_cache(name: str, folder: Path) -> None:
    """Raise a `PermissionError` when no file can be written into the cache that this environment variable names."""
    try:
        check_writable(folder, f"{name} is {str(folder)!r}")
    except PermissionError as error:
        raise PermissionError(f"{error} Set {name} to a folder that can be written.") from error


def write_atomically(path: Path, content: bytes) -> None:
    """
    Write a file whole or not at all: `content` goes into a new one beside it, which takes its place when whole.

    Args:
        path: of the file; missing folders are made, and what was there is replaced.
        content: all of it.

    Raises:
        OSError: names the file, where its folder cannot be written or the disk is full. The old file stays.
    """
    with new_file(path) as unfinished:
        unfinished.write_bytes(content)
