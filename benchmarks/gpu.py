r"""What a GPU does with SAS beside plain attention: everything at once, for whoever has one for ten minutes.

    python benchmarks/gpu.py --minutes 8 --output runs/gpu
    python benchmarks/gpu.py --minutes 8 --output runs/gpu --retry         # and what failed, once more
    python benchmarks/gpu.py --output runs/gpu --show                      # on any machine: table and plot again
    python benchmarks/gpu.py --minutes 2 --output runs/trial --size tiny   # tried where there is no GPU

In this order: the card; numbers in float32 and half beside the CPU's float64; training step, prefill and decoded
token; memory; every attention function; where the time goes; compiled; other lengths; the larger model. What tells
most comes first, and what no longer fits into the minutes, which count from the start of the command, is said to be
missing: the same command goes on with it. OUTPUT/figures.json and table.md are written after every cell, plot.png at
the end. What fails (memory, a kernel that refuses, a crash) is kept with its reason, and the rest goes on.

A time is the median over rounds in which all variants take turns, and of its ratio to plain attention in the same
round. Models: cost_rivals.py; `sas@cudnn` is `sas` by a function of gpu_measures.py.
"""

import argparse
import contextlib
import datetime
import math
import multiprocessing
import re
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from cost_rivals import COMPILED
from gpu_measures import COMPILED_FUNCTIONS, SCALES, Scale
from gpu_report import draw, table

from sas_hf.report.files import check_writable, locked, write_atomically
from sas_hf.report.kept import keep_figures, kept_figures


START = time.monotonic() - (time.time() - psutil.Process().create_time())  # of the command, imports included
LEAST, MOST = 0.5, 600.0  # minutes
AFTERWARDS = 12.0  # seconds for table and plot
LAST = 2.0  # with fewer seconds left no cell is begun
SHARE = 0.25  # of all time, after which a variant is given up

MODELS = ("mha", "llama", "sas", "sas-k5", "sas-heads", "paper")
CACHED = tuple(name for name in MODELS if name != "paper")  # which has no cache
REGIONAL = tuple(f"{name}-regional" for name in MODELS)


class Cell(NamedTuple):
    """What is measured together; the first variant is the measure of the others."""

    part: str
    size: str
    length: int
    variants: tuple[str, ...]

    @property
    def measure(self) -> str:
        return self.variants[0]

    @property
    def key(self) -> str:
        return f"{self.part} {self.size} {self.length}"

    @property
    def compiles(self) -> bool:
        """Whether `torch.compile` has work here."""
        words = {word for variant in self.variants for word in re.split("[-@]", variant)}
        return self.part == "decode-compiled" or not words.isdisjoint((*COMPILED, "fused", *COMPILED_FUNCTIONS))


def plan(scale: Scale, functions: list[str], cuda: bool) -> list[Cell]:
    """All cells, the most telling first."""
    (first, *others), lengths = scale.sizes, list(scale.lengths)
    middle = lengths.pop(1)
    called = by_function(functions)
    fast = tuple(variant for variant in called if variant.partition("@")[2] not in COMPILED_FUNCTIONS)
    slow = ("mha", *(variant for variant in called if variant not in fast))
    decoded = ("mha", *(variant for variant in fast if variant.startswith("sas@")))
    decodes = ["decode-static", *["decode-graph"] * cuda]

    def eager(size: str, length: int) -> list[Cell]:
        return [
            Cell("train", size, length, (*MODELS, "sas-kept")),
            Cell("prefill", size, length, MODELS),
            *(Cell(part, size, length, CACHED) for part in decodes),
            Cell("memory-train", size, length, (*MODELS, "sas-kept")),
        ]

    def compiled(size: str, length: int) -> list[Cell]:
        return [
            Cell("train", size, length, ("mha", "mha-regional", "sas-regional")),
            Cell("train", size, length, ("mha", *REGIONAL)),
            Cell("memory-train", size, length, ("mha", *REGIONAL)),
        ]

    cells = [
        Cell("rates", first, middle, ("product, half", "product, float32", "write")),
        *(Cell(f"correct-{kind}", first, middle, (*MODELS, *fast[1:])) for kind in ("float32", "half")),
        *eager(first, middle),
        Cell("train-autocast", first, middle, ("mha", "llama", "sas", "sas-heads")),
        Cell("bytes", first, middle, (*MODELS, "sas-kept")),
        Cell("train", first, middle, fast),
        Cell("profile", first, middle, ("mha", "sas")),
        *compiled(first, middle),
        Cell("profile", first, middle, ("sas-regional",)),
        *(Cell(part, first, middle, ("write", "sas", "sas-fused", "sas-k5")) for part in SIMULATIONS),
        Cell("train", first, middle, ("mha", "sas-fused")),
        Cell("memory-train", first, middle, fast),
        *(cell for length in lengths for cell in (*eager(first, length), Cell("train", first, length, fast))),
        Cell("train", first, middle, slow),
        *(Cell(f"correct-{kind}", first, middle, slow) for kind in ("float32", "half")),
        Cell("correct-half", first, middle, ("mha", *REGIONAL)),
        Cell("decode-dynamic", first, middle, CACHED),
        Cell("decode-dynamic", first, middle, decoded),
        Cell("prefill", first, middle, fast),
        *(cell for size in others for length in (middle, *lengths) for cell in eager(size, length)),
        *(cell for size in others for cell in (Cell("train", size, middle, fast), *compiled(size, middle))),
        Cell("forward", first, middle, ("mha", *REGIONAL)),
        Cell("train", first, middle, ("mha", "mha-compiled", "sas-compiled")),
        Cell("decode-compiled", first, middle, CACHED),
        *(cell for length in lengths for cell in (*compiled(first, length), Cell("train", first, length, slow))),
        *(cell for size in others for length in lengths for cell in compiled(size, length)),
        Cell("decode-dynamic", first, middle, ("mha", *(variant for variant in slow if variant.startswith("sas@")))),
    ]
    return cells if cuda else sorted(cells, key=lambda cell: cell.compiles)  # for a CPU that takes long


