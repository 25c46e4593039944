"""`sas-hf eval-data`: [`~sas_hf.eval.prepare_data`]."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import console, explain_errors, split_names


@explain_errors
def eval_data(
    folder: Annotated[Path, typer.Argument(help="For `sas-hf eval --data`; is made where it is missing.")],
    tasks: Annotated[str, typer.Option(help="Suites or tasks whose datasets to fetch, separated by commas.")],
) -> None:
    """Fetch the datasets of suites or tasks from the Hub, for evaluations without a network."""
    from .. import eval as evaluation

    paths = evaluation.prepare_data(folder, split_names(tasks), progress=lambda message: console.print(message))
    console.print(f"[green]{len(paths)} files[/green] below {folder}")
