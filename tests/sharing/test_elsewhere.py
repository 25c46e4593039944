"""Exports read in environments of their own: with sas_hf, whose classes win, and without it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS, HEADS, save_checkpoint
from environments import report_of, run_script

from sas_hf.export import export_model


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
    seen = report_of(run_script(python_without, READER, exports, json.dumps(CHECKPOINTS), again, home=tmp_path))
    others = seen.pop("others")
    assert seen.keys() == CHECKPOINTS.keys()
    for name, model in seen.items():
        assert model["class"] == (HEADS[name].__name__ if name in HEADS else "SASGPTForCausalLM"), name
        assert all(module.startswith("transformers_modules.") for module in model["modules"]), name
        assert model["same_output"], name
        assert name in HEADS or model["same_text"], name
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
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
import sas_hf

folder, saved, modules = sys.argv[1], sys.argv[2], []
for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
    for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(folder, **trust)
        modules.append(type(loaded).__module__)
    AutoTokenizer.from_pretrained(folder, **trust)
    modules.append(type(pipeline("text-generation", model=folder, **trust).model).__module__)
loaded.save_pretrained(saved)
print(json.dumps([sorted(set(modules)), [name for name in sys.modules if name.startswith("transformers_modules")]]))
"""
WITHOUT_PACKAGE = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], **eval(sys.argv[2]))
"""


def test_with_sas_hf_its_classes_win_and_nothing_of_the_checkpoint_is_run(
    checkpoint, python_with, python_without, tmp_path
):
    folder = tmp_path / "export"
    export_model(checkpoint, folder)
    mark = poison(folder)
    for trust in ("{}", "{'trust_remote_code': False}"):  # nor without it, when not trusted
        run = run_script(python_without, WITHOUT_PACKAGE, folder, trust, home=tmp_path)
        assert run.returncode != 0 and "trust_remote_code=True" in run.stderr
        assert not mark.exists()

    modules, from_checkpoints = report_of(
        run_script(python_with, WITH_PACKAGE, folder, tmp_path / "saved", home=tmp_path)
    )
    assert modules == ["sas_hf.modeling.configuration_sas_gpt", "sas_hf.modeling.modeling_sas_gpt"]
    assert from_checkpoints == []
    assert not mark.exists()
    # What it saved is an ordinary checkpoint: no code, and no promise of code.
    assert not list((tmp_path / "saved").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())

    run_script(python_without, WITHOUT_PACKAGE, folder, "{'trust_remote_code': True}", home=tmp_path)
    assert mark.exists(), "the mark does not work"


def test_a_malicious_auto_map_is_not_followed(checkpoint, python_with, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    config["auto_map"] = {name: "evil.Evil" for name in names}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "evil.py").write_text("class Evil: pass\n")
    mark = poison(checkpoint)
    modules, from_checkpoints = report_of(
        run_script(python_with, WITH_PACKAGE, checkpoint, tmp_path / "saved", home=tmp_path)
    )
    assert all(module.startswith("sas_hf.") for module in modules)
    assert from_checkpoints == [] and not mark.exists()
