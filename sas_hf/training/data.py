"""The text of a recipe: checked before anything is built, then as packed sequences to train and validate on."""

import difflib
import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .packing import BATCH, Packer
from .recipe import DataRecipe
from .streaming import PackedStream


BUILT_IN = "python-reference"  # CPython's own language reference: text without files or a network
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
ROW = Features({name: List(Value("int32")) for name in ("input_ids", "position_ids", "labels")})


@dataclass
class TrainingData:
    """
    What a language model is trained on: rows of `input_ids`, `position_ids` and `labels`, `[T]` each.

    Collate them by `transformers.default_data_collator`: one that adds an attention mask, as the `Trainer` takes when
    it is given a tokenizer, joins the documents of a row. FlashAttention keeps them apart in Transformers only in
    batches of one row, which [`one_row`] makes of others; eager, SDPA and flex attention always.

    Args:
        train: sequences, or a stream of them without end (then `max_steps` ends the training).
        validation: sequences, or `None`.
        callbacks: for the `Trainer`; none are needed with [`DurableTrainer`], which knows streams.
    """

    train: Dataset | PackedStream
    validation: Dataset | None
    callbacks: list[TrainerCallback] = field(default_factory=list)


@dataclass
class _Documents:
    """Documents in their order, and what tells them from others in the cache."""

    dataset: IterableDataset
    column: str
    identity: Any

    def texts(self) -> Iterator[list[str]]:
        for batch in self.dataset.iter(BATCH):
            yield [text for text in batch[self.column] if text]


def check_data(recipe: DataRecipe) -> None:
    """
    Refuse what cannot be trained on, before anything is built. A Hub dataset is first met in [`training_data`].

    Raises:
        FileNotFoundError: for a file that is not there, or a pattern that matches none.
        ValueError: for a number out of range, a missing `train`, several sources of validation, a folder, files of
            several kinds, an empty file, a damaged parquet file, or one without `text_column` or with other than text
            in it.
    """
    least = {"sequence_length": 2, "shuffle_buffer": 1, "max_validation_sequences": 1, "validation_documents": 1}
    for name, smallest in least.items():
        value = getattr(recipe, name)
        if value is not None and value < smallest:
            raise ValueError(f"`data.{name}` is {value}; it must be at least {smallest}.")
    if not recipe.train:
        raise ValueError(
            f"`data.train` is {recipe.train!r}; name text or parquet files, a dataset of the Hub, or {BUILT_IN!r}."
        )
    fields = [name for name in ("validation", "validation_split", "validation_documents") if getattr(recipe, name)]
    if len(fields) > 1:
        raise ValueError(
            f"`data.{fields[0]}` and `data.{fields[1]}` are both given; one tells what to validate on: set the "
            "other to null."
        )
    files = _find_files(recipe.train, "train")
    if recipe.validation_split and (files or recipe.train == BUILT_IN):
        raise ValueError(
            f"`data.validation_split` is {recipe.validation_split!r}, but only a dataset of the Hub has splits; "
            "name files in `data.validation`, or hold the first ones out with `data.validation_documents`."
        )
    for path in files or ():
        _check_file(path, recipe.text_column, "train")
    if recipe.validation:
        for path in _find_files(recipe.validation, "validation") or ():
            _check_file(path, recipe.text_column, "validation")


def training_data(recipe: DataRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> TrainingData:
    """
    The packed sequences of a recipe.

    Every parquet or Hub row is a document; a text file is one, or several that `document_separator` parts.
    Unless streamed, all is tokenised and packed once, in its order, and cached; the Trainer shuffles the sequences by
    its own seed, so that runs of several seeds share the cache. Processes that call this together wait for the first.

    Args:
        recipe: its data.
        tokenizer: of the model.
        seed: of the order of streamed documents.

    Raises:
        FileNotFoundError, ValueError: as [`check_data`]; for a Hub dataset that is not there or has no `text_column`,
            or documents that fill no sequence.
    """
    check_data(recipe)
    packer = Packer(tokenizer, recipe.sequence_length)
    documents = _load(recipe, recipe.train, "train", recipe.split, streaming=recipe.streaming)
    held_out = None
    if recipe.validation:
        held_out = _load(recipe, recipe.validation, "validation", recipe.split, streaming=True)
    elif recipe.validation_split:
        held_out = _load(recipe, recipe.train, "train", recipe.validation_split, streaming=True)
    elif recipe.validation_documents:
        count = recipe.validation_documents
        held_out = _Documents(documents.dataset.take(count), documents.column, (documents.identity, "first", count))
        documents = _Documents(documents.dataset.skip(count), documents.column, (documents.identity, "after", count))
    if held_out is None:
        validation = None
    elif recipe.max_validation_sequences is None:
        validation = _all_sequences(held_out, packer, recipe.cache, "validation")
    else:
        validation = _first_sequences(held_out, packer, recipe.max_validation_sequences, "validation")
    if recipe.streaming:
        train = PackedStream(
            documents.dataset, documents.column, tokenizer, recipe.sequence_length, recipe.shuffle_buffer, seed
        )
    else:
        train = _all_sequences(documents, packer, recipe.cache, "train")
    return TrainingData(train, validation)


def _find_files(source: str | list[str], name: str) -> list[Path] | None:
    """The files that a source names, in order; `None` for a Hub dataset or the built-in text."""
    if source == BUILT_IN:
        return None
    files = []
    for entry in [source] if isinstance(source, str) else source:
        path = Path(entry).expanduser()
        if path.is_dir():
            raise ValueError(f"`data.{name}` names the folder {entry}; name its files, such as {entry}/*.parquet.")
        if path.is_file():
            files.append(path)
        elif glob.has_magic(entry):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
            if not matches:
                raise FileNotFoundError(f"`data.{name}` is {entry}, which no file matches.")
            files += matches
        elif isinstance(source, str) and HUB_ID.fullmatch(entry) and path.suffix not in (".parquet", ".txt"):
            return None
        else:
            raise FileNotFoundError(f"`data.{name}` names {entry}, which does not exist.")
    kinds = {path.suffix == ".parquet" for path in files}
    if len(kinds) > 1:
        raise ValueError(f"`data.{name}` names parquet and text files; give files of one kind.")
    return files


def _check_file(path: Path, column: str, name: str) -> None:
    if path.stat().st_size == 0:
        raise ValueError(f"`data.{name}` names {path}, which is empty.")
    if path.suffix != ".parquet":
        return
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`data.{name}` names {path}, a damaged parquet file ({reason}); fetch it again.") from (
            error
        )
    with file:
        _check_column(column, file.schema_arrow.names, f"{path} of `data.{name}`")
        kind = file.schema_arrow.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"`data.text_column` is {column!r}, but in {path} that holds {kind}, not text (string).")
        if file.metadata.num_rows == 0:
            raise ValueError(f"`data.{name}` names {path}, which has no rows.")


