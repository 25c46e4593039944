"""A table that is shown on the terminal and written as Markdown alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table


# How a printed row is marked.
PAPER = "paper: "


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

    def rich(self) -> Table:
        shown = list(range(len(self.header)))
        caption = [self.caption] if self.caption else []
        if self.compact:
            values = {place: {row[place] for row in self.rows} - {""} for place in shown}
            same = [place for place in shown if len(values[place]) == 1 and len(self.rows) > 1 and self.header[place]]
            caption = [f"{self.header[place]}: {next(iter(values[place]))}" for place in same] + caption
            shown = [place for place in shown if place not in same]
        # As narrow as can be: the suites' ten or eleven columns have to be read on a terminal of 80.
        table = Table(
            title=escape(self.title),
            caption=escape("; ".join(caption)),
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=0,
        )
        for place in shown:
            justify = "left" if place < self.text_columns else "right"
            table.add_column(escape(self.header[place]), justify=justify, overflow="fold")
        above = [""] * len(self.header)
        for row in self.rows:
            style = "italic dim" if row[0].startswith(PAPER) else None
            repeated = 0
            while self.compact and repeated < self.text_columns and row[repeated] == above[repeated]:
                repeated += 1
            cells = ["" if place < repeated else row[place].replace(" ± ", "\n±") for place in shown]
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
