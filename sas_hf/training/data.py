"""The text of a recipe: checked before anything is built, then as packed sequences to train and validate on."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, cast

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..data.text_files import TABLES, check_column, check_file, documents_in, find_files, kind_of
from .held_out import check_apart, compare_with_training, digests
from .packing import BATCH, LAYOUT, Packer
from .recipe_fields import DataRecipe
from .streaming import PackedStream


BUILT_IN = "python-reference"  # CPython's own language reference: text without files or a network
COLUMN_FIELD = "data.text_column"


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
        ValueError: for a number out of range, a missing `train`, several sources of validation, or one that is
            trained on; a folder, files of several kinds, a field that the files have no use for; and as
            [`check_file`].
    """
    least = {"sequence_length": 2, "shuffle_buffer": 1, "max_validation_sequences": 1, "validation_documents": 1}
    for name, smallest in least.items():
        value = getattr(recipe, name)
        if value is not None and value < smallest:
            raise ValueError(f"`data.{name}` is {value}; it must be at least {smallest}.")
    if not recipe.train:
        raise ValueError(
            f"`data.train` is {recipe.train!r}; name text or parquet files, or other tables, a dataset of the Hub, or "
            f"{BUILT_IN!r}."
        )
    fields = [name for name in ("validation", "validation_split", "validation_documents") if getattr(recipe, name)]
    if len(fields) > 1:
        raise ValueError(
            f"`data.{fields[0]}` and `data.{fields[1]}` are both given; one tells what to validate on: set the "
            "other to null."
        )
    files = None if recipe.train == BUILT_IN else find_files(recipe.train, "data.train")
    if recipe.validation_split and (files or recipe.train == BUILT_IN):
        raise ValueError(
            f"`data.validation_split` is {recipe.validation_split!r}, but only a dataset of the Hub has splits; "
            "name files in `data.validation`, or hold the first ones out with `data.validation_documents`."
        )
    for path in files or ():
        check_file(path, recipe.text_column, "data.train", COLUMN_FIELD)
    held_out = None
    if recipe.validation and recipe.validation != BUILT_IN:
        held_out = find_files(recipe.validation, "data.validation")
    for path in held_out or ():
        check_file(path, recipe.text_column, "data.validation", COLUMN_FIELD)
    _check_unused(recipe, [*(files or ()), *(held_out or ())])
    check_apart(recipe, files, held_out)


def _check_unused(recipe: DataRecipe, files: list[Path]) -> None:
    tables = [path for path in files if kind_of(path) != "text"]
    if recipe.document_separator is not None and files and tables == files:
        raise ValueError(
            f"`data.document_separator` is {recipe.document_separator!r}, of text files, but {files[0]} is a table "
            "with a document in each row; drop it."
        )
    if recipe.text_column != DataRecipe.text_column and files and not tables:
        raise ValueError(
            f"`data.text_column` is {recipe.text_column!r}, of tables, but {files[0]} is read as text; drop it, or "
            f"name files with one of the endings {', '.join(TABLES)}."
        )


def training_data(
    recipe: DataRecipe, tokenizer: PreTrainedTokenizerBase, seed: int, packer: Packer | None = None
) -> TrainingData:
    """
    The packed sequences of a recipe.

    Every parquet or Hub row is a document; a text file is one, or several that `document_separator` parts.
    Unless streamed, all is tokenised and packed once, in its order, and cached; the Trainer shuffles the sequences by
    its own seed, so that runs of several seeds share the cache. Processes that call this together wait for the first.

    Args:
        recipe: its data.
        tokenizer: of the model.
        seed: of the order of streamed documents.
        packer: makes rows of the documents; `None`: a [`Packer`], for causal language models.

    Raises:
        FileNotFoundError, ValueError: as [`check_data`]; for a Hub dataset that is not there or has no `text_column`,
            or documents that fill no sequence.
    """
    check_data(recipe)
    packer = packer or Packer(tokenizer, recipe.sequence_length)
    documents, held_out = _documents(recipe)
    if held_out is not None and not recipe.streaming:  # of a stream only the sources are compared
        first = None if recipe.max_validation_sequences is None else 1
        texts = chain.from_iterable(islice(held_out.texts(), first))
        compare_with_training(texts, _training_digests(documents, recipe.cache), "lines of the documents")
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


def training_rows(recipe: DataRecipe, packer: Packer) -> Iterator[dict[str, list[int]]]:
    """The rows that [`training_data`] makes to train on, one after another: none is kept, nor written to the cache."""
    return _sequences(_documents(recipe)[0], packer, "train")


def training_texts(recipe: DataRecipe, characters: int = 50_000_000) -> list[str]:
    """The documents to train on, from their start: so many characters, to train a tokenizer on."""
    texts, count = [], 0
    for text in chain.from_iterable(_documents(recipe)[0].texts()):
        texts.append(text)
        count += len(text)
        if count >= characters:
            break
    return texts


