"""Pairs of a text and its translation: two columns of tables or of a Hub dataset, and one tokenizer for both sides."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .text_files import TABLES, as_text, check_column, columns_in, find_files, kind_of, rows_in


NESTED = "translation"  # the Hub's form: one column of texts by language
LOOKED_AT = 2000  # pairs, to see whether the columns are swapped
START, END, PADDING = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class PairColumns:
    """
    Which columns hold the texts. Inside of a column `translation`, as the Hub's datasets have it, names are languages.

    Args:
        source, target: names of columns.
        fields: what the two are called in errors.
    """

    source: str
    target: str
    fields: tuple[str, str] = ("source_column", "target_column")

    def __post_init__(self):
        for field, column in zip(self.fields, (self.source, self.target), strict=True):
            if not column:
                raise ValueError(f"`{field}` is not given; name the column, or in `{NESTED}` the language.")
        if self.source == self.target:
            raise ValueError(
                f"`{self.fields[0]}` and `{self.fields[1]}` are both {self.source!r}; a text is no translation of "
                "itself."
            )

    def by_field(self) -> dict[str, str]:
        """What each column is called in errors."""
        return dict(zip((self.source, self.target), self.fields, strict=True))


def read_pairs(
    source: str | list[str],
    columns: PairColumns,
    field: str,
    *,
    config: str | None = None,
    split: str = "train",
    cache: str | None = None,
) -> Dataset:
    """
    The pairs of CSV, TSV, JSON or parquet files or of a Hub dataset, in their order: columns `source` and `target`.

    Args:
        source: files (names or patterns) or a Hub id.
        field: that names it, for errors.
        config, split: of a Hub dataset; files are read whole.
        cache: folder for a Hub dataset.

    Raises:
        FileNotFoundError: for a file, pattern or dataset that is not there.
        ValueError: for a column that is missing or holds no text, a file that cannot be read, no pairs, or a pair of
            which one side is empty.
    """
    files = find_files(source, field)
    place = source if isinstance(source, str) else ", ".join(source)
    pairs = _from_hub(place, columns, config, split, cache) if files is None else _from_files(files, columns)
    if len(pairs) == 0:
        raise ValueError(f"`{field}` is {place}, which has no pairs.")
    return pairs


def _from_files(files: list[Path], columns: PairColumns) -> Dataset:
    if kind_of(files[0]) == "text":
        raise ValueError(
            f"{files[0]} is no table; pairs stand in two columns of a file that ends in {', '.join(TABLES)}."
        )
    pairs = []
    for path in files:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; it must hold pairs.")
        pairs += _texts(_rows(path, columns), columns, str(path))
    return _dataset(pairs)


def _rows(path: Path, columns: PairColumns) -> Iterator[tuple[str, Sequence[Any]]]:
    names = columns_in(path)
    if NESTED not in names or columns.source in names or columns.target in names:
        yield from rows_in(path, columns.by_field())
        return
    for place, (texts,) in rows_in(path, {NESTED: columns.fields[0]}):
        yield place, _of_languages(texts, columns, f"`{NESTED}` in {place} of {path}")


def _of_languages(texts: Any, columns: PairColumns, place: str) -> list[Any]:
    known = list(texts) if isinstance(texts, dict) else []
    for column, field in columns.by_field().items():
        check_column(column, known, place, field)
    return [texts[column] for column in columns.by_field()]


def _from_hub(source: str, columns: PairColumns, config: str | None, split: str, cache: str | None) -> Dataset:
    try:
        dataset = load_dataset(source, config, split=split, cache_dir=cache)
    except (OSError, ValueError) as error:  # not there, no such configuration or split, or the Hub cannot be reached
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{source} is no file here, nor a dataset with a split {split!r} that the Hub gives: {reason}"
        ) from error
    place, names = f"{source} of the Hub", dataset.column_names
    rows: Iterable[Any]
    if NESTED in names and columns.source not in names and columns.target not in names:
        rows = (_of_languages(texts, columns, f"`{NESTED}` of {place}") for texts in dataset[NESTED])
    else:
        for column, field in columns.by_field().items():
            check_column(column, names, place, field)
        rows = zip(dataset[columns.source], dataset[columns.target], strict=True)
    pairs = _texts(((f"row {number}", row) for number, row in enumerate(rows, 1)), columns, place)
    return _dataset(pairs)


def _dataset(pairs: list[tuple[str, ...]]) -> Dataset:
    return Dataset.from_dict({"source": [source for source, _ in pairs], "target": [target for _, target in pairs]})


def _texts(rows: Iterable[tuple[str, Sequence[Any]]], columns: PairColumns, place: str) -> list[tuple[str, ...]]:
    """The rows' texts; a ValueError where one is missing, empty or no text."""
    pairs, empty = [], []
    for where, row in rows:
        for text, (column, field) in zip(row, columns.by_field().items(), strict=True):
            if not (as_text(text, column, field, f"{where} of {place}") or "").strip():
                empty.append((column, field, where))
        pairs.append(tuple(row))
    if empty:
        column, field, where = empty[0]
        raise ValueError(
            f"`{field}` is {column!r}, which is empty in {where} of {place}; {len(empty):,} texts are in all: take "
            "these rows out."
        )
    return pairs


