"""`sas-hf fold`: [`~sas_hf.conversion.fold_checkpoint`]."""

from pathlib import Path
from typing import Annotated

import typer

from .convert import TextToVerify, conversion_table, text_in
from .shared import check_places, console, explain_errors, show_progress


@explain_errors
def fold(
    model: Annotated[
        str,
        typer.Argument(callback=check_places, help="SAS decoder with a linear simulation, or none: folder or Hub id."),
    ],
    output: Annotated[Path, typer.Argument(help="New checkpoint folder; must not exist.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Saved dtype. By default the model's.")] = None,
    text: TextToVerify = None,
) -> None:
    """Multiply a linear simulation into a plain attention that every engine knows (a Llama), and verify it."""
    from ..conversion import fold_checkpoint

    report = fold_checkpoint(
        model,
        output,
        revision=revision,
        dtype=dtype,
        text=text_in(text),
        progress=show_progress,
    )
    console.print(conversion_table(report))
    console.print(f"[green]Saved[/green] {output}, a {report['architecture']}")
