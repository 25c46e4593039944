"""The declarations: which models, data and seeds make a table or figure, and which printed rows stand beside them.

`declarations/PAPER/ITEM.yaml` is an item; `declarations/grids/SIZE/GRID.yaml` holds the models, data and recipe that
several items take from; `methods.yaml` the attention methods of the SAS paper at any size.
"""

import difflib
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

from ..report.printed import PaperRow, PaperTable, printed
from ..training.fields import build, read_fields, shipped_names


DECLARATIONS = files(__package__) / "declarations"
PAPERS = {
    "sas": "Simulated Attention Score",
    "better": "You Need to Pay Better Attention",
}
SIZES = ("cpu", "paper")
METHODS = "methods"
# In the methods' declarations, for the size of a grid.
SIZE = "SIZE"


@dataclass
class Grid:
    """
    Trainings that items share: every variant can be trained on every data set.

    Args:
        recipe: what all share, as of a study.
        form: of the files that must be in the user's folder, such as "text files".
        size: of the SAS paper's methods, such as "125m", which are then among the variants.
        variants: by name, the fields that each changes.
        data: by name, the fields of `data`; files are in the folder that the user names.
        text: what the data are, such as "technical text".
        why: how sizes and rates were chosen, where they are ours.
        instead: fields of `data` where no folder is named, such as a dataset of the Hub, and `instead_text` what those
            are; `None`: there must be one.
    """

    recipe: str | dict[str, Any]
    form: str
    size: str | None = None
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: str = ""
    why: str | None = None
    instead: dict[str, Any] | None = None
    instead_text: str = ""


@dataclass
class AtSize:
    """
    An item at one size.

    Args:
        grid: whose trainings it takes.
        data: names of the grid's data sets, each with the printed data sets (or sizes, "350M" or "350M, 10B") that it
            stands for or is; `None`: the table has only one.
        seeds: of each run.
        variants, rows, numbers: in the place of the item's.
        stands_for: what of the paper the data and models stand for; `None` where they are the paper's own.
        arguments: of what is measured instead of trained.
        overrides: fields of every recipe.
        counted: the printed column of a layer's attention parameters, where the models are as wide as the paper's.
        note: what must be said of it.
        parts: where the item takes several grids, the fields of each, which go before these ones.
    """

    grid: str | None = None
    data: dict[str, str | list[str] | None] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    variants: list[str] | None = None
    rows: dict[str, Any] | None = None
    numbers: dict[str, float] | None = None
    stands_for: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    counted: str | None = None
    note: str | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Item:
    """
    A table or figure.

    Args:
        title: what it compares.
        claim: what the paper says of it.
        kind: "training", or what is counted or measured: "parameters", "inference-time", "step-time", "operations".
        printed: key of the printed table or figure whose rows stand beside ours, such as "table7".
        variants: names of the grid's; the first is what the others are compared with.
        rows: by variant, the printed row: its model, or what it must have, such as {model: standard, heads: 4}.
        against: by variant, what it is compared with instead of the first.
        metrics: by metric of ours, the printed column; the first is the one that is drawn.
        by_step: the printed columns are steps, and our curve stands beside them.
        saved: the printed column of how many of its tokens, in per cent, a variant saves: it already has then what the
            one that it is compared with has in the end.
        figure: as of a study.
        numbers: of a sweep, by variant, and `number` what they are.
        cpu, paper: at these sizes; `None`: not at this one, and `missing` says why.
    """

    title: str
    claim: str
    kind: Literal["training", "parameters", "inference-time", "step-time", "operations"]
    printed: str
    variants: list[str] = field(default_factory=list)
    rows: dict[str, Any] = field(default_factory=dict)
    against: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    by_step: bool = False
    saved: str | None = None
    figure: Literal["curves", "curves-over-time", "bars", "sweep"] = "curves"
    numbers: dict[str, float] = field(default_factory=dict)
    number: str = ""
    cpu: dict[str, Any] | None = None
    paper: dict[str, Any] | None = None
    missing: str = ""

    @property
    def sizes(self) -> list[str]:
        """At which it is declared."""
        return [size for size in SIZES if getattr(self, size) is not None]


