"""`sas-hf export`: [`~sas_hf.hub.export.export_model`]."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import console, explain_errors, show_progress


@explain_errors
def export(
    model: Annotated[str, typer.Argument(help="SAS checkpoint folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="New folder; must not exist.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
) -> None:
    """Write a folder for the Hub, with code: it loads without sas_hf too, with trust_remote_code=True."""
    from ..hub.export import export_model

    export_model(model, output, revision=revision, progress=show_progress)
    console.print(f"[green]Saved[/green] {output}; share it with: hf upload OWNER/NAME {output}")
