"""Files of texts: which a source names, and the documents in them. Tables are read as tables, all else as text."""

import csv
import difflib
import filecmp
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from .text import check_text, open_text, read_text


# By suffix; a table has one document in each row.
TABLES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
TEXT_SUFFIXES = (".txt", ".md")  # among those of all other files, which are read as text too
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
COLUMN = "text"


def kind_of(path: Path) -> str:
    """ "csv", "json", "parquet" or "text"."""
    return TABLES.get(path.suffix.lower(), "text")


def find_files(source: str | list[str], field: str) -> list[Path] | None:
    """
    The files that a source names, in order; patterns such as `texts/*.jsonl` name all that match. `None` for one name
    that is no file here, but could be a dataset of the Hub.

    Args:
        field: that names them, for errors.

    Raises:
        FileNotFoundError: for a file that is not there, or a pattern that matches none.
        ValueError: for a folder, or files of several kinds.
    """
    files = []
    for entry in [source] if isinstance(source, str) else source:
        path = Path(entry).expanduser()
        if path.is_dir():
            raise ValueError(f"`{field}` names the folder {entry}; name its files, such as {entry}/*.parquet.")
        if path.is_file():
            files.append(path)
        elif glob.has_magic(entry):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
            if not matches:
                raise FileNotFoundError(f"`{field}` is {entry}, which no file matches.")
            files += matches
        elif HUB_ID.fullmatch(entry) and path.suffix.lower() not in (*TABLES, *TEXT_SUFFIXES):
            if isinstance(source, str):
                return None
            raise FileNotFoundError(f"`{field}` names {entry}, which does not exist; of Hub datasets give one.")
        else:
            raise FileNotFoundError(f"`{field}` names {entry}, which does not exist.")
    kinds = dict(zip(map(kind_of, files), files, strict=True))  # the last of each kind
    if len(kinds) > 1:
        named = " and ".join(f"{kind} ({path.name})" for kind, path in sorted(kinds.items()))
        raise ValueError(f"`{field}` names files of several kinds, {named}; give files of one kind.")
    return files


def same_file(first: Iterable[Path], second: Iterable[Path]) -> tuple[Path, Path] | None:
    """A file of the first that is one of the second as well, by whatever name or as a copy; and that one."""
    by_size: dict[int, list[Path]] = {}
    for path in second:
        by_size.setdefault(path.stat().st_size, []).append(path)
    for path in first:
        for other in by_size.get(path.stat().st_size, ()):
            if os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False):
                return path, other
    return None


