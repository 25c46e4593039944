"""A table that is shown on the terminal and written as Markdown alike."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, JustifyMethod
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


# How a printed row is marked.
PAPER = "paper: "
# Columns of a terminal that every table is meant for.
TERMINAL = 80


@dataclass
class Grid:
    """
    A table before it is rendered.

    Attributes:
        rows: texts; the first `text_columns` of each stand on the left.
        compact: in the terminal, say once below the table what is the same in all rows, and leave repetitions out.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str = ""
    text_columns: int = 1
    compact: bool = False

    @property
    def width(self) -> int:
        """Columns that it takes on a terminal that is wide enough; title and caption wrap."""
        return _width(self._table(self.header))

    @property
    def fits(self) -> bool:
        """Whether a terminal has room for it, with a header that wraps."""
        return _width(self._narrow()) <= TERMINAL

    def _narrow(self) -> Table:
        """With a header that wraps before any cell does, where it must."""
        table = self._table(self.header)
        if _width(table) <= TERMINAL:
            return table
        cells = [[line for row in self.rows for line in _lines(row[place])] for place in range(len(self.header))]
        widths = [max(map(len, column), default=1) or 1 for column in cells]
        columns = zip(self.header, widths, strict=True)
        return self._table([textwrap.fill(name, width, break_long_words=False) for name, width in columns])

    def rich(self) -> Group:
        """For `rich.print`: the table, whose header wraps before any cell does, and below it the caption."""
        table = self._narrow()
        same = [f"{self.header[place]}: {value}" for place, value in self._same().items()]
        caption = "; ".join(same + ([self.caption] if self.caption else []))
        return Group(table, *([Text(caption, "dim italic")] if caption else []))

    def _same(self) -> dict[int, str]:
        """By its place, what a column has in all rows, where that is said once below."""
        if not self.compact or len(self.rows) < 2:
            return {}
        values = {place: {row[place] for row in self.rows} - {""} for place in range(len(self.header))}
        return {place: found.pop() for place, found in values.items() if len(found) == 1 and self.header[place]}

    def _table(self, header: list[str]) -> Table:
        same = self._same()
        shown = [place for place in range(len(header)) if place not in same]
        # As narrow as can be: the suites' ten or eleven columns have to be read on a terminal of 80.
        table = Table(title=escape(self.title), box=box.SIMPLE_HEAD, show_edge=False, padding=0)
        for place in shown:
            justify: JustifyMethod = "left" if place < self.text_columns else "right"
            table.add_column(escape(header[place]), justify=justify, overflow="fold")
        above = [""] * len(header)
        for row in self.rows:
            style = "italic dim" if row[0].startswith(PAPER) else None
            repeated = 0
            while self.compact and repeated < self.text_columns and row[repeated] == above[repeated]:
                repeated += 1
            cells = ["" if place < repeated else "\n".join(_lines(row[place])) for place in shown]
            table.add_row(*map(escape, cells), style=style)
            above = row
        return table

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        align = ["---" if position < self.text_columns else "---:" for position in range(len(self.header))]
        rows = [[f"*{row[0]}*", *row[1:]] if row[0].startswith(PAPER) else row for row in self.rows]
        lines = [f"## {self.title}", "", line(self.header), line(align), *map(line, rows)]
        return "\n".join(lines + (["", self.caption] if self.caption else [])) + "\n"


def _lines(cell: str) -> list[str]:
    """Of a cell on the terminal: a deviation is below its mean."""
    return cell.replace(" ± ", "\n±").split("\n")


def _width(table: Table) -> int:
    wide = Console(width=10_000)
    return Measurement.get(wide, wide.options, table).maximum
