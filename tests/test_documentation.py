"""Every name, file, command and option of ours that README and docs write is there."""

import importlib
import inspect
import re
from pathlib import Path

import accelerate
import datasets
import lm_eval
import peft
import pytest
import torch
import transformers
import trl
import typer
from transformers.cli.serve import Serve

import sas_hf
from sas_hf.cli import app


ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Where names without a place may be from, and theirs that lie deeper.
LIBRARIES = (transformers, torch, torch.nn, torch.nn.functional, peft, trl, accelerate, datasets, lm_eval)
COMMANDS = typer.main.get_command(app).commands
OPTIONS = {name: {opt for param in command.params for opt in param.opts} for name, command in COMMANDS.items()}
OPTIONS["serve"] = {f"--{name.replace('_', '-')}" for name in inspect.signature(Serve.__init__).parameters} | {
    "--help"
}

# Of sentence-transformers and quantisers, which need not be installed.
ELSEWHERE = {"SentenceTransformer", "SentenceTransformerTrainer", "IntxWeightOnlyConfig", "PerGroup"}
ELSEWHERE |= {"QuantizeConfig"}
# Options of accelerate's launcher, of lm-evaluation-harness, of vLLM and of mergekit.
OTHERS = {"--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port", "--model_args"}
OTHERS |= {"--hf-overrides", "--trust-remote-code"}
ENGINES = {"vllm"}  # with environments of their own


def read(document: Path) -> tuple[str, list[str]]:
    """All code of a document, and its inline pieces."""
    text = document.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    blocks += re.findall(r"(?:^    .*\S.*\n)+", text, flags=re.M)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return "\n".join([*blocks, *inline]).replace("\\\n", " "), inline


@pytest.fixture(scope="module")
def ours() -> dict[str, list[str]]:
    """Every name that a module of the package defines, and where."""
    found = {}
    for path in sorted((ROOT / "sas_hf").rglob("*.py")):
        if path.name != "__main__.py":
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            try:
                names = vars(importlib.import_module(module))
            except ModuleNotFoundError as error:
                if error.name in ENGINES:
                    continue
                raise
            for name, value in names.items():
                if getattr(value, "__module__", module) == module:
                    found.setdefault(name, []).append(module)
    return found


def find(dotted: str):
    """The object of a dotted name; an AttributeError or ImportError where there is none."""
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:number]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_imports_and_dotted_names(document):
    code, _ = read(document)
    for module, names in re.findall(r"^\s*from (sas_hf[\w.]*) import ([\w, ]+)", code, flags=re.M):
        for name in names.split(","):
            find(f"{module}.{name.strip()}")
    for dotted in re.findall(r"(?<![\w/.-])sas_hf(?:\.\w+)+(?!\.\w|/)", code):
        if not dotted.endswith((".py", ".yaml", ".json")):
            find(dotted)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_classes_and_functions(document, ours):
    """Classes of the models can be imported from `sas_hf`; others are defined where there is one place for them."""
    _, inline = read(document)
    classes, functions = r"(?<![\w.\"'/-])(?:[A-Z][a-z]+[A-Z]\w+|SAS[A-Z]\w+)\b", r"(?<![\w.])[a-z]\w*_\w+(?=\()"
    names = {name for code in inline for name in re.findall(f"{classes}|{functions}", code)}
    for name in sorted(names):
        if name.startswith(("SASGPT", "SASViT", "SASEncoderFor", "SASEncoderM", "SASSeq2SeqFor")):
            assert name in sas_hf.__all__, name
        else:
            known = name in ours or name in ELSEWHERE or any(hasattr(library, name) for library in LIBRARIES)
            assert known, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files(document):
    code, _ = read(document)
    for path in re.findall(r"(?<![\w/.~])(?:sas_hf|tests|examples|benchmarks|docs)/[\w./]*\w(?![\w<-])", code):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_their_options(document):
    code, inline = read(document)
    for name, rest in re.findall(r"(?:sas-hf|-m sas_hf) ([a-z][a-z-]*)([^\n#|`]*)", code):
        assert name in COMMANDS, name
        unknown = set(re.findall(r"(?<=\s)--[a-z][\w-]*", rest)) - OPTIONS[name]
        assert not unknown, f"sas-hf {name}: {unknown}"
    scripts = "".join(
        path.read_text() for folder in ("benchmarks", "examples") for path in (ROOT / folder).glob("*.py")
    )
    for option in {code.split()[0].split("=")[0].split("/")[0] for code in inline if code.startswith("--")}:
        known = any(option in options for options in OPTIONS.values()) or f'"{option}"' in scripts
        assert known or option in OTHERS, option
