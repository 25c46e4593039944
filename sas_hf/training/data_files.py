"""What the files of a run's data are, so that it never goes on with others, be their names the same."""

import glob
import hashlib
from functools import cache
from pathlib import Path

from .recipe_fields import DataRecipe


# Of each end of a file: enough to tell two apart, and read at once where they are large.
BYTES_READ = 1 << 20


def describe_files(data: DataRecipe) -> dict[str, str]:
    """The files behind `train` and `validation`, each as one line: their number, bytes and a sum over names, sizes and
    both ends of each. What is not on this disk (a dataset of the Hub, the text that CPython brings) is left out."""
    found = {}
    for field in ("train", "validation"):
        entries = getattr(data, field) or []
        files = [file for entry in ([entries] if isinstance(entries, str) else entries) for file in _files(entry)]
        if files:
            size, total = 0, hashlib.sha256()
            for name, path in files:
                status = path.stat()
                size += status.st_size
                total.update(f"{name}\0{status.st_size}\0".encode() + _ends(path, status.st_size, status.st_mtime_ns))
            number = "1 file" if len(files) == 1 else f"{len(files):,} files"
            found[field] = f"{number} of {size:,} bytes, sum {total.hexdigest()[:16]}"
    return found


@cache
def _ends(path: Path, size: int, changed: int) -> bytes:
    """A sum over both ends of a file, which is read once: all runs of a study are of the same."""
    with path.open("rb") as file:
        total = hashlib.sha256(file.read(BYTES_READ))
        file.seek(max(BYTES_READ, size - BYTES_READ))
        total.update(file.read(BYTES_READ))
    return total.digest()


def _files(entry: str) -> list[tuple[str, Path]]:
    """Name and place of each; names are those in a folder, which may be moved."""
    place = Path(entry).expanduser()
    if place.is_dir():
        return [(str(path.relative_to(place)), path) for path in sorted(place.rglob("*")) if path.is_file()]
    places = [place] if place.is_file() else map(Path, sorted(glob.glob(str(place), recursive=True)))
    return [(path.name, path) for path in places if path.is_file()]
