"""What README and docs tell to run is run where it can be: Python as it stands, commands by the parsers they have.

Long trainings are parsed and their fields checked. Python that needs what is not here stands under a comment in the
page, `<!-- needs: ... -->`, and is compiled.
"""

import argparse
import os
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from helpers import real_text, train_tokenizer
from test_documentation import DOCUMENTS, ROOT
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from sas_hf.cli import app
from sas_hf.papers.items import load_item
from sas_hf.training.recipe import load_recipe, recipe_names
from sas_hf.training.study import load_study, plan_runs, study_names


COMMANDS = typer.main.get_command(app).commands
PAGES = [document for document in DOCUMENTS if document.name != "CONTRIBUTING.md"]  # whose Python tests of its own run
NOT_OURS = {"sentence_transformers", "torchao", "vllm"}  # nor of the extra `dev`
# Programs of others, whose own words we cannot check here.
OTHERS = {"hf", "pre-commit", "accelerate", "torchrun", "pytest"}


def indented(text: str) -> list[str]:
    """The blocks that four spaces make."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks = re.findall(r"(?:^    .*\S.*\n)+", prose, flags=re.M)
    return [re.sub(r"^    ", "", block, flags=re.M) for block in blocks]


def shell_lines(document: Path) -> list[str]:
    """The commands of a document's blocks, one each."""
    text = document.read_text()
    blocks = [*re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S), *indented(text)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def python_blocks(document: Path) -> list[tuple[str | None, str]]:
    """What each needs that is not here, or None; and the code."""
    found = re.findall(
        r"(?:^<!-- needs: ([^\n]*?) -->\n\n)?^```python\n(.*?)^```", document.read_text(), flags=re.M | re.S
    )
    return [(needs or None, code) for needs, code in found]


ALL_LINES = [(document.name, line) for document in DOCUMENTS for line in shell_lines(document)]


class Parsed(Exception):
    """Ends a script when its arguments have been read."""


@pytest.fixture
def parsers_that_end(monkeypatch):
    """Scripts parse what they are given, and do nothing."""

    def ending(parser, method):
        real = getattr(parser, method)

        def parse(*args, **kwargs):
            raise Parsed(real(*args, **kwargs))

        monkeypatch.setattr(parser, method, parse)

    ending(argparse.ArgumentParser, "parse_args")
    ending(HfArgumentParser, "parse_args_into_dataclasses")


def parse_ours(name: str, words: list[str]) -> None:
    """By the command's own parser; a file or folder that must be there is made when it is asked for."""
    while True:
        try:
            COMMANDS[name].make_context(name, list(words))
            return
        except Exception as error:
            missing = re.search(r"^(\w+) '(.+)' does not exist", str(getattr(error, "message", "")))
            if missing is None:
                raise
            path = Path(missing[2])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if missing[1].startswith("dir") else path.touch()


def check_names(name: str, words: list[str]) -> None:
    """Recipes, studies and items of the package, and the fields that are changed of them."""
    named, *rest = [word for word in words if not word.startswith("-")] or [None]
    fields = [word for word in rest if re.match(r"[a-z_.]+=", word)]
    if name == "train" and named in recipe_names():
        load_recipe(named, fields, needs_data=False)
    elif name == "study" and named in study_names():
        plan_runs(load_study(named), fields, needs_data=False)
    elif name == "paper" and rest:
        load_item(named, rest[0])


