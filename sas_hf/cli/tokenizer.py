"""`sas-hf tokenizer`: [`~sas_hf.hub.own_tokenizer.make_tokenizer`]."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import console, explain_errors, show_progress


@explain_errors
def tokenizer(
    text: Annotated[list[str], typer.Argument(help="Text files or tables (CSV, JSON lines, parquet), or patterns.")],
    output: Annotated[Path, typer.Argument(help="New folder; must not exist.")],
    size: Annotated[int, typer.Option(help="Tokens at most, from 257 on: the bytes, and one to end texts.")] = 2048,
    column: Annotated[str, typer.Option(help="Of tables.")] = "text",
) -> None:
    """Make a byte-level BPE tokenizer of texts, for a model of your own; the same texts, the same tokenizer."""
    from ..hub.own_tokenizer import make_tokenizer

    made = make_tokenizer(text, output, size, column, progress=show_progress)
    console.print(f"[green]Saved[/green] {output}: {len(made):,} tokens")
