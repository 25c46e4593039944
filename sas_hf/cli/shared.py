"""What all commands share: how errors are told, what is shown, and how options with several values are read."""

import functools
import importlib.metadata
import itertools
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from ..hub.places import is_folder
from ..report.files import unwritable_cache, writing


console = Console()
USAGE_ERROR: Any = typer.BadParameter.__base__  # of typer's own click, as is what it calls a context
# How long a process waits with an error that the first one may have too.
SECONDS_FOR_THE_FIRST = 10
PaperSizes = Annotated[
    str | None,
    typer.Option(help="Whose printed rows to show, such as 350M,1.5B. By default those of about the models' sizes."),
]


class Commands(TyperGroup):
    """Tells what is wrong with a command's arguments in one line, with the value; exit status 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["given"] = list(args)
        for before, value in itertools.pairwise(["", *args]):
            option, equals, text = value.partition("=") if value.startswith("--") else (value, "", value)
            if value == "" or (equals and not text):
                name = option or (before if before.startswith("--") else "An argument")
                show_error(f"{name} is ''; give it a value, or leave it out. Was a variable of the shell not set?")
                sys.exit(2)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any):
        try:
            return super().invoke(ctx)
        except USAGE_ERROR as error:
            names = getattr(getattr(error, "param", None), "opts", [])
            given = itertools.chain.from_iterable(
                value.split("=", 1) if value.startswith("--") else [value] for value in ctx.meta["given"]
            )
            values = [f" It is {value!r}." for name, value in itertools.pairwise(given) if name in names]
            message = error.format_message().rstrip(".")
            message += "" if message.endswith("?") else "."
            command = f"{ctx.invoked_subcommand} " if error.ctx not in (None, ctx) else ""
            show_error(f"{message}{''.join(values[:1])} See sas-hf {command}--help.")
            sys.exit(2)


def show_progress(message: str) -> None:
    console.print(f"[cyan]{message}[/cyan] ...")


def show_error(message: str) -> None:
    """On one line; messages may hold brackets, which are not meant as markup."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}")


def explain_errors(command: Callable) -> Callable:
    """Show what the user can mend as one line instead of a traceback, and exit with status 1; 130 after Ctrl-C.

    Of several processes that fail alike, the launcher ends the others once the first of a machine has spoken.
    """

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        try:
            with writing():
                return command(*args, **kwargs)
        except Exception as error:
            cache = unwritable_cache(error)
            if not isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
                reason = _reason_of_a_field(error)
                if reason is None and cache is None:
                    raise
                error = reason or error
            if not first:
                time.sleep(SECONDS_FOR_THE_FIRST)  # then it did not fail, and this is the reason
            show_error(f"{type(error).__name__}: {cache or error}{missing_extra(error)}")
            sys.exit(1)
        except KeyboardInterrupt as error:
            if first:
                message = escape(str(error)) or "Nothing half-written is left; what was whole stays."
                Console(stderr=True, soft_wrap=True).print(f"[yellow]interrupted:[/yellow] {message}")
            sys.exit(130)

    return wrapped


def _reason_of_a_field(error: Exception) -> Exception | None:
    """What a configuration of Transformers says is wrong with it; `None` for other errors."""
    from huggingface_hub.errors import StrictDataclassError

    cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
    return cause if isinstance(cause, Exception) else None


@explain_errors
def check_places(parameter: typer.CallbackParam, value: Any):
    """
    The callback of every argument and option that names checkpoints: a path where none can be is refused before torch
    and Transformers are imported, which takes seconds. The Hub is not asked yet. A `~` that the shell left alone, as
    in `--tokenizer=~/mine`, is the home folder.
    """
    if isinstance(value, list):
        return [check_places(parameter, place) for place in value]
    if value is not None:
        value = os.path.expanduser(value)
        try:
            is_folder(value)
        except FileNotFoundError as error:
            option = parameter.opts[0]
            raise FileNotFoundError(f"`{option}`: {error}" if option.startswith("-") else str(error)) from error
    return value


def missing_extra(error: BaseException) -> str:
    """Of a module that is not installed: how to install what has it, where it comes with an extra of this package."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    package = error.name.partition(".")[0].replace("_", "-").lower()
    extras = [
        extra.strip('"')
        for needed, _, extra in (line.partition("; extra == ") for line in importlib.metadata.requires("sas_hf") or ())
        if extra and re.split(r"[^\w-]", needed, maxsplit=1)[0].replace("_", "-").lower() == package
    ]
    return f'; it comes with an extra: pip install "sas_hf[{extras[-1]}]"' if extras else ""


def parse_numbers(text: str, option: str, example: str, kind: type = int) -> list:
    """Of `kind`, `int` or `float`."""
    try:
        return [kind(name) for name in split_names(text)]
    except ValueError as error:
        raise ValueError(f"`{option}` is {text!r}; it must be numbers with commas, such as {example}.") from error


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def show_report(report, folder: Path | None) -> None:
    console.print(report.rich())
    for path in report.save(folder) if folder is not None else []:
        console.print(f"[green]Saved[/green] {path}")