SIMULATIONS = ("simulation", "simulation-train")


def by_function(functions: list[str]) -> tuple[str, ...]:
    """Plain attention, simulated and simulated heads alone, each by every function that may serve it. Where keys are
    as wide as values, nothing is padded."""
    variants = ["mha"]
    for name in functions:
        plain = not name.endswith("-padded")
        variants += [f"{model}@{name}" for model in ("mha", "sas", "sas-heads") if plain or model == "sas"]
    return tuple(variants)


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not LEAST <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes from {LEAST:g} to {MOST:g}")
    return value


def arguments_of(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=minutes, default=8.0, help="from the start of the command to its end")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--size", choices=SCALES, default="paper", help="tiny: of no use but to try the command")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--show", action="store_true", help="measure nothing: table and plot of what OUTPUT holds")
    arguments = parser.parse_args(command)
    try:
        check(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Raise a ValueError or an OSError where this cannot be done."""
    where = f"--output {arguments.output}"
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"{where} is a file: name a folder.")
    if arguments.show and not (arguments.output / "figures.json").is_file():
        raise ValueError(f"{where} holds no figures.json to show.")
    results_in(arguments.output, {})
    check_writable(arguments.output, where)
    if not arguments.show and arguments.size != "tiny" and not torch.cuda.is_available():
        raise ValueError(
            "PyTorch finds no GPU on this machine. `--size tiny` tries the command without one, and its times tell "
            "nothing."
        )


def results_in(output: Path, settings: dict) -> dict:
    return kept_figures(output / "figures.json", settings, f"--output {output}")


class Worker:
    """The process that measures. It ends with this one, however that ends."""

    def __init__(self, arguments: argparse.Namespace, device: str):
        self.log = arguments.output / "worker.log"  # what libraries write
        self.connection, other = multiprocessing.Pipe()
        command = [sys.executable, Path(__file__).with_name("gpu_measures.py")]
        command += [other.fileno(), arguments.size, device]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[other.fileno()],
            )
        other.close()

    def message(self, seconds: float) -> tuple[str, Any] | None:
        """The next within so many seconds; `None` where there is none, and an EOFError where the process ended."""
        if not wait([self.connection], max(0.0, seconds)):
            return None
        try:
            return self.connection.recv()
        except ConnectionResetError as error:
            raise EOFError from error

    def end(self, patience: float = 0.0) -> str:
        """Whatever it does after so many seconds; how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        status = self.process.poll()
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.connection.close()
        return f"signal {-status}" if status and status < 0 else f"exit status {status}: {self._last_line()}"

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")


class Session:
    """From the start of the command to its end."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.device = arguments, "cuda" if torch.cuda.is_available() else "cpu"
        self.deadline = START + 60 * arguments.minutes - AFTERWARDS
        self.patience = SHARE * 60 * arguments.minutes
        self.worker, self.results, self.cells = None, None, []
        self.tried, self.begun_again = set(), set()  # variants in their cells; cells

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self) -> None:
        """Cell by cell, until all are there or the time is over.

        Raises:
            ValueError: where OUTPUT holds figures of another card or other versions.
            RuntimeError: where the process that measures does not start, or not in time.
        """
        self._begin()
        for cell in self.cells:
            done = False
            while not done and self.left > LAST and (variants := self._wanted(cell)):
                start, done = time.monotonic(), self._measure(cell, variants)
                held = self.results["figures"].get(cell.key, {})
                failed = sum("failed" in held.get(variant, ()) for variant in variants)
                print(
                    f"{cell.part} {cell.size} {cell.length:,}: {len(variants)} variants, {failed} failed, "
                    f"{time.monotonic() - start:.0f} s; {max(0, self.left):.0f} s left",
                    flush=True,
                )

    def end(self) -> None:
        if self.worker is not None:
            self.worker.end()

    def _begin(self) -> None:
        """Start the process that measures, and see what it measures on."""
        self.worker = Worker(self.arguments, self.device)
        import matplotlib.figure  # noqa: F401  while the other starts, for there may be little time for the plot

        try:
            message = self.worker.message(self.left)
        except EOFError:
            raise RuntimeError(f"The process that measures does not start ({self.worker.end(5)}).") from None
        if message is None:
            raise RuntimeError("The time was over before the process that measures had started: give it more.")
        _, found = message
        if self.results is not None:
            return
        settings = {"size": self.arguments.size, **found["settings"]}
        self.results = results_in(self.arguments.output, settings)
        self.cells = plan(SCALES[self.arguments.size], found["rest"]["functions"], self.device == "cuda")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.results |= {"environment": found["rest"], "plan": [cell._asdict() for cell in self.cells]}
        self.results["runs"] = [*self.results.get("runs", []), {"date": now, "commit": commit()}]
        self._save()

    def _due(self, cell: Cell) -> set[str]:
        """What is not there yet."""
        held = self.results["figures"].get(cell.key, {})
        return {
            variant
            for variant in cell.variants
            if variant not in held
            or (self.arguments.retry and "failed" in held[variant] and (cell.key, variant) not in self.tried)
        }

    def _wanted(self, cell: Cell) -> list[str]:
        """What is due, behind the measure; without it where that failed."""
        due = self._due(cell)
        if due and "failed" not in self.results["figures"].get(cell.key, {}).get(cell.measure, ()):
            due.add(cell.measure)
        return [variant for variant in cell.variants if variant in due]

    def _measure(self, cell: Cell, variants: list[str]) -> bool:
        """Whether the cell is done; otherwise the process ended within it, and what is left may be tried again."""
        if self.worker is None:
            self._begin()
        asked = cell._replace(variants=variants)._asdict() | {"measure": cell.measure, "seconds": self.left}
        now, failure = None, None
        try:
            self.worker.connection.send(asked)
            while message := self.worker.message(limit := min(self.patience, self.left)):
                kind, content = message
                if kind == "now":
                    now = content
                    continue
                self._keep(cell, content)
                if kind == "done":
                    return True
            if limit == self.patience:
                failure = f"given up after {limit:.0f} s"
            self.worker.end()
        except (EOFError, OSError):
            failure = f"the process that measures ended ({self.worker.end(5)})"
        self.worker = None
        blamed = {now} & self._due(cell) if failure else set()
        if failure and not blamed and cell in self.begun_again:
            blamed = self._due(cell)
        if blamed:
            self._keep(cell, {variant: {"failed": failure} for variant in blamed})
        self.begun_again.add(cell)
        return False

    def _keep(self, cell: Cell, figures: dict[str, dict]) -> None:
        """What there is stays: the measure is measured again with each new variant."""
        held = self.results["figures"].setdefault(cell.key, {})
        for variant, entry in figures.items():
            self.tried.add((cell.key, variant))
            if "failed" in held.get(variant, {"failed": None}):
                held[variant] = entry
        self._save()

    def _save(self) -> None:
        self.results["runs"][-1]["seconds"] = round(time.monotonic() - START)
        keep_figures(self.arguments.output / "figures.json", self.results)
        write_atomically(self.arguments.output / "table.md", table(self.results).encode())


def commit() -> str | None:
    """Of this repository, with a plus sign where files were changed since."""
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError):
        found = subprocess.run(described, capture_output=True, text=True, check=False)
        return found.stdout.strip() or None
    return None


def report(output: Path, results: dict) -> None:
    text = table(results)
    write_atomically(output / "table.md", text.encode())
    print(text, flush=True)
    draw(results, output / "plot.png")


def main() -> None:
    arguments = arguments_of()
    if arguments.show:
        report(arguments.output, results_in(arguments.output, {}))
        return
    with locked(arguments.output, f"--output is {str(arguments.output)!r}", in_place=True):
        session = Session(arguments)
        try:
            session.run()
        except KeyboardInterrupt:
            print("Stopped.")
        except (ValueError, RuntimeError) as error:
            sys.exit(f"gpu.py: {error}")
        finally:
            session.end()
        if session.results is not None:
            report(arguments.output, session.results)


if __name__ == "__main__":
    main()
