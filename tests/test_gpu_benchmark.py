"""`benchmarks/gpu.py` at its tiniest, on the CPU: killed and gone on with, its file, table and plot, its refusals."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import python_environment


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FIRST, SECOND = "correct-float32 cpu 64", "correct-half cpu 64"


def command(*options: object) -> list[str]:
    return [str(part) for part in (sys.executable, BENCHMARKS / "gpu.py", *options)]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def figures(folder: Path) -> dict[str, dict]:
    file = folder / "figures.json"
    return json.loads(file.read_text())["figures"] if file.exists() else {}


def until(happened, process: subprocess.Popen) -> None:
    while not happened():
        assert process.poll() is None, "it ended before"
        time.sleep(0.05)


def test_a_killed_run_goes_on(tmp_path, gpu, capsys, monkeypatch):
    options = [str(option) for option in ("--size", "tiny", "--minutes", 20, "--output", tmp_path)]
    process = subprocess.Popen(command(*options), env=python_environment(), stdout=subprocess.DEVNULL)
    until(lambda: len(figures(tmp_path).get(FIRST, {})) > 12, process)
    (worker,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert not psutil.wait_procs([worker], timeout=60)[1]
    held = figures(tmp_path)
    assert held["rates cpu 64"]["write"]["value"] > 0
    assert held[FIRST]["sas"]["value"] < 1e-5 and held[FIRST]["sas"]["gradients"] < 1e-5
    assert "same last dimension" in held[FIRST]["sas@flash"]["failed"]
    assert held[FIRST]["sas@flash-padded"]["gradients"] < 1e-5

    class Mortal(gpu.Worker):
        """Crashes once, within the next cell."""

        lives = 1

        def message(self, seconds):
            found = super().message(seconds)
            if found == ("now", "sas") and Mortal.lives:
                Mortal.lives = 0
                self.process.kill()
            return found

    class Short(gpu.Session):
        """Its time is over where a kernel has refused: in the middle of a cell."""

        def _keep(self, cell, found):
            super()._keep(cell, found)
            if "sas@flash" in found:
                self.deadline = time.monotonic()

    monkeypatch.setattr(gpu, "START", time.monotonic())  # this process may be older than the minutes are long
    monkeypatch.setattr(gpu, "Worker", Mortal)
    session = Short(gpu.arguments_of(options))
    session.run()
    assert session.worker is None
    gpu.report(tmp_path, session.results)
    results = json.loads((tmp_path / "figures.json").read_text())
    for key, cell in held.items():
        assert {name: results["figures"][key][name] for name in cell} == cell
    crashed, refused = results["figures"][SECOND].values()
    assert crashed == {"failed": "the process that measures ended (signal 9)"}
    assert "same last dimension" in refused["failed"]
    assert [run["seconds"] > 0 for run in results["runs"]] == [True, True]
    printed = (tmp_path / "table.md").read_text()
    said = capsys.readouterr().out
    assert printed in said
    assert f"{SECOND}: " in said and f"{FIRST}: " not in said  # which is not measured again
    assert max(map(len, printed.splitlines())) <= 80
    assert "correct-half cpu: 23 of 25" in " ".join(printed.split())
    assert "A TRIAL" in printed and "Flash attention requires q,k,v" in printed

    with pytest.raises(ValueError, match=r"holds figures with card .* not 'another'"):
        gpu.results_in(tmp_path, results["settings"] | {"card": "another"})


TIMED = {"value": 2.0, "ratio": 1.5, "smallest": 1.25, "largest": 1.75, "first_s": 1.0}


def test_what_the_table_says_of_times(gpu):
    """Of figures made up: what failed, what is wrong, what recomputation costs, where the time goes."""
    cells = gpu.plan(gpu.SCALES["paper"], ["flash", "flash-padded", "flex"], cuda=True)
    entries = {
        "train 125m 1024": {
            "mha": {"value": 20.0, "ratio": 1.0, "smallest": 1.0, "largest": 1.0, "rounds": [20.0, 20.0]},
            "sas": TIMED | {"rounds": [33.0, 30.0]},
            "sas-kept": TIMED | {"rounds": [30.0, 30.0]},
            "sas@flash": {"failed": "refused"},
            "sas@cudnn": TIMED | {"ratio": 1.25},
            "sas-regional": TIMED | {"ratio": None, "first_s": 31.0},
            "paper": TIMED | {"ratio": None},
        },
        "train 350m 4096": {"mha": {"failed": "OutOfMemoryError: CUDA out of memory."}},
        "correct-half 125m 1024": {"sas": {"value": 1e-3, "gradients": 0.5, "ratio": 40.0}},
        "bytes 125m 1024": {"mha": {"value": 8000, "ratio": 1.0}, "sas": {"value": 12000, "ratio": 1.5}},
        "profile 125m 1024": {
            "sas": {"value": 40.0, "busy_ms": 20.0, "kernels": 3, "rows": [["a" * 90, 15.0, 2], ["b", 5.0, 1]]}
        },
    }
    results = {
        "settings": {"size": "paper", "card": "a card", "torch": "2"},
        "environment": {"functions": ["flash"], "dtype": "bfloat16"},
        "runs": [{"date": "today", "commit": None, "seconds": 1}],
        "plan": [cell._asdict() for cell in cells],
        "figures": entries,
    }
    lines = gpu.table(results).splitlines()
    assert max(map(len, lines)) <= 80

    def row(name: str) -> list[str]:
        return [part.strip() for line in lines if line.startswith(f"| {name} ") for part in line.split("|")[2:-1]]

    assert row("mha")[:3] == ["", "20", ""] and row("sas-kept") == ["", "1.50 (1.25-1.75)", ""]
    assert row("paper") == ["", "2", ""] and row("sas@flash") == ["", "failed 1)", ""]
    text = "\n".join(lines)
    assert "WRONG 1.0e-03; 5.0e-01" in text and "12,000 (1.50)" in text
    assert "125m, 1,024: mha 1.00, sas@cudnn 1.25, sas-kept 1.50" in text
    assert "First calls" in text and "  train, 125m, 1,024: sas-regional 31" in text
    assert "125m, 1,024: +5.0% (+0.0% to +10.0%)" in text and "| 15 |   75% |     2 | aaaa" in text
    assert "2) OutOfMemoryError: CUDA out of memory." in text and "A TRIAL" not in text


def test_the_plan_has_every_cell_of_the_grid(gpu):
    functions = list(importlib.import_module("gpu_measures").FUNCTIONS)
    cells = gpu.plan(gpu.SCALES["paper"], functions, cuda=True)
    held = {}
    for cell in cells:
        held.setdefault(cell.key, set()).update(cell.variants)
    for size in ("125m", "350m"):
        for length in (512, 1024, 4096):
            train = held[f"train {size} {length}"]
            assert {*gpu.MODELS, *gpu.REGIONAL, "sas-kept"} <= train
            assert set(gpu.MODELS) <= held[f"prefill {size} {length}"]
            assert set(gpu.CACHED) <= held[f"decode-static {size} {length}"]
            assert {*gpu.MODELS, *gpu.REGIONAL} <= held[f"memory-train {size} {length}"]
    assert {f"sas@{name}" for name in functions} <= held["train 125m 1024"] & held["correct-half 125m 1024"]
    assert not {"mha@flash-padded", "sas-heads@cudnn-padded"} & held["train 125m 1024"]
    eager = [cell for cell in cells if not cell.compiles]
    assert not gpu.plan(gpu.SCALES["tiny"], ["flex"], cuda=False)[0].compiles
    assert cells.index(eager[4]) == 4 and cells[1].part == "correct-float32"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--minutes", "0"), "'0' is not a number of minutes from 0.5 to 600"),
        (("--minutes", "nan"), "'nan' is not a number of minutes"),
        (("--minutes", "eight"), "'eight' is not a number of minutes"),
        (("--size", "huge"), "invalid choice: 'huge'"),
        (("--show",), "holds no figures.json to show"),
        ((), "PyTorch finds no GPU on this machine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refused_before_any_work(options, message, gpu, tmp_path, capsys):
    if not options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as ended:
        gpu.arguments_of(["--output", str(tmp_path / "new"), *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file", "foreign"])
def test_another_output_is_refused(name, gpu, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "figures.json").write_text("[]")
    with pytest.raises(SystemExit):
        gpu.arguments_of(["--size", "tiny", "--output", str(tmp_path / name)])
    assert {"file": "is a file", "foreign": "is no file of figures"}[name] in capsys.readouterr().err