def _documents(recipe: DataRecipe) -> tuple[_Documents, _Documents | None]:
    """To train and to validate on."""
    source = cast(str | list[str], recipe.train)  # which `check_data` asks for
    documents = _load(recipe, source, "train", recipe.split, streaming=recipe.streaming)
    held_out = None
    if recipe.validation:
        held_out = _load(recipe, recipe.validation, "validation", recipe.split, streaming=True)
    elif recipe.validation_split:
        held_out = _load(recipe, source, "train", recipe.validation_split, streaming=True)
    elif recipe.validation_documents:
        count = recipe.validation_documents
        held_out = _Documents(documents.dataset.take(count), documents.column, (documents.identity, "first", count))
        documents = _Documents(documents.dataset.skip(count), documents.column, (documents.identity, "after", count))
    return documents, held_out


def _load(recipe: DataRecipe, source: str | list[str], name: str, split: str, streaming: bool) -> _Documents:
    if source == BUILT_IN:
        texts = [topics[topic].strip() for topic in sorted(topics)]
        return _Documents(Dataset.from_dict({"text": texts}).to_iterable_dataset(), "text", texts)
    files = find_files(source, f"data.{name}")
    if files is None:
        return _load_from_hub(recipe, str(source), split, streaming)
    paths = [str(path.resolve()) for path in files]
    identity = [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]
    if kind_of(files[0]) == "parquet":
        dataset = load_dataset("parquet", data_files=paths, split="train", streaming=True)
        return _Documents(dataset.select_columns([recipe.text_column]), recipe.text_column, identity)
    arguments = {"paths": paths, "column": recipe.text_column, "separator": recipe.document_separator}
    dataset = IterableDataset.from_generator(_read, features=Features({"text": Value("string")}), gen_kwargs=arguments)
    return _Documents(dataset, "text", (identity, recipe.text_column, recipe.document_separator))


def _load_from_hub(recipe: DataRecipe, source: str, split: str, streaming: bool) -> _Documents:
    try:
        dataset = load_dataset(source, recipe.config, split=split, streaming=streaming, cache_dir=recipe.cache)
    except (OSError, ValueError) as error:  # not there, no such configuration or split, or the Hub cannot be reached
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{source} is no file here, nor a dataset that the Hub gives: {reason}") from error
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know its columns yet
    check_column(recipe.text_column, columns, f"{source} of the Hub", COLUMN_FIELD)
    dataset = dataset.select_columns([recipe.text_column])
    if streaming:
        return _Documents(dataset, recipe.text_column, (source, recipe.config, split))
    return _Documents(dataset.to_iterable_dataset(), recipe.text_column, dataset._fingerprint)


def _read(paths: list[str], column: str, separator: str | None) -> Iterator[dict[str, str | None]]:
    for path in paths:
        for text in documents_in(Path(path), column, COLUMN_FIELD, separator):
            yield {"text": text}


def _training_digests(documents: _Documents, cache: str | None) -> Iterator[np.ndarray]:
    """In the cache as well, so that a run that starts again does not read all documents."""
    features, arguments = Features({"digest": Value("int64")}), {"documents": documents}
    dataset = _cached(_digests, features, cache, arguments, ["digests", documents.identity, documents.column])
    return (batch["digest"] for batch in dataset.with_format("numpy").iter(1_000_000))


def _digests(documents: _Documents) -> Iterator[dict[str, int]]:
    return ({"digest": digest} for texts in documents.texts() for text in texts for digest in digests(text))


def _first_sequences(documents: _Documents, packer: Packer, limit: int, name: str) -> Dataset:
    rows = list(islice(_sequences(documents, packer, name), limit))
    return Dataset.from_list(rows, features=_features(packer))


def _features(packer: Packer) -> Features:
    return Features({name: List(Value("int32")) for name in packer.columns})


def _all_sequences(documents: _Documents, packer: Packer, cache: str | None, name: str) -> Dataset:
    ends, kind = (packer.start, packer.end), (packer.columns, getattr(packer, "packed", True))
    identity = [LAYOUT, documents.identity, documents.column, _identity(packer.tokenizer), ends, packer.length]
    identity += [] if kind == (Packer.columns, True) else [kind]
    arguments = {"documents": documents, "packer": packer, "name": name}
    return _cached(_sequences, _features(packer), cache, arguments, identity)


def _cached(
    make: Callable[..., Iterator[dict]], features: Features, cache: str | None, arguments: dict, identity: list
) -> Dataset:
    """On the disk; made by the first process that asks, found there by the others and later runs."""
    fingerprint = Hasher.hash(identity)
    try:
        return Dataset.from_generator(
            make, features=features, cache_dir=cache, gen_kwargs=arguments, fingerprint=fingerprint
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # one of ours
            raise error.__cause__ from error
        raise


def _sequences(documents: _Documents, packer: Packer, name: str) -> Iterator[dict[str, list[int]]]:
    packer = copy.copy(packer)
    packer.tokens, packer.positions = [], []  # nothing is left of other documents
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
