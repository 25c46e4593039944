"""Texts with labels, from tables or the Hub: of one class each, of several labels each, or rated by a number."""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import PreTrainedConfig

from .text_files import as_text, check_column, find_files, kind_of, rows_in


CLASSES, REGRESSION, SEVERAL = "single_label_classification", "regression", "multi_label_classification"
WHOLE, NUMBER = re.compile(r"[-+]?\d+"), re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Columns:
    """
    Where a table has what.

    Args:
        text: the text, or the first of a pair.
        second: the second of a pair; `None`: there are no pairs.
        label: the label; several: of 0 and 1 each, whether a text has the label that the column is called.
        prefix: of the fields that name them, for errors, such as "data.".
    """

    text: str = "text"
    second: str | None = None
    label: str | Sequence[str] = "label"
    prefix: str = ""

    def fields(self) -> dict[str, str]:
        """By column, the field that names it."""
        names = {self.text: "text_column", self.second: "second_text_column"}
        names |= dict.fromkeys([self.label] if isinstance(self.label, str) else self.label, "label_column")
        found = {column: self.prefix + field for column, field in names.items() if column is not None}
        if len(found) < (1 if self.second is None else 2) + (1 if isinstance(self.label, str) else len(self.label)):
            raise ValueError(f"`{self.prefix}label_column` or a column of texts names a column twice.")
        return found


@dataclass(frozen=True)
class LabelledTexts:
    """
    Rows as they were read.

    Attributes:
        texts, seconds: the texts, and the second ones of pairs; none is empty.
        labels: what the table holds, none is `None`; with several columns a list for each row.
        names: of the classes, where the data say them; of the columns, where the labels have several.
        source: what they were read from, for errors.
        places: where each row is, for errors.
        field: that names the labels' column, for errors.
    """

    texts: list[str]
    seconds: list[str] | None
    labels: list[Any]
    names: list[str] | None
    source: str
    places: list[str]
    field: str

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, numbers: Iterable[int]) -> "LabelledTexts":
        """The rows of these numbers."""
        numbers = list(numbers)
        texts, labels, places = ([rows[n] for n in numbers] for rows in (self.texts, self.labels, self.places))
        seconds = None if self.seconds is None else [self.seconds[n] for n in numbers]
        return LabelledTexts(texts, seconds, labels, self.names, self.source, places, self.field)


@dataclass(frozen=True)
class Labels:
    """
    What labels mean.

    Args:
        problem_type: as of a Transformers configuration.
        names: of the classes, or of the labels of which a text may have several; none in a regression.
    """

    problem_type: str
    names: list[str]


def read_labelled_texts(
    source: str | list[str],
    columns: Columns,
    field: str,
    config: str | None = None,
    split: str = "train",
    cache: str | None = None,
) -> LabelledTexts:
    """
    Read texts and their labels, as they are.

    Args:
        source: tables (CSV, TSV, JSON lines, parquet; names or patterns), or a Hub id.
        field: that names it, for errors.
        config, split, cache: of a Hub dataset.

    Raises:
        FileNotFoundError: for a file that is not there, or a dataset that the Hub does not give.
        ValueError: for files that are no tables, a column that is not there (with those that are), no rows, a text or
            a label that is empty, with its place.
    """
    files = find_files(source, field)
    if files is None:
        return _from_hub(str(source), columns, config, split, cache)
    if kind_of(files[0]) == "text":
        raise ValueError(
            f"`{field}` names {files[0]}, which is read as text; labelled texts are in tables (CSV, TSV, JSON lines, "
            "parquet)."
        )
    names = columns.fields()
    rows = ((f"{place} of {path}", row) for path in files for place, row in rows_in(path, names))
    return _checked(rows, columns, None, ", ".join(map(str, files)))


def split_names(source: str, config: str | None = None, cache: str | None = None) -> DatasetDict:
    """All splits of a Hub dataset; a FileNotFoundError where there is none."""
    try:
        return load_dataset(source, config, cache_dir=cache)
    except (OSError, ValueError) as error:  # not there, no such configuration, or the Hub cannot be reached
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{source} is no file here, nor a dataset that the Hub gives: {reason}") from error


def _from_hub(source: str, columns: Columns, config: str | None, split: str, cache: str | None) -> LabelledTexts:
    splits = split_names(source, config, cache)
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(splits)}.")
    return from_dataset(splits[split], columns, f"{split} of {source}")


