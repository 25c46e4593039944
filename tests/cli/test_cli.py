"""What a command is not given as it should be: one line that names the field, the value and the remedy."""

import io
import subprocess
import sys

import pytest
import torch
from helpers import python_environment
from rich.console import Console
from typer.testing import CliRunner

from sas_hf.cli import app, explain_errors
from sas_hf.cli.info import info_table
from sas_hf.hub.info import describe, find_config


def refused(*arguments) -> str:
    """The one line of a command that is refused."""
    shown = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(shown.exception, SystemExit) and shown.exit_code in (1, 2)
    (line,) = shown.stderr.splitlines()
    return line


@pytest.mark.parametrize("context", [-3, 0, 10**21])
def test_a_context_that_cannot_be(context):
    told = refused("info", "sas-125m", "--context", context)
    assert f"`context` is {context}; it must be a number of tokens from 1 to 100,000,000" in told


def test_a_context_beyond_learned_positions():
    told = refused("info", "amazon-super", "--context", 65)
    assert "`context` is 65; it must be a number of tokens from 1 to 64" in told
    assert CliRunner().invoke(app, ["info", "amazon-super", "--context", "64"]).exit_code == 0


def test_a_context_of_no_model_is_not_ignored():
    assert "`--context` is -3, but no MODEL is named" in refused("info", "--context", -3)


@pytest.mark.parametrize("value", ["abc", "nan", "1e99", "4.5"])
@pytest.mark.parametrize("form", ["--context {}", "--context={}"])
def test_what_is_no_number(value, form):
    told = refused("info", "sas-125m", *form.format(value).split())
    assert "Invalid value for '--context'" in told and f"It is {value!r}." in told and "See sas-hf info --help" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inf"], "No such command 'inf'. Did you mean 'info'? See sas-hf --help."),
        (["info", "--contxt", 3], "--contxt (Possible options: --context). See sas-hf info --help."),
        (["info", "sas-125m", "more"], "Got unexpected extra argument(s) (more). See sas-hf info --help."),
        (["convert", "source"], "Missing argument 'output'. See sas-hf convert --help."),
    ],
)
def test_what_no_command_has_is_told_with_the_help_that_lists_it(arguments, told):
    assert refused(*arguments).endswith(told)


def test_no_figure_is_cut_off_on_a_terminal_of_80():
    names = ("mha-10.6b", "sas-10.6b", "mqa-sas-125m", "cifar100-optimised")
    rows = {name: (config := find_config(name), describe(config, dtype=torch.bfloat16)) for name in names}
    console = Console(width=80, file=io.StringIO())
    console.print(info_table(rows, "bfloat16"))
    shown = console.file.getvalue()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    for figure in ("10,638.63", "3,460.30", "2,534,400", "0.377%", "(bfloat16)", "parameters", "simulation"):
        assert figure in shown


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["study", "cpu-kinds", "--output", ""], "--output"),
        (["study", "cpu-kinds", "--output="], "--output"),
        (["eval-data", "", "--tasks", "arc_easy"], "An argument"),
        (["export", "./none", ""], "An argument"),
        (["info", ""], "An argument"),
    ],
)
def test_an_empty_argument_is_not_the_working_directory(arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{name} is ''; give it a value, or leave it out" in refused(*arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("{file}", "{file} is not a folder"),
        ("{folder}", "{folder} has no config.json; it is not a checkpoint folder"),
        ("./none/here", "none/here does not exist"),
        ("no/such", "no/such is no folder here, nor a checkpoint that the Hub gives"),
    ],
)
def test_info_of_what_is_no_checkpoint(name, told, tmp_path):
    places = {"file": tmp_path / "file", "folder": tmp_path}
    places["file"].write_text("")
    assert told.format(**places) in refused("info", name.format(**places))


def test_a_report_of_what_is_no_result(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "picture.json").write_bytes(b"\xff\xfe")
    for name in ("none.json", "", "list.json", "picture.json"):
        told = refused("eval-report", tmp_path / name, "--report", tmp_path / "report")
        assert str(tmp_path / name) in told and "give what `sas-hf eval --output` wrote" in told
    told = refused("eval-report", tmp_path / "list.json", "--report", tmp_path / "list.json")
    assert "list.json', a file; name a folder" in told
    assert not (tmp_path / "report").exists()


def test_seeds_that_no_generator_takes(tmp_path):
    told = refused("study", "cpu-kinds", "--seeds", 2**32, "--output", tmp_path / "study")
    assert "`seeds` is [4294967296]; a seed is 0 or more, and less than 2**32" in told
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("moved", "place", "named", "folder"),
    [
        ("HOME", "home", "HF_HOME", "home/.cache/huggingface"),
        ("HF_DATASETS_CACHE", "data", "HF_DATASETS_CACHE", "data"),
    ],
)
def test_an_unwritable_cache_is_told_by_the_variable_that_moves_it(moved, place, named, folder, tmp_path):
    """Before anything is made of the data."""
    (tmp_path / "file").write_text("")
    environment = python_environment()
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    environment |= {"HOME": str(tmp_path), moved: str(tmp_path / "file" / place)}
    command = [sys.executable, "-m", "sas_hf", "train", "cpu", f"training.output_dir={tmp_path / 'run'}"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.returncode == 1 and not (tmp_path / "run").exists() and "Traceback" not in shown.stderr
    last = shown.stderr.splitlines()[-1]
    assert f"{named} is '{tmp_path}/file/{folder}', but no file can be written" in last
    assert f"Set {named} to a folder that can be written" in last


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("datasets", ' pip install "sas_hf[train]"'),
        ("lm_eval.tasks", ' pip install "sas_hf[eval]"'),
        ("torch", ""),  # of no extra
        ("mistyped", ""),
    ],
)
def test_a_module_that_is_missing_is_told_with_its_extra(module, told, capsys):
    @explain_errors
    def command():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    with pytest.raises(SystemExit):
        command()
    error = capsys.readouterr().err.strip()
    assert f"No module named '{module}'" in error and error.endswith(told or f"'{module}'")
