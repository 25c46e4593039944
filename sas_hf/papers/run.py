"""`run_item`: a table or figure of a paper, made here, beside what is printed."""

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from accelerate import PartialState

from ..report.figures import require_matplotlib
from ..report.files import LOCK_NAME, locked, write_atomically, writing
from ..training.estimates import Estimates, check_memory, estimate
from ..training.fields import read_yaml
from ..training.folders import holds
from .comparison import RESULT_NAME, ItemResult
from .items import Place, find_place
from .measured import MEASURED
from .training import plan_parts, result_of, run_parts


RUNS = Path("runs/papers")
# What an output folder was made for.
ITEM_NAME = "item.yaml"


def run_item(
    paper: str,
    name: str,
    size: str = "cpu",
    data: str | Path | None = None,
    seeds: list[int] | None = None,
    runs: str | Path = RUNS,
    output: str | Path | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    progress: Callable[[str], None] = lambda message: None,
) -> ItemResult:
    """
    Make a table or figure: what is there already is kept, and the same call goes on where a killed one stopped.

    Args:
        paper: "sas" or "better".
        name: such as "table7" or "figure1".
        size: "cpu" or "paper".
        data: folder with the data; an item says what it needs.
        seeds: in the place of the declared ones.
        runs: folder of all trainings, which items share.
        output: of this item's tables and figures; `RUNS/SIZE/PAPER-ITEM` by default.
        overrides: fields of every recipe, such as "training.max_steps=100".
        progress: is told what is done, and how long is left.

    Returns:
        the result, which is also in the output folder.

    Raises:
        ValueError: for an unknown item, data that are missing, fields that cannot be changed so, or a size that this
            machine cannot hold; before anything is built.
        FileNotFoundError: where the data folder lacks a file.
        FileExistsError: where the output folder holds another item.
        ImportError, BlockingIOError, PermissionError, InterruptedError: as [`run_study`].
    """
    require_matplotlib()
    place = find_place(paper, name, size)
    folder = output_of(place, runs, output)
    command = spell_command(place, data, seeds, overrides)
    if place.item.kind == "training":
        data = None if data is None else Path(data)
        parts = plan_parts(place, Path(runs), folder / "study", data, seeds, overrides)
        check_memory([run for part in parts for run in part.runs])

        def make() -> ItemResult:
            return result_of(place, parts, run_parts(parts, overrides, progress), command, data, overrides)
    else:
        _check_measured(place, data, seeds, overrides)

        def make() -> ItemResult:
            return MEASURED[place.item.kind](place, folder, command, progress, **place.at.arguments)

    with claimed(folder, place):
        result = make()
        if PartialState().is_main_process:
            result.save(folder)
    return result


def estimate_item(
    paper: str,
    name: str,
    size: str = "cpu",
    data: str | Path | None = None,
    seeds: list[int] | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    progress: Callable[[str], None] = lambda message: None,
) -> Estimates:
    """
    What the trainings of an item take; nothing is written. Raises as [`run_item`], but for what a machine cannot hold.

    Raises:
        ValueError: for an item that is not trained.
    """
    place = find_place(paper, name, size)
    if place.item.kind != "training":
        raise ValueError(f"{paper} {name} is measured, not trained, and has nothing to estimate; run it.")
    parts = plan_parts(place, RUNS, RUNS, None if data is None else Path(data), seeds, overrides, needs_data=False)
    return estimate([run for part in parts for run in part.runs], progress)


def output_of(place: Place, runs: str | Path = RUNS, output: str | Path | None = None) -> Path:
    return Path(runs) / place.size / f"{place.paper}-{place.name}" if output is None else Path(output)


def has_run(place: Place, runs: str | Path = RUNS) -> bool:
    """Whether the item's default folder has its result."""
    return (output_of(place, runs) / RESULT_NAME).is_file()


@contextlib.contextmanager
def claimed(folder: Path, place: Place) -> Iterator[None]:
    """The item's folder, for one process alone.

    Raises:
        FileExistsError: where it holds something else.
        BlockingIOError: where another process is at work in it.
    """
    where = f"`output` is {str(folder)!r}"
    ours = {"paper": place.paper, "item": place.name, "size": place.size}
    if holds(folder, ITEM_NAME, where, "item of a paper"):
        there = read_yaml((folder / ITEM_NAME).read_text(encoding="utf-8"))
        if there != ours:
            raise FileExistsError(
                f"{where}, which holds {there['paper']} {there['item']} at the size {there['size']!r}, not "
                f"{place.paper} {place.name} at {place.size!r}; name another folder."
            )
    with locked(folder, where, in_place=True), writing(folder):
        path, is_main = folder / ITEM_NAME, PartialState().is_main_process
        if is_main:
            write_atomically(path, yaml.safe_dump(ours, sort_keys=False).encode())
        try:
            yield
        except BaseException:
            # What was refused at once leaves nothing.
            if is_main and not any(each.name not in (ITEM_NAME, LOCK_NAME) for each in folder.iterdir()):
                path.unlink()
            raise


def spell_command(
    place: Place, data: str | Path | None, seeds: list[int] | None, overrides: list[str] | tuple[str, ...]
) -> str:
    """The command line that makes the item again."""
    words = ["sas-hf", "paper", place.paper, place.name]
    words += ["--size", place.size] if place.size != "cpu" else []
    words += ["--data", "FOLDER"] if data is not None else []
    words += ["--seeds", ",".join(map(str, seeds))] if seeds is not None else []
    return " ".join([*words, *map(shlex.quote, overrides)])


def _check_measured(place: Place, data, seeds, overrides) -> None:
    given = {"data": data, "seeds": seeds, "overrides": list(overrides) or None}
    if useless := [f"`{name}`" for name, value in given.items() if value is not None]:
        raise ValueError(f"{place.paper} {place.name} is measured, not trained, and has no {', '.join(useless)}.")
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:  # Accelerate itself sees one of torchrun on a CPU
        raise ValueError(
            f"{place.paper} {place.name} is measured by one process, and {processes} were started, which would slow "
            "each other down; call it without a launcher."
        )
