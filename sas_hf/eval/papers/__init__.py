"""The result tables of both papers as data, so that a report can print them beside a run's own numbers.

`sas.json` holds Tables 1 and 3 to 8 of "Simulated Attention Score", `pay_better_attention.json` Tables 1 to 3 and 7
of "You Need to Pay Better Attention", in the papers' own units. Averages recomputed from the printed cells differ
from the printed ones at two places, which are kept as printed (`AVERAGES_THAT_DIFFER`).
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from ...report.tables import PAPER


SAS, PAY_BETTER_ATTENTION = "sas", "pay_better_attention"

# (table of the SAS paper, size, model): the printed average, and that of the printed cells.
AVERAGES_THAT_DIFFER = {("1", "760M", "MQA"): (52.32, 52.30), ("8", "1.5B", "SAS"): (55.85, 55.87)}

# The table of the SAS paper that a suite repeats.
TABLE_OF_SUITE = {"sas_table1": "1", "sas_table8": "8"}

UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
# A model of 353M or 430M parameters is one of "350M", SmolLM2-135M is not.
SIZE_TOLERANCE = 1.25


@dataclass(frozen=True)
class PaperRow:
    """
    A printed row. What it does not have is `None`.

    Attributes:
        model: the paper's name of it, such as "SAS" or "efficient".
        values: one per column of the table, `None` where nothing is printed.
        size, tokens: parameters and training tokens as printed ("350M", "50B").
        dataset: in tables over several.
        average: as printed.
        std: standard deviations over seeds.
    """

    model: str
    values: list[float | None]
    size: str | None = None
    tokens: str | None = None
    dataset: str | None = None
    average: float | None = None
    std: list[float] | None = None

    @property
    def label(self) -> str:
        """How the row is marked among a run's own."""
        return f"{PAPER}{self.model} {self.size}, {self.tokens} tokens"

    @property
    def parameters(self) -> float | None:
        """The printed size as a number."""
        return None if self.size is None else float(self.size[:-1]) * UNITS[self.size[-1]]


@dataclass(frozen=True)
class PaperTable:
    """A table: `columns` name the values of each row, `unit` what they are, `metrics` are the harness's."""

    paper: str
    number: str
    title: str
    unit: str
    columns: list[str]
    rows: list[PaperRow]
    metrics: list[str] | None = None
    note: str | None = None


@functools.cache
def paper_tables(paper: str = SAS) -> dict[str, PaperTable]:
    """The tables of a paper by number.

    Args:
        paper: "sas" or "pay_better_attention".
    """
    if paper not in (SAS, PAY_BETTER_ATTENTION):
        raise ValueError(f"`paper` is {paper!r}; it must be {SAS!r} or {PAY_BETTER_ATTENTION!r}.")
    content = json.loads((Path(__file__).parent / f"{paper}.json").read_text(encoding="utf-8"))
    return {
        number: PaperTable(content["paper"], number, **table | {"rows": [PaperRow(**row) for row in table["rows"]]})
        for number, table in content["tables"].items()
    }


def rows_of_size(table: PaperTable, num_parameters: int) -> list[PaperRow]:
    """The rows whose printed size is within 25 % of `num_parameters`, those of the nearest size if there are two."""

    def distance(row: PaperRow) -> float:
        return abs(math.log(num_parameters / row.parameters))

    sized = [row for row in table.rows if row.size is not None and distance(row) <= math.log(SIZE_TOLERANCE)]
    nearest = min(map(distance, sized), default=0)
    return [row for row in sized if distance(row) == nearest]