def from_dataset(dataset: Dataset, columns: Columns, source: str) -> LabelledTexts:
    """The same of a dataset of `datasets`, whose features may name the classes."""
    names = columns.fields()
    for column, field in names.items():
        check_column(column, dataset.column_names, source, field)
    classes = None
    if isinstance(columns.label, str):
        feature = dataset.features[columns.label]
        inside = getattr(feature, "feature", feature)  # of a list
        if isinstance(inside, ClassLabel):
            classes = inside.names
    rows = (
        (f"row {number} of {source}", [row[column] for column in names]) for number, row in enumerate(dataset, start=1)
    )
    return _checked(rows, columns, classes, source)


def _checked(
    rows: Iterable[tuple[str, list[Any]]], columns: Columns, classes: list[str] | None, source: str
) -> LabelledTexts:
    texts: list[str] = []
    seconds: list[str] = []
    labels, places = [], []
    several = not isinstance(columns.label, str)
    names = [(columns.text, f"{columns.prefix}text_column")]
    names += [] if columns.second is None else [(columns.second, f"{columns.prefix}second_text_column")]
    label_field = f"{columns.prefix}label_column"
    for place, row in rows:
        for (column, field), value, into in zip(names, row[: len(names)], (texts, seconds), strict=False):
            text = as_text(value, column, field, place)
            if text is None or not text.strip():
                raise ValueError(f"`{field}` is {column!r}, which is empty in {place}; leave such rows out.")
            into.append(text)
        cells = row[len(names) :]
        for cell in cells:
            if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
                raise ValueError(f"`{label_field}` is {columns.label!r}, which is empty in {place}; label it.")
            for value in cell if isinstance(cell, list) else [cell]:
                if not (value is None or isinstance(value, str | int | float)):
                    raise ValueError(
                        f"`{label_field}` is {columns.label!r}, but in {place} that holds {str(cell)[:40]} "
                        f"({type(value).__name__}), which is neither text nor a number."
                    )
            if classes is not None and isinstance(cell, int) and cell < 0:
                raise ValueError(f"There is no label in {place} ({cell}); take another split.")
        label = cells if several else cells[0]
        if classes is not None:
            label = [classes[number] for number in label] if isinstance(label, list) else classes[label]
        labels.append(label)
        places.append(place)
    if not texts:
        raise ValueError(f"{source} has no rows.")
    named = list(columns.label) if several else classes
    return LabelledTexts(
        texts, seconds if columns.second is not None else None, labels, named, source, places, label_field
    )


def find_labels(rows: LabelledTexts, class_names: list[str] | None = None, problem_type: str | None = None) -> Labels:
    """
    What the labels of texts to train on mean: numbers with a point are to be predicted as such, lists and several
    columns tell which of several labels a text has, all else is the name of its class.

    Args:
        class_names: of classes that are named, their order; of those that are numbered from 0, and of lists of 0 and
            1, their names.
        problem_type: what they mean, where that is not to be told from them.

    Raises:
        ValueError: for labels that mean nothing of this kind, one class only, or a class without a text.
    """
    first = rows.labels[0]
    if isinstance(first, list):
        kind = SEVERAL
    elif all(_is_number(label) for label in rows.labels):
        kind = CLASSES if all(_is_whole(label) for label in rows.labels) else REGRESSION
    else:
        kind = CLASSES
    if problem_type not in (None, CLASSES, REGRESSION, SEVERAL):
        raise ValueError(f"`problem_type` is {problem_type!r}; it must be {CLASSES!r}, {REGRESSION!r} or {SEVERAL!r}.")
    if kind == REGRESSION and problem_type is None and all(float(label).is_integer() for label in rows.labels):
        raise ValueError(
            f"`{rows.field}` holds numbers with a point that are whole, such as {first}; say by "
            f"`model.overrides.problem_type` whether they are {CLASSES!r} or {REGRESSION!r}."
        )
    wanted = problem_type or kind
    if wanted == CLASSES and kind == CLASSES and class_names is None and rows.names is None:
        _refuse_numbers_beside_names(rows)
    if wanted == REGRESSION:
        if class_names is not None:
            raise ValueError(f"`data.class_names` is {class_names}, but the labels are numbers to be predicted.")
        number_labels(rows, Labels(REGRESSION, []))
        return Labels(REGRESSION, [])
    if (wanted == SEVERAL) != (kind == SEVERAL):
        raise ValueError(
            f"`problem_type` is {problem_type!r}, but `{rows.field}` holds {first!r} in {rows.places[0]}."
        )
    names = _names_of_several(rows, class_names) if wanted == SEVERAL else _class_names(rows, class_names)
    if not names:
        raise ValueError(f"No text of {rows.source} has any label: `{rows.field}` holds empty lists.")
    labels = Labels(wanted, names)
    numbers: list[Any] = list(number_labels(rows, labels))
    if wanted == CLASSES:
        found = set(numbers)
        if len(names) == 1 or len(found) == 1:
            raise ValueError(
                f"All texts of {rows.source} have the label {names[numbers[0]]!r}; there must be two classes at least."
            )
        absent = [name for number, name in enumerate(names) if number not in found]
    else:
        absent = [name for number, name in enumerate(names) if not any(row[number] for row in numbers)]
    if absent:
        raise ValueError(
            f"No text of {rows.source} has the label {', '.join(map(repr, absent[:5]))}, which could not be learnt; "
            "give texts for it, or leave it out of the names."
        )
    return labels


