"""Log-likelihoods on disk as they are computed, so that a killed evaluation goes on where it stopped."""

import hashlib
import json
import math
import sqlite3
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..report.files import writing
from ..version import versions


# Log-likelihood of the continuation, and whether it is what greedy decoding would give.
Answer = tuple[float, bool]


class AnswerStore:
    """
    Answers by the token ids of their requests, for one model under one set of numerical settings.

    Every process writes a file of its own, one transaction per batch, and reads those of all: SQLite leaves whole
    batches behind whenever the process ends.

    Args:
        folder: is made where it is missing; stores of other models may lie in it.
        identity: all that the numbers depend on but the tokens; see [`model_identity`].
        process_index: of this process among those that share the work.
    """

    def __init__(self, folder: str | Path, identity: dict, process_index: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(identity | versions(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = folder / f"{digest}.{process_index}.sqlite"
        self._answers: dict[bytes, Answer] = {}
        for path in sorted(folder.glob(f"{digest}.*.sqlite")):
            with _connect(path) as connection:
                rows = connection.execute("SELECT request, value, greedy FROM answers")
                self._answers |= {key: (value, bool(greedy)) for key, value, greedy in rows}
            connection.close()
        self._connection = _connect(self.path)

    def get(self, numbers: Iterable[int], requests: Sequence, softmax: object = None) -> dict[int, Answer]:
        """Answers at hand among the requests of these numbers, whose softmax was computed in this dtype."""
        keyed = ((number, _key(requests[number], softmax)) for number in numbers)
        return {number: self._answers[key] for number, key in keyed if key in self._answers}

    def put(self, answers: dict[int, Answer], requests: Sequence, softmax: object = None) -> None:
        """Keep the answers to the requests of these numbers, all or none."""
        # Not a number is an error of this run, not an answer for the next.
        numbers = [number for number, (value, _) in answers.items() if math.isfinite(value)]
        rows = [(_key(requests[number], softmax), *answers[number]) for number in numbers]
        with writing(self.path), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._connection.close()


def answers_of(folder: str | Path, source: str, adapter: str | None) -> Path:
    """What an evaluation locks in the folder: all answers of one model, so that others may be evaluated meanwhile."""
    return Path(folder) / hashlib.sha256(f"{source}\n{adapter}".encode()).hexdigest()[:16]


def model_identity(source: str, adapter: str | None, commit: str | None, settings: dict) -> dict:
    """What tells a model's answers from another's: files by size and times, or the commit on the Hub, and settings.

    The time of the last change of any kind is among them: unlike that of the last writing, no copying sets it back.
    """
    return {"model": _fingerprint(source), "adapter": adapter and _fingerprint(adapter), "commit": commit} | settings


def _fingerprint(source: str) -> list:
    folder = Path(source)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    states = [(path.name, path.stat()) for path in files]
    return [source, *([name, state.st_size, state.st_mtime_ns, state.st_ctime_ns] for name, state in states)]


def _connect(path: Path) -> sqlite3.Connection:
    with writing(path):
        connection = sqlite3.connect(path)
    try:
        with writing(path), connection:
            connection.execute("CREATE TABLE IF NOT EXISTS answers (request BLOB PRIMARY KEY, value REAL, greedy INT)")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ValueError(f"{path} is not a store of answers ({error}); remove it or choose another folder.") from error
    return connection


def _key(request: tuple, softmax: object) -> bytes:
    _, context, continuation = request
    tokens = array("q", [len(context), *context, *continuation]).tobytes()
    return hashlib.blake2b(tokens, digest_size=16, salt=str(softmax or "")[-16:].encode()).digest()
