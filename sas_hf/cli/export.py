"""`sas-hf export`: [`~sas_hf.hub.export.export_model`] and [`~sas_hf.serve.programs.export_program`]."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import check_places, console, explain_errors, show_progress


@explain_errors
def export(
    model: Annotated[str, typer.Argument(callback=check_places, help="SAS checkpoint folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="New folder; must not exist.")],
    format: Annotated[
        str | None, typer.Option(help="Write a program: onnx, openvino, executorch or torch (torch.export).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
) -> None:
    """Write a folder for the Hub, with code: it loads without sas_hf too, with trust_remote_code=True.

    With --format, write a program for another runtime instead, run there and compared with the model.
    """
    if format is not None:
        from ..serve.programs import export_program

        differences = export_program(model, output, format, revision=revision, progress=show_progress)
        told = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
        console.print(f"[green]Saved[/green] {output}; differences from the model, of the largest number: {told}")
        return
    from ..hub.export import export_model

    export_model(model, output, revision=revision, progress=show_progress)
    console.print(f"[green]Saved[/green] {output}; share it with: hf upload OWNER/NAME {output}")
