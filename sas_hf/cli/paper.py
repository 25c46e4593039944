"""`sas-hf paper`: [`~sas_hf.papers.run.run_item`]."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from .shared import console, explain_errors, parse_numbers, show_progress


@explain_errors
def paper(
    name: Annotated[
        str | None, typer.Argument(metavar="[PAPER]", help="sas or better. Without it: all tables and figures.")
    ] = None,
    item: Annotated[
        str | None, typer.Argument(metavar="[ITEM]", help="Such as table7 or figure1. Without it: the paper's.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE ...]", help="Fields of every recipe, such as training.max_steps=100."),
    ] = None,
    size: Annotated[str, typer.Option(help="cpu: a small model and stand-ins; paper: as printed.")] = "cpu",
    data: Annotated[Path | None, typer.Option(help="Folder with the data; the list says what must be in it.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2. By default as declared.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of this item; RUNS/SIZE/PAPER-ITEM by default.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the trainings, which items share.")] = Path("runs/papers"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it takes.")] = False,
) -> None:
    """Make any table or figure of both papers, with our numbers beside the printed ones."""
    from ..papers.items import PAPERS, check_paper

    if name is None or item is None:
        if name is not None:
            check_paper(name)
        given = {"--size": size != "cpu", "--data": data, "--seeds": seeds, "--output": output, "--dry-run": dry_run}
        if useless := [option for option, value in given.items() if value]:
            raise ValueError(f"{', '.join(useless)} is of an item; name a paper and one, such as sas table7.")
        for each in PAPERS if name is None else [name]:
            console.print(item_table(each, runs))
        return
    from ..papers.run import estimate_item, output_of, run_item

    chosen = None if seeds is None else parse_numbers(seeds, "--seeds", "0,1,2")
    if dry_run:
        console.print(estimate_item(name, item, size, data, chosen, fields or (), show_progress).grid().rich())
        return
    from ..papers.items import find_place
    from ..training.memory import keep_freed_memory

    keep_freed_memory()
    result = run_item(name, item, size, data, chosen, runs, output, fields or (), show_progress)
    console.print(f"[bold]{result.heading}[/bold]", highlight=False)
    for grid in result.grids:
        console.print(grid.rich())
    for note in result.notes:
        console.print(note, highlight=False)
    console.print(f"[green]Saved[/green] {output_of(find_place(name, item, size), runs, output)}")


def item_table(paper: str, runs: Path) -> Table:
    """A paper's items: what they compare, what they need, and where they have been run."""
    from ..papers.items import PAPERS, SIZES, item_names, load_item
    from ..papers.page import needs, state

    table = Table(
        title=f"{PAPERS[paper]}: sas-hf paper {paper} ITEM",
        caption="cpu, paper: what the folder of --data must hold at this size; *: without it, other data are taken.",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("item", "compares", "cpu", "paper", "run"):
        table.add_column(column)
    for name in item_names(paper):
        needed = [needs(paper, name, size) for size in SIZES]
        table.add_row(name, load_item(paper, name).title, *needed, state(paper, name, runs))
    return table
