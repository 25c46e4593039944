"""`sas-hf serve`: [`~sas_hf.serve.server.serve`]."""

import typer
from rich.markup import escape

from ..hub.places import is_folder
from .shared import console, explain_errors


@explain_errors
def serve(context: typer.Context) -> None:
    """Serve MODEL over HTTP as OpenAI's API: `transformers serve`, with its flags (--help lists them)."""
    model = context.args[0] if context.args else "-"
    if not model.startswith("-") and not model.endswith(".gguf"):
        is_folder(model)
    from ..serve.server import serve

    serve(context.args, tell=lambda line: console.print(f"[yellow]note:[/yellow] {escape(line)}"))