def _check_column(column: str, columns: list[str], place: str) -> None:
    if column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        raise ValueError(
            f"`data.text_column` is {column!r}, which {place} does not have; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"Its columns are {', '.join(columns)}."
        )


def _load(recipe: DataRecipe, source: str | list[str], name: str, split: str, streaming: bool) -> _Documents:
    if source == BUILT_IN:
        texts = [topics[topic].strip() for topic in sorted(topics)]
        return _Documents(Dataset.from_dict({"text": texts}).to_iterable_dataset(), "text", texts)
    files = _find_files(source, name)
    if files is None:
        return _load_from_hub(recipe, source, split, streaming)
    paths = [str(path.resolve()) for path in files]
    identity = [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]
    if files[0].suffix == ".parquet":
        dataset = load_dataset("parquet", data_files=paths, split="train", streaming=True)
        return _Documents(dataset.select_columns([recipe.text_column]), recipe.text_column, identity)
    arguments = {"paths": paths, "separator": recipe.document_separator}
    dataset = IterableDataset.from_generator(
        _read_text, features=Features({"text": Value("string")}), gen_kwargs=arguments
    )
    return _Documents(dataset, "text", (identity, recipe.document_separator))


def _load_from_hub(recipe: DataRecipe, source: str, split: str, streaming: bool) -> _Documents:
    try:
        dataset = load_dataset(source, recipe.config, split=split, streaming=streaming, cache_dir=recipe.cache)
    except (OSError, ValueError) as error:  # not there, no such configuration or split, or the Hub cannot be reached
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{source} is no file here, nor a dataset that the Hub gives: {reason}") from error
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know its columns yet
    _check_column(recipe.text_column, columns, f"{source} of the Hub")
    dataset = dataset.select_columns([recipe.text_column])
    if streaming:
        return _Documents(dataset, recipe.text_column, (source, recipe.config, split))
    return _Documents(dataset.to_iterable_dataset(), recipe.text_column, dataset._fingerprint)


def _read_text(paths: list[str], separator: str | None) -> Iterator[dict[str, str]]:
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                if separator is None:
                    yield {"text": file.read()}
                    continue
                lines: list[str] = []
                for line in chain(file, [separator]):
                    if line.strip() != separator.strip():
                        lines.append(line)
                        continue
                    if text := "".join(lines).strip("\n"):
                        yield {"text": text}
                    lines = []
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8 ({error}).") from error


def _first_sequences(documents: _Documents, packer: Packer, limit: int, name: str) -> Dataset:
    return Dataset.from_list(list(islice(_sequences(documents, packer, name), limit)), features=ROW)


def _all_sequences(documents: _Documents, packer: Packer, cache: str | None, name: str) -> Dataset:
    """On the disk; made by the first process that asks, found there by the others and later runs."""
    identity = [documents.identity, documents.column, _identity(packer.tokenizer), packer.start, packer.length]
    try:
        return Dataset.from_generator(
            _sequences,
            features=ROW,
            cache_dir=cache,
            gen_kwargs={"documents": documents, "packer": packer, "name": name},
            fingerprint=Hasher.hash(identity),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # one of ours
            raise error.__cause__ from error
        raise


def _sequences(documents: _Documents, packer: Packer, name: str) -> Iterator[dict[str, list[int]]]:
    packer = Packer(packer.tokenizer, packer.length)  # nothing is left of other documents
    none = True
    for texts in documents.texts():
        for row in packer.pack(texts):
            none = False
            yield row
    if none:
        raise ValueError(
            f"The documents of `data.{name}` have fewer than `data.sequence_length` = {packer.length} tokens in all; "
            "give more text or a smaller length."
        )


def _identity(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All that decides how a tokenizer encodes; its own hash changes as it is used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__, tokenizer.get_vocab()
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