def warn_of_likeness(pairs: Dataset, name: str) -> None:
    """
    Warn where many sources are their own translations.

    Raises:
        ValueError: where all are.
    """
    same = sum(source.strip() == target.strip() for source, target in zip(*_sides(pairs), strict=True))
    if same == len(pairs):
        raise ValueError(f"All pairs of `{name}` have the same text on both sides; nothing is translated there.")
    if same > len(pairs) / 10:
        warnings.warn(
            f"{same:,} of the {len(pairs):,} pairs of `{name}` have the same text on both sides.", stacklevel=3
        )


def warn_if_swapped(pairs: Dataset, others: Dataset, names: tuple[str, str]) -> None:
    """Warn where the sources of one set have the words of the other's targets, and its targets those of the sources.

    Args:
        names: of the two sets, for the warning.
    """
    sources, targets = (_words(side) for side in _sides(pairs))
    other_sources, other_targets = (_words(side) for side in _sides(others))
    straight = len(sources & other_sources) + len(targets & other_targets)
    crosswise = len(sources & other_targets) + len(targets & other_sources)
    if crosswise > straight:
        warnings.warn(
            f"Source and target of `{names[1]}` seem to be swapped: its sources have the words of the targets of "
            f"`{names[0]}`, and its targets those of the sources.",
            stacklevel=3,
        )


def _sides(pairs: Dataset) -> tuple[Sequence[str], Sequence[str]]:
    return pairs["source"], pairs["target"]


def _words(texts: Sequence[str]) -> set[str]:
    return {word for text in texts[:LOOKED_AT] for word in re.findall(r"\w+", text.lower())}


def train_pair_tokenizer(pairs: Dataset, vocab_size: int, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """
    One byte-level BPE tokenizer for both sides, which knows every text: it ends sources and targets by `</s>`;
    decoders start with `<s>`. The same pairs, the same tokenizer.

    One for both, also where a model's embeddings of the two sides are apart: then it is a single object that saves,
    loads by `AutoTokenizer` and encodes either side. Of the classes of Transformers only MarianTokenizer and
    FSMTTokenizer hold two vocabularies, and these need sentencepiece or sacremoses.

    Args:
        vocab_size: at most so many tokens; fewer where the pairs do not have as many.
        max_length: of the model, to be kept in the tokenizer.

    Raises:
        ValueError: for a vocabulary that does not hold all bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PADDING, START, END]
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"The model's `vocab_size` is {vocab_size}; a tokenizer that is made on the data needs at least "
            f"{len(alphabet) + len(special)}, one for each byte."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for side in _sides(pairs) for text in side), trainer)
    end = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[end]
    )
    limit = {} if max_length is None else {"model_max_length": max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PADDING,
        model_input_names=["input_ids", "attention_mask"],
        **limit,
    )


def encode_side(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, *, target: bool
) -> tuple[list[list[int]], int]:
    """
    Token ids of sources or targets, and how many texts were cut off to `max_length` tokens, special ones included.

    Every target ends by the tokenizer's eos (in front of a language's token, where it is put last), also where the
    tokenizer adds none.
    """
    name = "text_target" if target else "text"
    found = tokenizer(**{name: list(texts)}, verbose=False)["input_ids"]
    without_end = target and bool(found) and tokenizer.eos_token_id not in found[0][-2:]
    room = max_length - without_end
    too_long = [place for place, ids in enumerate(found) if len(ids) > room]
    if too_long:
        cut = tokenizer(**{name: [texts[place] for place in too_long]}, truncation=True, max_length=room)["input_ids"]
        for place, ids in zip(too_long, cut, strict=True):
            found[place] = ids
    if without_end:
        found = [[*ids, tokenizer.eos_token_id] for ids in found]
    return found, len(too_long)