@dataclass(frozen=True)
class Place:
    """An item of a paper at a size, looked up: `item` is as declared, `at` with the size's own fields."""

    paper: str
    name: str
    size: str
    item: Item
    at: AtSize

    @property
    def table(self) -> PaperTable:
        return printed(self.paper)[self.item.printed]

    @property
    def parts(self) -> list["Place"]:
        """For each grid that the item takes, a place with that alone."""
        if not self.at.parts:
            return [self]
        shared, where = vars(self.at) | {"parts": []}, f"{self.size}.parts."
        parts = [build(AtSize, shared | fields, where, "no field of a size") for fields in self.at.parts]
        return [replace(self, at=part) for part in parts]

    @property
    def grid(self) -> Grid:
        return load_grid(cast(str, self.at.grid), self.size)

    @property
    def files(self) -> list[str]:
        """What the data that it takes must be in the user's folder."""
        data = [self.grid.data[name] for name in self.at.data]
        found = [fields.get(name) for fields in data for name in ("train", "validation")]
        return list(dict.fromkeys(name for name in found if name is not None))

    @property
    def needs(self) -> str:
        """The same in words."""
        return f"{' and '.join(self.files)} ({self.grid.form})"

    @property
    def variants(self) -> list[str]:
        return self.at.variants or self.item.variants

    @property
    def rows(self) -> dict[str, Any]:
        return self.item.rows if self.at.rows is None else self.at.rows

    def printed_row(self, variant: str, label: str | None = None) -> PaperRow | None:
        """
        The row that is printed of a variant; `None` where none is.

        Args:
            label: of the printed data set or size.

        Raises:
            ValueError: where the table has no such row, or several.
        """
        return self.match(self.rows[variant], label) if variant in self.rows else None

    def match(self, wanted: str | dict[str, Any], label: str | None = None) -> PaperRow:
        """
        The printed row of this model, or with these values; raises as [`printed_row`].
        """
        wanted = {"model": wanted} if isinstance(wanted, str) else wanted
        rows = self.rows_of(label)
        found = [row for row in rows if all(self.value(row, name) == theirs for name, theirs in wanted.items())]
        if len(found) != 1:
            where = f" on {label}" if label else ""
            raise ValueError(f"{self.paper} {self.item.printed} has {len(found)} rows {wanted}{where}, not one.")
        return found[0]

    def rows_of(self, label: str | None) -> list[PaperRow]:
        """The printed rows of a data set or size; of `None` all."""
        rows = self.table.rows
        return [row for row in rows if label in (None, row.dataset, row.size, f"{row.size}, {row.tokens}")]

    def value(self, row: PaperRow, name: str) -> Any:
        """What a printed row has in a column, or beside the columns, such as its "average"."""
        columns = self.table.columns
        return row.values[columns.index(name)] if name in columns else getattr(row, name)

    @property
    def numbers(self) -> dict[str, float]:
        return self.item.numbers if self.at.numbers is None else self.at.numbers


def item_names(paper: str) -> list[str]:
    """The items of a paper: tables, then figures, by number."""
    check_paper(paper)
    return sorted(shipped_names(DECLARATIONS / paper), key=_order)


def _order(name: str) -> tuple[bool, bool, float]:
    number = "".join(letter for letter in name if letter.isdigit() or letter == ".")
    return not name.startswith("table"), not name.startswith("figure"), float(number)


def check_paper(paper: str) -> None:
    if paper not in PAPERS:
        known = ", ".join(f"{name} ({title})" for name, title in PAPERS.items())
        raise ValueError(f"There is no paper {paper!r}; there are {known}.")


