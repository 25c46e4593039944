"""`sas-hf restore`: [`~sas_hf.conversion.restore_checkpoint`]."""

from pathlib import Path
from typing import Annotated

import typer

from .convert import ImagesToVerify, TextToVerify, conversion_table, text_in
from .shared import check_places, console, explain_errors, show_progress


@explain_errors
def restore(
    checkpoint: Annotated[str, typer.Argument(callback=check_places, help="Converted checkpoint folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="New checkpoint folder; must not exist.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    text: TextToVerify = None,
    images: ImagesToVerify = None,
) -> None:
    """Bring a conversion whose simulation is untrained back to its source's architecture, and verify it."""
    from ..conversion import restore_checkpoint

    report = restore_checkpoint(
        checkpoint,
        output,
        revision=revision,
        text=text_in(text),
        images=images,
        progress=show_progress,
    )
    console.print(conversion_table(report))
    console.print(f"[green]Saved[/green] {output}, a {report['architecture']}")
