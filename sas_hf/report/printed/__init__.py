"""What both papers print, as data: every table, figure and number of the text that a run can be set beside.

`sas.json` holds "Simulated Attention Score", `better.json` "You Need to Pay Better Attention", in their own units and
as printed, also where one print contradicts another; the `note` says so. A figure holds what the text and its caption
print of it: the curves themselves are nowhere in numbers.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from ..tables import PAPER


# The papers by short name, in the order in which they are shown.
PAPERS = ("sas", "better")

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
        ranks: printed in parentheses behind the values, among the rows of the same data and number of heads.
    """

    model: str
    values: list[float | None]
    size: str | None = None
    tokens: str | None = None
    dataset: str | None = None
    average: float | None = None
    std: list[float] | None = None
    ranks: list[int | None] | None = None

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
    """
    A table, a figure or what a section says.

    Attributes:
        paper: title and number on arXiv.
        source: where it stands, such as "Table 7, Appendix J".
        title: what it compares.
        unit: of all values, or of those whose columns do not name theirs.
        columns: they name the values of each row.
        rows: as printed, in the paper's order.
        metrics: the harness's, one per column.
        note: what must be said of it, above all which prints are to be distrusted.
    """

    paper: str
    source: str
    title: str
    unit: str
    columns: list[str]
    rows: list[PaperRow]
    metrics: list[str] | None = None
    note: str | None = None


@functools.cache
def printed(paper: str) -> dict[str, PaperTable]:
    """What a paper prints, by "table1", "figure2", "section4.1", ...

    Args:
        paper: "sas" or "better".

    Raises:
        ValueError: for another paper.
    """
    if paper not in PAPERS:
        raise ValueError(f"`paper` is {paper!r}; it must be one of {', '.join(map(repr, PAPERS))}.")
    content = json.loads((Path(__file__).parent / f"{paper}.json").read_text(encoding="utf-8"))
    return {
        key: PaperTable(content["paper"], **table | {"rows": [PaperRow(**row) for row in table["rows"]]})
        for key, table in content["printed"].items()
    }


def rows_of_size(table: PaperTable, num_parameters: int) -> list[PaperRow]:
    """The rows whose printed size is within 25 % of `num_parameters`, those of the nearest size if there are two."""

    def distance(row: PaperRow) -> float:
        return math.inf if row.parameters is None else abs(math.log(num_parameters / row.parameters))

    sized = [row for row in table.rows if distance(row) <= math.log(SIZE_TOLERANCE)]
    nearest = min(map(distance, sized), default=0)
    return [row for row in sized if distance(row) == nearest]
