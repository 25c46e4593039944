"""`sas-hf look`: [`~sas_hf.looking.look`]."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import check_places, console, explain_errors, show_progress


@explain_errors
def look(
    model: Annotated[
        str,
        typer.Argument(
            callback=check_places,
            help="Checkpoint folder, Hub id or peft adapter: a SAS model, or one of Transformers.",
        ),
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="A text, two texts for an encoder of pairs, or an image file."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file of the page.")],
    target: Annotated[
        str | None,
        typer.Option(help="For encoder-decoders: the text that the decoder reads. By default what the model writes."),
    ] = None,
) -> None:
    """Write a page that shows what every head of a model looks at, and how far simulated heads have parted."""
    from ..looking import look
    from ..report.files import check_writable

    if output.is_dir():
        raise IsADirectoryError(f"`--output` is {str(output)!r}, a folder; name an HTML file.")
    check_writable(output.parent, f"`--output` is {str(output)!r}")
    show_progress(f"Looking with {model}")
    found = look(model, inputs, target=target)
    found.save(output)
    console.print(f"[green]Saved[/green] {output} ({output.stat().st_size / 1e6:.1f} MB); open it in a browser")