def labels_by_number(config: PreTrainedConfig) -> dict[int, str]:
    """What the model's classes are called; a ValueError for numbers that do not count."""
    names = cast(dict[int, str], config.id2label or {})
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"`id2label` of the model counts {sorted(names)}; it must count 0, 1, 2, ...")
    return names


def number_labels(rows: LabelledTexts, labels: Labels) -> Sequence[int | float | list[float]]:
    """
    The labels as a model is trained on them: the number of a class, a number, or 0 and 1 for each of several.

    Raises:
        ValueError: for one that means nothing there, with its place, such as a class that is none of `labels.names`.
    """
    if labels.problem_type == REGRESSION:
        return [_number(rows, label, place) for label, place in zip(rows.labels, rows.places, strict=True)]
    numbers = {name: number for number, name in enumerate(labels.names)}
    by_number = _are_numbered(rows, labels.names)
    found: list[int | list[float]] = []
    for label, place in zip(rows.labels, rows.places, strict=True):
        if labels.problem_type == CLASSES:
            if isinstance(label, list):
                raise ValueError(f"`{rows.field}` holds {label!r} in {place}, and a text has one class.")
            name = labels.names[int(label)] if by_number else _name(label)
            if name not in numbers:
                raise ValueError(_unknown(rows, name, place, labels))
            found.append(numbers[name])
            continue
        if not isinstance(label, list):
            raise ValueError(f"`{rows.field}` holds {label!r} in {place}, and a text has a list of labels.")
        if _is_flags(label) and len(label) == len(numbers):
            found.append([float(_flag(value)) for value in label])
            continue
        for name in map(_name, label):
            if name not in numbers:
                raise ValueError(_unknown(rows, name, place, labels))
        has = {_name(value) for value in label}
        found.append([float(name in has) for name in labels.names])
    return found


def _unknown(rows: LabelledTexts, name: str, place: str, labels: Labels) -> str:
    known = ", ".join(labels.names[:8]) + (", ..." if len(labels.names) > 8 else "")
    return f"`{rows.field}` holds {name!r} in {place}, which is none of the labels {known}."


def _are_numbered(rows: LabelledTexts, names: list[str]) -> bool:
    """Whether the labels are numbers from 0 of classes that have other names."""
    if any(WHOLE.fullmatch(name) for name in names):  # a number is a name, too
        return False
    return all(_is_number(label) and _is_whole(label) and 0 <= int(label) < len(names) for label in rows.labels)


def _class_names(rows: LabelledTexts, class_names: list[str] | None) -> list[str]:
    found = {_name(label) for label in rows.labels}
    numerals = all(WHOLE.fullmatch(name) for name in found)
    if lists := sorted(name for name in found if name.startswith("[") and name.endswith("]")):
        raise ValueError(
            f"`{rows.field}` holds {lists[0]!r}, a list as text; give several labels as columns of 0 and 1, or as "
            "lists in JSON lines or parquet."
        )
    if class_names is not None:
        if len(set(class_names)) < len(class_names):
            raise ValueError(f"`data.class_names` is {class_names}; each must be there once.")
        numbered = numerals and all(0 <= int(name) < len(class_names) for name in found)
        if not numbered and (unknown := sorted(found - set(class_names))):
            raise ValueError(
                f"`data.class_names` is {class_names}, but {rows.source} has {', '.join(map(repr, unknown[:5]))}, too."
            )
        return list(class_names)
    if rows.names is None:
        _refuse_one_in_two_ways(rows, found)
    return rows.names or sorted(found, key=int if numerals else str)


