"""`sas-hf study`: [`~sas_hf.training.study.run_study`]."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .shared import console, explain_errors, parse_numbers, show_progress


@explain_errors
def study(
    name: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a study of the package. Without it: their list.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE ...]", help="Fields of every recipe to change, such as data.train=a.txt."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the study. By default as it says.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2. By default as the study says.")] = None,
    power: Annotated[
        float | None,
        typer.Option(help="Train nothing: say how many seeds find this difference, by the runs that have ended."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: say what it will take, by counting and a few steps.")
    ] = False,
) -> None:
    """Train a grid of variants, data and seeds, and compare them; the same command again goes on where it stopped."""
    from ..training.study import load_study, run_study, study_names

    if name is None:
        table = Table(title="Studies: sas-hf study NAME [FIELD=VALUE ...]")
        table.add_column("name", no_wrap=True)
        table.add_column("variants", overflow="fold")
        table.add_column("seeds", justify="right")
        for known in study_names():
            chosen = load_study(known)
            table.add_row(known, ", ".join([*chosen.variants, *chosen.matched]), str(len(chosen.seeds)))
        console.print(table)
        return
    from ..training.memory import keep_freed_memory

    keep_freed_memory()
    chosen = load_study(name, output, None if seeds is None else parse_numbers(seeds, "--seeds", "0,1,2"))
    if dry_run:
        from ..training.estimates import estimate
        from ..training.study import plan_runs

        console.print(estimate(plan_runs(chosen, fields or (), needs_data=False), show_progress).grid().rich())
        return
    if power is not None:
        from ..training.study_power import study_power

        for grid in study_power(chosen, power, fields or ()):
            console.print(grid.rich(), "")
        return
    report = run_study(chosen, fields or (), progress=show_progress)
    for grid in report.grids():
        console.print(grid.rich(), "")
    console.print(f"[green]Saved[/green] {chosen.output}")