def load_item(paper: str, name: str) -> Item:
    """
    Raises:
        ValueError: for an unknown paper or item (with the nearest known ones).
    """
    names = item_names(paper)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise ValueError(f"{PAPERS[paper]} has no item {name!r}; there are, for instance, {', '.join(near)}.")
    return build(Item, read_fields(Path(str(DECLARATIONS / paper / f"{name}.yaml"))), kind="no field of an item")


def find_place(paper: str, name: str, size: str) -> Place:
    """
    An item at a size.

    Raises:
        ValueError: as [`load_item`], for an unknown size, or one at which the item is not declared.
    """
    item = load_item(paper, name)
    if size not in SIZES:
        raise ValueError(f"`size` is {size!r}; it must be {' or '.join(SIZES)}.")
    if size not in item.sizes:
        raise ValueError(f"{paper} {name} has no form at the size {size!r}: {item.missing}")
    return Place(paper, name, size, item, build(AtSize, getattr(item, size), f"{size}.", "no field of a size"))


def load_grid(name: str, size: str) -> Grid:
    """A grid with all of its variants."""
    path = Path(str(DECLARATIONS / "grids" / size / f"{name}.yaml"))
    grid = build(Grid, read_fields(path), kind="no field of a grid")
    if grid.size is not None:
        methods = read_fields(Path(str(DECLARATIONS / "grids" / f"{METHODS}.yaml")))
        grid.variants = _sized(methods, grid.size) | grid.variants
    return grid


def _sized(fields: Any, size: str) -> Any:
    """The methods' fields with the names of a size's configurations."""
    if isinstance(fields, dict):
        return {name: _sized(value, size) for name, value in fields.items()}
    return fields.replace(SIZE, size) if isinstance(fields, str) else fields


def study_fields(place: Place, data: Path | None, needs_data: bool = True) -> dict[str, Any]:
    """
    What the study of an item's trainings says, but for where it is written.

    Args:
        data: the user's folder.
        needs_data: without it, an item whose data are missing has none.

    Raises:
        ValueError: where it is not given, and the item cannot do without.
        FileNotFoundError: where it lacks a file.
    """
    grid = place.grid
    chosen = {name: dict(grid.data[name]) for name in place.at.data}
    if data is not None:
        for fields in chosen.values():
            for name in ("train", "validation"):
                if isinstance(fields.get(name), str):
                    fields[name] = str(_existing(data / fields[name], place))
    elif grid.instead is not None:
        chosen = {name: _without_files(fields) | grid.instead for name, fields in chosen.items()}
    elif not needs_data:
        chosen = {name: _without_files(fields) for name, fields in chosen.items()}
    else:
        raise ValueError(f"{place.paper} {place.name} needs data: give --data FOLDER that holds {place.needs}.")
    variants = {name: grid.variants[name] for name in place.variants}
    return {"recipe": grid.recipe, "variants": variants, "data": chosen, "seeds": list(place.at.seeds)}


def _existing(path: Path, place: Place) -> Path:
    if not path.exists() and not any(path.parent.glob(path.name)):
        raise FileNotFoundError(f"--data has no {path}; {place.paper} {place.name} needs {place.needs} in it.")
    return path.resolve()


def _without_files(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("train", "validation")}


def stand_in(place: Place, data: Path | None, changed: list[str] | tuple[str, ...] = ()) -> str | None:
    """
    What stands for the paper's data and models, in words; `None` where they are its own.

    Args:
        data: the user's folder.
        changed: fields of every recipe that are not as declared, such as "training.max_steps=100".
    """
    if changed:
        told = [stand_in(place, data), f"not as declared: {', '.join(changed)}"]
        return "; ".join(filter(None, told))
    if place.at.parts:
        told = [stand_in(part, data) for part in place.parts]
        return ", ".join(dict.fromkeys(filter(None, told))) or None
    if place.at.stands_for is None:
        return None
    if place.at.grid is None:
        return place.at.stands_for
    grid = place.grid
    text = grid.text if data is not None or grid.instead is None else grid.instead_text
    return f"{text} for {place.at.stands_for}"
