"""The tasks: of each what it asks of attention, how a batch is made, and by how much a model errs.

A task is the same at several levels, such as the number of things to fetch. A batch is what a model of models.py is
called with; all of it is drawn from the generator that is given.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


LENGTH = 16  # of what the continuous tasks read
WORDS = 32  # in the alphabets of tokens
NOISE = 16
LETTERS = 8  # of "copying", few: neighbours repeat, so that what stands where decides
RUN = 8  # tokens that return in "induction"

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        asks: of attention, in a few words.
        level_name: what its levels count.
        heads: by level, the number of heads around which it is tried.
        make_batch: `(level, rows, generator)`.
        vocab_size: of tokens; `None` where a sequence is of vectors.
        chance: by level, the error of who reads nothing.
        solved: errors below are called so.
        forms: of simulation, beside that of heads (variants.py).
        steps, rows: of a training, and sequences of a step.
        head_dim: by level, where a level decides it.
    """

    name: str
    asks: str
    level_name: str
    levels: tuple[int, ...]
    heads: Callable[[int], int]
    make_batch: Callable[[int, int, torch.Generator], Batch]
    vocab_size: int | None
    chance: Callable[[int], float]
    solved: float
    forms: tuple[str, ...]
    steps: int
    rows: int
    head_dim: Callable[[int], int | None] = lambda level: None

    @property
    def error_name(self) -> str:
        return "squared error over the variance" if self.vocab_size is None else "share of wrong answers"

    def error(self, answered: Iterable[tuple[ModelOutput, Batch]]) -> float:
        """
        By how much a model's outputs are off, over several batches as one.

        Of vectors: the squared error over the variance of what is asked for. Of tokens: the share of answers that are
        wrong, with half a one added, so that no error is zero.
        """
        if self.vocab_size is None:
            pairs = [(output["logits"], batch["labels"]) for output, batch in answered]
            predicted, vectors = (torch.cat(side) for side in zip(*pairs, strict=True))
            return (((predicted - vectors) ** 2).sum() / ((vectors - vectors.mean(0)) ** 2).sum()).item()
        wrong = answers = 0.0
        for output, batch in answered:
            wanted = batch["labels"][:, 1:]
            asked = wanted.ne(-100)
            wrong += ((output["logits"][:, :-1].argmax(-1) != wanted) & asked).sum().item()
            answers += asked.sum().item()
        return (wrong + 0.5) / (answers + 1)


def fetch(things: int, rows: int, generator: torch.Generator) -> Batch:
    """`y = Σ_i max_t x_{t,i}` over so many features: each maximum is elsewhere (arXiv:2510.06662)."""
    sequence = torch.randn(rows, LENGTH, things, generator=generator)
    return {"sequence": sequence, "labels": sequence.amax(1).sum(-1, keepdim=True)}


def nearest(features: int, rows: int, generator: torch.Generator) -> Batch:
    """Points of a space of so many dimensions with a value each: that of the point nearest to a query. A product of
    query and point alone does not know it; with the point's length it does, a square that no linear map gives."""
    points = torch.randn(rows, LENGTH, features, generator=generator)
    query = torch.randn(rows, 1, features, generator=generator)
    values = torch.randn(rows, LENGTH, 1, generator=generator)
    place = (points - query).square().sum(-1, keepdim=True).argmin(1)
    labels = values.squeeze(-1).gather(1, place)
    return {"sequence": torch.cat((points, values), dim=-1), "query": query, "labels": labels}


def recall(pairs: int, rows: int, generator: torch.Generator) -> Batch:
    """`k v k v ...`, then all keys once more in another order, each with its value: which value follows a key."""
    keys = _without_repetition(WORDS, pairs, rows, generator)
    values = torch.randint(WORDS, 2 * WORDS, (rows, pairs), generator=generator)
    order = _without_repetition(pairs, pairs, rows, generator)
    told = torch.stack((keys, values), dim=-1).flatten(1)
    asked = torch.stack((keys.gather(1, order), values.gather(1, order)), dim=-1).flatten(1)
    labels = asked.clone()
    labels[:, ::2] = -100
    return {"input_ids": torch.cat((told, asked), dim=1), "labels": _answers(told, labels)}


def induction(distance: int, rows: int, generator: torch.Generator) -> Batch:
    """A run of words, that comes again after a gap of at most so much noise: which word follows another. Noise that is
    not between stands in front, so that places tell nothing."""
    run = _without_repetition(WORDS, RUN, rows, generator)
    ids = torch.randint(WORDS, WORDS + NOISE, (rows, 2 * RUN + distance), generator=generator)
    gap = torch.randint(distance + 1, (rows, 1), generator=generator)
    first = distance - gap + torch.arange(RUN)
    again = ids.shape[1] - RUN
    ids.scatter_(1, first, run)
    ids[:, again:] = run
    labels = run.clone()
    labels[:, 0] = -100  # nothing says that it begins
    return {"input_ids": ids, "labels": _answers(ids[:, :again], labels)}


def copying(length: int, rows: int, generator: torch.Generator) -> Batch:
    """So many letters, a bar, and the same letters again. Few letters, so that what follows one is not known by it."""
    letters = torch.randint(LETTERS, (rows, length), generator=generator)
    told = torch.cat((letters, torch.full((rows, 1), LETTERS)), dim=1)
    return {"input_ids": torch.cat((told, letters), dim=1), "labels": _answers(told, letters)}


def _without_repetition(of: int, count: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    """`[rows, count]`, each row without repetition."""
    return torch.rand(rows, of, generator=generator).argsort(-1)[:, :count]


def _answers(told: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Labels of a whole row: nothing is asked of what is told first."""
    return torch.cat((torch.full_like(told, -100), labels), dim=1)


TASKS = {
    task.name: task
    for task in (
        Task(
            "fetch",
            "the sum of D maxima, each of which is elsewhere: D things at once",
            "things",
            (4, 8),
            lambda things: things,
            fetch,
            None,
            lambda things: 1.0,
            0.03,
            ("features", "values", "id", "concat"),
            steps=2000,
            rows=128,
        ),
        Task(
            "mqar",
            "the value that stood behind a key, for every key",
            "pairs",
            (4, 8),
            lambda pairs: 4,
            recall,
            2 * WORDS,
            lambda pairs: 1 - 1 / WORDS,
            0.05,
            ("features", "values", "id", "concat"),
            steps=1000,
            rows=64,
        ),
        Task(
            "nearest",
            "the point nearest to a query, by heads of few features",
            "features",
            (2, 4, 8),
            lambda features: 4,
            nearest,
            None,
            lambda features: 1.0,
            0.1,
            ("features", "features-id", "values", "id", "concat"),
            steps=2000,
            rows=128,
            head_dim=lambda features: features,
        ),
        Task(
            "induction",
            "what followed the same word earlier, over a gap",
            "distance",
            (8, 24),
            lambda distance: 4,
            induction,
            WORDS + NOISE,
            lambda distance: 1 - 1 / WORDS,
            0.05,
            ("features", "values", "id", "concat"),
            steps=1000,
            rows=64,
        ),
        Task(
            "copying",
            "the letter at the same place of what was read",
            "letters",
            (16, 32),
            lambda letters: 4,
            copying,
            LETTERS + 1,
            lambda letters: 1 - 1 / LETTERS,
            0.05,
            ("features", "values", "id", "concat"),
            steps=500,
            rows=32,
        ),
    )
}


def find_task(name: str) -> Task:
    """
    Raises:
        ValueError: for an unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; known are {', '.join(TASKS)}.")
    return TASKS[name]