@pytest.mark.parametrize(("document", "line"), ALL_LINES, ids=[f"{name}-{line[:50]}" for name, line in ALL_LINES])
def test_a_command_is_one(document, line, parsers_that_end, monkeypatch, tmp_path):
    words = shlex.split(line, comments=True)
    while "=" in words[0]:  # of the environment
        del words[0]
    program, words = words[0], words[1:]
    if program == "python" and words[0] == "-m" and words[1].startswith("sas_hf"):
        program, words = ("sas-hf", words[2:]) if words[1] == "sas_hf" else (program, words)
    if program == "sas-hf":
        monkeypatch.chdir(tmp_path)
        if words and words[0] != "serve":  # whose arguments are Transformers' own
            parse_ours(words[0], words[1:])
            check_names(words[0], words[1:])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words:
            variable, equals, _ = word.partition("=")
            assert re.search(rf"^{variable} \?=" if equals else rf"^{word}:", makefile, flags=re.M), word
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.findall(r"\[(.*?)\]", " ".join(words))
        # Not editable, through which type checkers see nothing.
        assert words[0] == "install" and words[1].startswith(".") and len(words) == 2
        assert all(extra in extras for names in asked for extra in names.split(","))
    elif program == "python" and words[0].endswith(".py") and not words[0].startswith("tests/"):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "path", [str(ROOT / words[0].partition("/")[0]), *sys.path])
        try:
            with pytest.raises(Parsed):
                runpy.run_path(words[0], run_name="__main__")
        except ModuleNotFoundError as error:
            if error.name not in NOT_OURS:
                raise
            pytest.skip(f"{words[0]} needs {error.name}, which is not installed")
    elif program == "python" and words[0] == "-c":
        compile(words[1], document, "exec")
    elif program == "python" or program.endswith("/bin/python") or program.endswith("/bin/pip"):
        for word in words:
            assert not word.startswith(("tests/", "benchmarks/")) or (ROOT / word).exists(), word
    else:
        assert program in OTHERS, line


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny Llama that stands for SmolLM2-135M."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=3, max_position_embeddings=512, pad_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(source, tmp_path, monkeypatch) -> Path:
    """A folder where that Llama lies by the name that the pages give it."""
    (tmp_path / "HuggingFaceTB").mkdir()
    os.symlink(source, tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    (tmp_path / "README.md").write_text("\n\n".join(real_text()[:20]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_commands(lines: list[str], shorter: dict[str, list[str]] | None = None) -> None:
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        if program == "sas-hf":
            found = CliRunner().invoke(app, words + (shorter or {}).get(words[0], []), catch_exceptions=False)
            assert found.exit_code == 0, f"{line}\n{found.output}"


def run_python(document: Path, known: dict | None = None) -> dict:
    """Everything of a document that needs nothing else, one after the other."""
    names = {"__name__": "__main__", **(known or {})}
    for needs, code in python_blocks(document):
        compiled = compile(code, document.name, "exec")
        if needs is None:
            exec(compiled, names)
    return names


def test_getting_started(workplace):
    """The whole page, with a training of four steps."""
    document = ROOT / "docs" / "start.md"
    lines = shell_lines(document)
    trained = next(number for number, line in enumerate(lines) if "look" in line)
    run_commands(lines[:trained], {"train": ["training.max_steps=4", "data.validation_documents=1"]})
    names = run_python(document)
    assert names["model"].config.model_type == "sas_gpt"
    run_commands(lines[trained:])
    assert all((workplace / name).exists() for name in ("page.html", "converted.html", "for-the-hub/README.md"))


def test_readme(workplace):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8
    names = run_python(ROOT / "README.md", {"dataset": rows, "texts": list(real_text()[:80])})
    assert names["report"]["fidelity"]["max_abs_difference"] < 1e-3
    assert names["trainer"].state.global_step > 0


def test_looking(workplace):
    run_commands(["sas-hf convert HuggingFaceTB/SmolLM2-135M smollm2-sas"])
    assert run_python(ROOT / "docs" / "look.md")["found"].places
    assert (workplace / "page.html").exists()


RUN = {"README.md", "look.md", "start.md"}


@pytest.mark.parametrize("document", [page for page in PAGES if page.name not in RUN], ids=lambda page: page.name)
def test_python(document, workplace):
    run_python(document)


def yaml_blocks(name: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / name).read_text(), flags=re.M | re.S)


def test_the_recipe_of_a_page_is_one(tmp_path):
    (block,) = yaml_blocks("training.md")
    (tmp_path / "mine.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "mine.yaml", needs_data=False)
    assert recipe.model.config == "gqa-sas-125m" and recipe.training["max_steps"] == 100_000


def test_the_studies_of_a_page_are_some(tmp_path):
    whole, matched = yaml_blocks("studies.md")
    variants = "variants: {mha: {}, sas: {model: {overrides: {num_simulated_heads: 12}}}}\n"
    others = f"recipe: cpu-study\noutput: runs/matched\nseeds: [0]\n{variants}{matched}"
    for text, known in ((whole, {"kernel-1", "kernel-5"}), (others, {"mha", "sas", "mha-wide", "mha-long"})):
        (tmp_path / "study.yaml").write_text(text)
        runs = plan_runs(load_study(tmp_path / "study.yaml"), needs_data=False)
        assert {run.variant for run in runs} == known


def test_the_snippets_of_contributing_are_run_by_tests_of_their_own():
    tests = ("modeling/test_kinds.py", "conversion/test_families.py", "training/test_tasks.py")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for test in tests:
        assert f"`tests/{test}` runs this page" in text and "CONTRIBUTING.md" in (ROOT / "tests" / test).read_text()
    assert len(re.findall(r"^```python", text, flags=re.M)) == 5, "who runs the new one?"
