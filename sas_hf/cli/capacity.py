"""`sas-hf capacity`: [`~sas_hf.capacity.run.run_capacity`]."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from .shared import console, explain_errors, parse_numbers, show_progress, split_names


@explain_errors
def capacity(
    task: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="Such as fetch or mqar. Without it: their list.")
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Such as 4,8. By default all of the task.")] = None,
    variants: Annotated[
        str | None, typer.Option(help="Such as mha-4,sas-2to4. By default all; the base of each is always trained.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="By default 0,1,2.")] = None,
    rates: Annotated[
        str | None, typer.Option(help="Learning rates to choose from, for each variant. By default 0.003,0.01.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of each training. By default as the task says.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; runs/capacity/TASK by default.")] = None,
) -> None:
    """Train small models on what attention is for, with real heads and with simulated ones; the same again goes on."""
    given = {"--levels": levels, "--variants": variants, "--seeds": seeds, "--rates": rates, "--steps": steps}
    if task is None:
        if useless := [option for option, value in (given | {"--output": output}).items() if value is not None]:
            raise ValueError(f"{', '.join(useless)} is of a task; name one, such as fetch.")
        console.print(task_table())
        return
    from ..capacity.run import RATES, SEEDS, output_of, run_capacity
    from ..capacity.tasks import find_task

    folder = output_of(find_task(task), output)
    result = run_capacity(
        task,
        None if levels is None else parse_numbers(levels, "--levels", "4,8"),
        None if variants is None else split_names(variants),
        SEEDS if seeds is None else parse_numbers(seeds, "--seeds", "0,1,2"),
        RATES if rates is None else parse_numbers(rates, "--rates", "0.003,0.01", float),
        steps,
        folder,
        show_progress,
    )
    for grid in result.grids():
        console.print(grid.rich(), "")
    for note in result.notes():
        console.print(note, highlight=False)
    console.print(f"[green]Saved[/green] {folder}")


def task_table() -> Table:
    """The tasks, and whether their default folders have results."""
    from ..capacity.run import has_run, output_of
    from ..capacity.tasks import TASKS

    table = Table(title="sas-hf capacity TASK", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("task", "asks of attention", "levels", "run here"):
        table.add_column(column)
    for task in TASKS.values():
        levels = f"{', '.join(map(str, task.levels))} {task.level_name}"
        table.add_row(task.name, task.asks, levels, str(output_of(task)) if has_run(task) else "-")
    return table
