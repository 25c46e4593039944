"""`sas-hf merge`: [`~sas_hf.hub.merge.merge_adapter`]."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import check_places, console, explain_errors, show_progress


@explain_errors
def merge(
    adapter: Annotated[
        str,
        typer.Argument(callback=check_places, help="Folder or Hub id of a peft adapter, of a SAS or any other model."),
    ],
    output: Annotated[Path, typer.Argument(help="New checkpoint folder; must not exist.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of an adapter on the Hub.")] = None,
) -> None:
    """Write the checkpoint that an adapter and its base model are together."""
    from ..hub.merge import merge_adapter

    merge_adapter(adapter, output, revision=revision, progress=show_progress)
    console.print(f"[green]Saved[/green] {output}")
