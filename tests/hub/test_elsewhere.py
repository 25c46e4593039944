"""Exports read in environments of their own: with sas_hf, whose classes win, and without it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from answered_checkpoints import CHECKPOINTS, save_checkpoint
from environments import report_of, run_script

from sas_hf.hub.export import export_model


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """A folder of exports of every kind and head, each beside its answers."""
    torch.manual_seed(0)
    sources, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("exports")
    for name in CHECKPOINTS:
        save_checkpoint(name, sources / name)
        export_model(sources / name, folder / name)
        (sources / f"{name}.answers").rename(folder / f"{name}.answers")
    return folder


READER = (Path(__file__).parent / "reader.py").read_text()


def test_every_kind_and_head_loads_and_computes_the_same_without_sas_hf(exports, python_without, tmp_path):
    again = tmp_path / "again"
    auto_classes = {name: auto_class for name, (_, auto_class, _) in CHECKPOINTS.items()}
    seen = report_of(run_script(python_without, READER, exports, json.dumps(auto_classes), again, home=tmp_path))
    others = seen.pop("others")
    assert seen.keys() == CHECKPOINTS.keys()
    for name, (_, auto_class, model_class) in CHECKPOINTS.items():
        assert seen[name]["class"] == model_class.__name__, name
        assert all(module.startswith("transformers_modules.") for module in seen[name]["modules"]), name
        assert seen[name]["same_output"], name
        assert auto_class != "AutoModelForCausalLM" or seen[name]["same_text"], name
    assert seen["vit-mean"]["pixels"] == [1, 12, 12] and seen["vit-oblong"]["pixels"] == [3, 8, 18]
    assert others["classes"] == ["SASGPTModel", "SASGPTForSequenceClassification"]
    assert others["text"].startswith("The statement")
    assert others["saved_again"], "what such a reader saves holds the code again"
    assert others["sas_hf"] is False


def poison(folder: Path) -> Path:
    """Let every code file leave a mark when it is run; gives the mark's place."""
    mark = folder.parent / f"{folder.name}.was-run"
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(mark)!r}, 'w').close()\n{file.read_text()}")
    return mark


WITH_PACKAGE = """
import json, sys
import transformers
from transformers.models.auto.image_processing_auto import AutoImageProcessor
import sas_hf

transformers.AutoImageProcessor = AutoImageProcessor  # else it needs torchvision in 5.16 and 5.17

saved, *folders = sys.argv[1:]
modules = set()
for folder in folders:
    sees = "vit" in folder
    auto_classes = ["AutoModelForImageClassification", "AutoImageProcessor"] if sees else ["AutoModelForCausalLM"]
    for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        for name in ("AutoConfig", "AutoModel", *auto_classes):
            loaded = getattr(transformers, name).from_pretrained(folder, **trust)
            modules.add(type(loaded).__module__)
        if not sees:
            modules.add(type(transformers.pipeline("text-generation", model=folder, **trust).model).__module__)
            loaded.save_pretrained(saved)
print(json.dumps([sorted(modules), [name for name in sys.modules if name.startswith("transformers_modules")]]))
"""
WITHOUT_PACKAGE = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM

folder, mark = sys.argv[1:]
said = []
for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
    try:
        AutoModelForCausalLM.from_pretrained(folder, **trust)
        said.append("loaded")
    except ValueError as error:
        said.append(str(error))
    said.append(Path(mark).exists())
print()  # after Transformers' question
print(json.dumps(said))
"""


def test_with_sas_hf_its_classes_win_and_nothing_of_the_checkpoint_is_run(checkpoint, python_with, tmp_path):
    export, malicious, saved, seeing = (tmp_path / name for name in ("export", "malicious", "saved", "vit"))
    export_model(checkpoint, export)
    save_checkpoint("vit-sas", tmp_path / "images")
    export_model(tmp_path / "images", seeing)
    shutil.copytree(checkpoint, malicious)
    config = json.loads((malicious / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    (malicious / "config.json").write_text(json.dumps(config | {"auto_map": dict.fromkeys(names, "evil.Evil")}))
    (malicious / "evil.py").write_text("class Evil: pass\n")
    marks = [poison(export), poison(malicious), poison(seeing)]

    run = run_script(python_with, WITH_PACKAGE, saved, export, malicious, seeing, home=tmp_path)
    modules, from_checkpoints = report_of(run)
    files = ["configuration_sas_gpt", "configuration_sas_vit", "image_processing_sas_vit"]
    assert modules == [f"sas_hf.modeling.{file}" for file in (*files, "modeling_sas_gpt", "modeling_sas_vit")]
    assert from_checkpoints == []
    assert not any(mark.exists() for mark in marks)
    # What it saved is an ordinary checkpoint: no code, and no promise of code.
    assert not list(saved.glob("*.py"))
    assert "auto_map" not in json.loads((saved / "config.json").read_text())


def test_without_sas_hf_the_code_is_run_when_it_is_trusted_only(checkpoint, python_without, tmp_path):
    export_model(checkpoint, tmp_path / "export")
    mark = poison(tmp_path / "export")
    said = report_of(run_script(python_without, WITHOUT_PACKAGE, tmp_path / "export", mark, home=tmp_path))
    unset, after_unset, refused, after_refused, *trusted = said
    assert "trust_remote_code=True" in unset and "trust_remote_code=True" in refused
    assert not after_unset and not after_refused
    assert trusted == ["loaded", True]
