"""A checkpoint of this version loads in later ones and computes the same: names, shapes, fields and outputs are kept.

`contract.py` adds what is new to the record; what fails here would break checkpoints that people have.
"""

import json

import contract
import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

import sas_hf


RECORDED = json.loads(contract.FILE.read_text())


@pytest.mark.parametrize("name", RECORDED["checkpoints"])
def test_a_recorded_checkpoint_loads_and_computes_the_same(name, tmp_path):
    recorded = RECORDED["checkpoints"][name]
    (tmp_path / "config.json").write_text(json.dumps(recorded["config"]))
    save_file(contract.example_weights(recorded["weights"]), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model_class = getattr(sas_hf, name.partition("/")[0])
    model, loading = model_class.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(loading.values()), loading
    stored = [key for key in model.state_dict() if key not in contract.tied_keys(model)]
    assert stored == list(recorded["weights"])  # simulation parameters stand in the order they act
    torch.testing.assert_close(
        torch.tensor(contract.example_output(model)), torch.tensor(recorded["output"]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", RECORDED["checkpoints"])
def test_a_recorded_configuration_is_saved_as_it_was(name):
    recorded = RECORDED["checkpoints"][name]["config"]
    config = CONFIG_MAPPING[recorded["model_type"]].from_dict(dict(recorded))
    assert contract.saved_fields(config) == recorded


@pytest.mark.parametrize("model_type", RECORDED["fields"])
def test_fields_and_their_defaults_are_kept(model_type):
    """A checkpoint leaves fields to their defaults; a new field must be recorded, and its default change nothing."""
    assert contract.default_fields(CONFIG_MAPPING[model_type]) == RECORDED["fields"][model_type]


def test_every_kind_is_recorded():
    assert contract.checkpoints().keys() == RECORDED["checkpoints"].keys()