def check_file(path: Path, column: str, field: str, column_field: str) -> None:
    """
    Refuse a file without documents, as far as its beginning shows. Arguments as [`documents_in`]; `field` names it.

    Raises:
        ValueError: for an empty file, one that is not text in UTF-8 or not what its suffix says, or a table without
            the column, with other than text in it, or without rows.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"`{field}` names {path}, which is empty.")
    if kind_of(path) == "parquet":
        with open_parquet(path) as file:
            check_text_column(file, path, column, column_field)
            empty = file.metadata.num_rows == 0
    else:
        check_text(path, size=2**20)
        empty = kind_of(path) != "text" and next(documents_in(path, column, column_field), None) is None
    if empty:
        raise ValueError(f"`{field}` names {path}, which has no rows.")


def documents_in(
    path: Path, column: str = COLUMN, column_field: str = "column", separator: str | None = None
) -> Iterator[str | None]:
    """
    The documents of a file: what a table has in its column, row by row, where `None` is an empty cell; a text file is
    one, or several.

    Args:
        column: of a table.
        column_field: what the column is called in errors.
        separator: line that parts the documents of a text file; `None`: it is one.

    Raises:
        ValueError: as [`check_file`], wherever in the file it is.
    """
    if kind_of(path) == "text":
        return _read_text(path, separator)
    rows = rows_in(path, {column: column_field})
    return (as_text(row[0], column, column_field, f"{place} of {path}") for place, row in rows)


def rows_in(path: Path, columns: dict[str, str]) -> Iterator[tuple[str, list[Any]]]:
    """
    The rows of a table: the place of each, such as "line 3", and what it has in these columns. CSV holds text alone;
    JSON and parquet whatever they hold, `None` where a cell is empty.

    Args:
        columns: by name, what each is called in errors.

    Raises:
        ValueError: for a file that is not what its suffix says, or a column that is not there.
    """
    return {"csv": _read_csv, "json": _read_json, "parquet": _read_parquet}[kind_of(path)](path, columns)


def columns_in(path: Path) -> list[str]:
    """The columns of a table, as far as its beginning shows; a ValueError for a file that is not what its suffix
    says."""
    if kind_of(path) == "csv":
        with open_text(path, newline="") as file:
            return next(csv.reader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t"), [])
    if kind_of(path) == "parquet":
        with open_parquet(path) as file:
            return file.schema_arrow.names
    row: Any = next((row for _, row in _json_rows(path)), {})
    return list(row) if isinstance(row, dict) else []


def as_text(value: Any, column: str, column_field: str, place: str) -> str | None:
    """The value of a cell, if it is text or nothing; a ValueError that names the place (such as "line 3 of FILE") if
    it is anything else."""
    if not (value is None or isinstance(value, str)):
        raise ValueError(f"`{column_field}` is {column!r}, but in {place} that holds {str(value)[:40]}, not text.")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        where, _, path = place.partition(" of ")
        raise ValueError(f"{path} is not text in UTF-8: in {where} it has half a surrogate pair.") from error
    return value


def read_whole(path: Path) -> str:
    """
    A text file's text, or the column `text` of a table (CSV, TSV, JSON, parquet), its rows parted by empty lines.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: names the file, and what is wrong in it: no UTF-8 (with the first wrong byte), compressed or
            binary, rows with more or fewer fields than the header, no column `text`, or other things in it.
    """
    if kind_of(path) == "text":
        return read_text(path)
    return "\n\n".join(filter(None, documents_in(path)))


def check_column(column: str, columns: Iterable[str], place: str, field: str = "column") -> None:
    """Raise a ValueError, with the nearest there is, where the columns lack one."""
    columns = [str(name) for name in columns]
    if columns.count(column) == 1:
        return
    near = difflib.get_close_matches(column, columns, n=1)
    lacks = "has several times" if column in columns else "does not have"
    raise ValueError(
        f"`{field}` is {column!r}, which {place} {lacks}"
        + (f"; did you mean {near[0]!r}?" if near and near[0] != column else ".")
        + f" Its columns are {', '.join(name[:40] for name in columns[:20])}."
    )


def _read_text(path: Path, separator: str | None) -> Iterator[str]:
    if separator is None:
        yield read_text(path)
        return
    with open_text(path) as file:
        lines: list[str] = []
        for line in chain(file, [separator]):
            if line.strip() != separator.strip():
                lines.append(line)
                continue
            if text := "".join(lines).strip("\n"):
                yield text
            lines = []


def _read_csv(path: Path, columns: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    # Not by pandas, which makes numbers of texts, takes "NA" and "null" for nothing, and the first field of a row for
    # its index where an unquoted comma in a text makes one too many.
    csv.field_size_limit(2**31 - 1)  # a field may be a book
    with open_text(path, newline="") as file:
        rows = csv.reader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t", strict=True)
        try:
            header = next(rows, [])
            for column, field in columns.items():
                check_column(column, header, str(path), field)
            places = [header.index(column) for column in columns]
            for row in filter(None, rows):
                if len(row) != len(header):
                    raise ValueError(
                        f"{path} has {len(row)} fields in the row that ends in line {rows.line_num}, but "
                        f"{len(header)} columns; put texts with {rows.dialect.delimiter!r} into quotation marks."
                    )
                yield f"line {rows.line_num}", [row[place] for place in places]
        except csv.Error as error:
            raise ValueError(f"{path} is no {path.suffix[1:]} table: line {rows.line_num}: {error}.") from error


def _read_json(path: Path, columns: dict[str, str]) -> Iterator[tuple[str, list[Any]]]:
    for place, row in _json_rows(path):
        if not isinstance(row, dict):
            named = " and ".join(map(repr, columns))
            raise ValueError(f"{path} must hold objects with a column {named}, but {place} is {str(row)[:40]!r}.")
        for column, field in columns.items():
            check_column(column, row, f"{place} of {path}", field)
        yield place, [row[column] for column in columns]


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a list, or one on each line."""
    with open_text(path) as file:
        lines = list(file) if path.suffix.lower() == ".json" else file  # a list may be on many lines
        try:
            if isinstance(lines, list) and "".join(lines).lstrip().startswith("["):
                place = "it"
                for number, row in enumerate(json.loads("".join(lines)), start=1):
                    yield f"row {number}", row
                return
            for number, line in enumerate(lines, start=1):
                place = f"line {number}"
                if line.strip():
                    yield place, json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON with an object on each line: {place} is not ({error}).") from error


def _read_parquet(path: Path, columns: dict[str, str]) -> Iterator[tuple[str, list[Any]]]:
    number = 0
    with open_parquet(path) as file:
        for column, field in columns.items():
            check_column(column, file.schema_arrow.names, str(path), field)
        for batch in file.iter_batches(columns=list(columns)):
            for row in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
                number += 1
                yield f"row {number}", list(row)


def check_text_column(file: Any, path: Path, column: str, column_field: str) -> None:
    """Raise a ValueError unless the open parquet file has text in the column."""
    import pyarrow

    check_column(column, file.schema_arrow.names, str(path), column_field)
    kind = file.schema_arrow.field(column).type
    if not any(test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
        raise ValueError(f"`{column_field}` is {column!r}, but in {path} that holds {kind}, not text (string).")


def open_parquet(path: Path):
    """A `pyarrow.parquet.ParquetFile`; a ValueError for a damaged one."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}, a damaged parquet file ({reason}), cannot be read; fetch it again.") from error
