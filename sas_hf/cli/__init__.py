"""The command `sas-hf`: one file a command, each a thin coat of one public function.

Nothing heavy is imported before a command runs: its help and its usage errors need neither torch nor Transformers,
except those of `sas-hf serve`, which are Transformers' own.
"""

import os
import signal
import sys
from typing import Annotated

import typer

from ..version import __version__
from . import (
    capacity,
    convert,
    eval_data,
    eval_report,
    evaluate,
    export,
    fold,
    info,
    look,
    merge,
    paper,
    restore,
    serve,
    study,
    tokenizer,
    train,
)
from .convert import conversion_table
from .shared import Commands, console, explain_errors


__all__ = ["app", "conversion_table", "explain_errors"]


def show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"sas_hf {__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show and exit.")
    ] = False,
) -> None:
    """Simulated Attention Score for Hugging Face Transformers."""
    if not sys.stderr.isatty():  # a log is read later: no bars of the libraries
        for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    # So that what a command writes aside is removed when it is told to stop, as it is on Ctrl-C.
    for name in ("SIGTERM", "SIGHUP"):
        told = getattr(signal, name, None)
        if told is not None and signal.getsignal(told) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(told, lambda number, frame: sys.exit(128 + number))


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False)
"""The command `sas-hf`, as a Typer application."""
app.callback()(options)
app.command("convert")(convert.convert)
app.command("restore")(restore.restore)
app.command("fold")(fold.fold)
app.command("export")(export.export)
app.command("merge")(merge.merge)
app.command("tokenizer")(tokenizer.tokenizer)
app.command("train")(train.train)
app.command("study")(study.study)
app.command("paper")(paper.paper)
app.command("capacity")(capacity.capacity)
app.command("eval")(evaluate.evaluate)
app.command("eval-report")(eval_report.eval_report)
app.command("eval-data")(eval_data.eval_data)
app.command("info")(info.info)
app.command("look")(look.look)
# Its arguments and its help are Transformers' own.
as_they_are = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("serve", add_help_option=False, context_settings=as_they_are)(serve.serve)
