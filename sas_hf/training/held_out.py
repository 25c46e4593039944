"""What is validated on must not be trained on: compared by name, by file and by content."""

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..data.text_files import same_file
from .recipe_fields import DataRecipe


LONG_LINE = 40  # characters; shorter ones stand in many texts
WORTH_A_WORD = 0.1  # of what is validated on
REMEDY = "validate on other data"


def check_apart(recipe: DataRecipe, files: list[Path] | None, held_out: list[Path] | None) -> None:
    """
    Refuse to validate on what is trained on, as far as names, splits and files tell.

    Args:
        files, held_out: of `train` and `validation`, where they are files.

    Raises:
        ValueError: for one source and split, or a file of both, be it under another name or a copy.
    """
    both = same_file(held_out, files) if files and held_out else None
    if both is not None:
        alias = "" if both[0] == both[1] else f" (as {both[1]})"
        raise ValueError(f"`data.validation` names {both[0]}, which is trained on, too{alias}; {REMEDY}.")
    source, split = recipe.validation or recipe.train, recipe.validation_split or recipe.split
    validates = recipe.validation or recipe.validation_split
    if validates and not files and not held_out and (source, split) == (recipe.train, recipe.split):
        name = "validation_split" if recipe.validation_split else "validation"
        raise ValueError(f"`data.{name}` is {getattr(recipe, name)!r}, which is what is trained on; {REMEDY}.")


def compare_with_training(held_out: Iterable[str], train: Iterable[np.ndarray], what: str) -> None:
    """
    See whether texts that are validated on are trained on.

    Args:
        train: [`digests`] of what is trained on, in arrays of any lengths.
        what: the digests are of, in plural.

    Raises:
        ValueError: where all are trained on. There is a warning for a tenth or more.
    """
    known = np.unique(np.array([digest for text in held_out for digest in digests(text)], dtype=np.int64))
    met = np.zeros(len(known), dtype=bool)
    for some in train:
        met |= np.isin(known, some)
    share = met.mean() if len(known) else 0.0
    if share == 1:
        raise ValueError(f"All {what} to validate on are trained on, too; {REMEDY}.")
    if share >= WORTH_A_WORD:
        warnings.warn(f"{share:.0%} of the {what} to validate on are trained on, too.", stacklevel=3)


def digests(text: str) -> list[int]:
    """One of each line but short ones; of a text without others one of the whole."""
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE] or [text.strip()]
    return [
        int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little", signed=True) for line in lines
    ]