def _refuse_numbers_beside_names(rows: LabelledTexts) -> None:
    """Raise a ValueError where some labels are numbers and others are not: "nan" among ratings would make each rating
    a class."""
    places: dict[bool, tuple[Any, str]] = {}
    for label, place in zip(rows.labels, rows.places, strict=True):
        places.setdefault(_is_number(label), (label, place))
    if len(places) == 2:
        (number, where), (name, there) = places[True], places[False]
        raise ValueError(
            f"`{rows.field}` holds the number {number!r} in {where}, but {name!r} in {there}; mend the one that is "
            "wrong, or name all classes in `data.class_names` if both are."
        )


def _refuse_one_in_two_ways(rows: LabelledTexts, names: Iterable[str]) -> None:
    """Raise a ValueError for names that differ by case, spaces around them, Unicode's form or zeros in front: a class
    would fall apart into two."""
    known: dict[str | int, str] = {}
    for name in sorted(names):
        plain = int(name) if WHOLE.fullmatch(name) else unicodedata.normalize("NFKC", name).casefold().strip()
        if plain in known:
            raise ValueError(
                f"`{rows.field}` holds {known[plain]!a} and {name!a}, which seem to be one label; write it one way, "
                "or name all in `data.class_names` if they are two."
            )
        known[plain] = name


def _names_of_several(rows: LabelledTexts, class_names: list[str] | None) -> list[str]:
    lengths = {len(label) for label in rows.labels}
    flags = all(_is_flags(label) for label in rows.labels)
    if rows.names is None and flags:
        if len(lengths) > 1:
            raise ValueError(f"`{rows.field}` holds lists of 0 and 1 of several lengths, {sorted(lengths)[:5]}.")
        names = class_names or [str(number) for number in range(max(lengths))]
        if len(names) not in lengths:
            raise ValueError(f"`data.class_names` has {len(names)} names, but the labels are {max(lengths)}.")
        return list(names)
    if rows.names is not None:
        for label, place in zip(rows.labels, rows.places, strict=True):
            if not _is_flags(label) and not set(map(_name, label)) <= set(rows.names):
                raise ValueError(f"`{rows.field}` holds {label} in {place}; of several columns each must be 0 or 1.")
        if class_names is not None and len(class_names) != len(rows.names):
            raise ValueError(f"`data.class_names` has {len(class_names)} names, but the labels are {len(rows.names)}.")
        return list(class_names or rows.names)
    for label, place in zip(rows.labels, rows.places, strict=True):
        if not all(isinstance(value, str) for value in label):
            raise ValueError(
                f"`{rows.field}` holds {str(label)[:60]} in {place}; a list must hold names of labels, or 0 or 1 for "
                "each label."
            )
    found = {name for label in rows.labels for name in label}
    if class_names is None:
        _refuse_one_in_two_ways(rows, found)
    elif unknown := sorted(found - set(class_names)):
        raise ValueError(f"`data.class_names` is {class_names}, but {rows.source} has {unknown[0]!r}, too.")
    return list(class_names or sorted(found))


def _name(label: Any) -> str:
    """A class's name: of numbers their digits, whether they came as numbers or as text."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label)


def _is_number(label: Any) -> bool:
    if isinstance(label, str):
        return NUMBER.fullmatch(label) is not None
    return isinstance(label, int | float) and not isinstance(label, bool)


def _is_whole(label: Any) -> bool:
    return WHOLE.fullmatch(label) is not None if isinstance(label, str) else isinstance(label, int)


def _number(rows: LabelledTexts, label: Any, place: str) -> float:
    value = float(label) if _is_number(label) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"`{rows.field}` holds {label!r} in {place}, which is no number.")
    return value


def _is_flags(label: list) -> bool:
    return all(value in (0, 1, "0", "1", "true", "false", "True", "False") for value in label)


def _flag(value: Any) -> bool:
    return value in (1, "1", "true", "True")
