"""The way back: a conversion whose simulation changes nothing is its source again; anything else is refused."""

import json

import pytest
import torch
from helpers import gpt, sas_hf, scramble
from test_vit_families import ARCHITECTURES
from test_vit_families import source as vit_source
from tiny_llama import AWKWARD, tiny_llama
from tiny_sources import FAMILY_NAMES, SHAPES, source_classes, tiny_source, tiny_source_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from sas_hf.conversion import ConversionError, ConversionOptions, convert_checkpoint, restore_checkpoint
from sas_hf.conversion.convert import FAMILIES


HEADS = [(shape, name) for shape in FAMILY_NAMES for name in FAMILIES[SHAPES[shape]["model_type"]].architectures]


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def there_and_back(source, folder, options=None):
    """The source's folder, saved as it is, converted and restored."""
    source.save_pretrained(folder / "source")
    convert_checkpoint(folder / "source", folder / "sas", options, windows=1)
    report = restore_checkpoint(folder / "sas", folder / "back", windows=1)
    assert report["fidelity"]["exact"] and report["architecture"] == type(source).__name__
    return type(source).from_pretrained(folder / "back", dtype="auto")


def assert_same_model(restored, source):
    expected = source.state_dict()
    assert restored.state_dict().keys() == expected.keys()
    for name, weight in restored.state_dict().items():
        assert weight.dtype == expected[name].dtype and torch.equal(weight, expected[name]), name


def assert_same_config(restored, source):
    written = ("dtype", "_name_or_path", "transformers_version", "architectures")
    found, expected = (
        {name: value for name, value in config.to_dict().items() if name not in written}
        for config in (restored, source)
    )
    assert found == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_every_text_family_comes_back_bit_by_bit(shape, tmp_path):
    source = tiny_source(shape)
    restored = there_and_back(source, tmp_path)
    assert_same_model(restored, source)
    assert_same_config(restored.config, source.config)
    assert restored.config.tie_word_embeddings == (
        restored.get_output_embeddings().weight is restored.get_input_embeddings().weight
    )


@pytest.mark.parametrize("shape", AWKWARD)
def test_every_llama_comes_back_bit_by_bit(shape, tmp_path):
    source = tiny_llama(shape)
    restored = there_and_back(source, tmp_path)
    assert_same_model(restored, source)
    assert_same_config(restored.config, source.config)


def test_values_features_and_output_projections_of_groups_come_back_bit_by_bit(tmp_path):
    source = tiny_source("qwen2")
    restored = there_and_back(
        source, tmp_path, ConversionOptions(simulate_value_features=True, head_aggregation="concat")
    )
    assert_same_model(restored, source)
    assert_same_config(restored.config, source.config)


@pytest.mark.parametrize(("shape", "name"), HEADS)
def test_every_head_comes_back(shape, name, tmp_path):
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    source = scramble(
        source_classes(SHAPES[shape]["model_type"])[name](tiny_source_config(shape, pad_token_id=0, **labels))
    )
    restored = there_and_back(source, tmp_path)
    assert_same_model(restored, source)
    assert restored.config.id2label == source.config.id2label


@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)
def test_every_vit_comes_back_bit_by_bit(family, architecture, tmp_path):
    source = vit_source(family, architecture)
    restored = there_and_back(source, tmp_path)
    assert_same_model(restored, source)
    assert_same_config(restored.config, source.config)
    size = source.config.image_size
    pixels = torch.randn(2, 3, *(size if isinstance(size, (list, tuple)) else (size, size)))
    with torch.no_grad():
        assert torch.equal(restored(pixels).to_tuple()[0], source(pixels).to_tuple()[0])


def test_bfloat16_comes_back(tmp_path):
    assert_same_model(there_and_back(tiny_source("gpt2").bfloat16(), tmp_path), tiny_source("gpt2").bfloat16())


@pytest.fixture
def converted(llama_folder, tmp_path):
    convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    return tmp_path / "sas"


def train(folder, chosen) -> torch.nn.Module:
    """One step of AdamW on the parameters whose names are chosen; saved in place, and given back."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimiser = torch.optim.AdamW([p for name, p in model.named_parameters() if chosen(name)], lr=1e-2)
    batch = torch.randint(300, (4, 40))
    model(input_ids=batch, labels=batch).loss.backward()
    optimiser.step()
    model.save_pretrained(folder)
    return model


def test_all_but_the_simulation_may_be_trained(converted, llama_folder, tmp_path):
    trained = train(converted, lambda name: "_simulation." not in name)
    report = restore_checkpoint(converted, tmp_path / "back", windows=2)
    assert report["fidelity"]["exact"]
    ids = torch.randint(300, (2, 30))
    back, source = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("back", "source"))
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, trained(ids).logits, rtol=0, atol=1e-4)
        assert (back(ids).logits - source(ids).logits).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("an expression") == AutoTokenizer.from_pretrained(llama_folder)("an expression")
    assert back.generation_config.top_k == 7
    assert json.loads((tmp_path / "back" / "fidelity.json").read_text()) == report


def test_a_trained_simulation_is_refused_with_the_distance(converted, tmp_path):
    train(converted, lambda name: "_simulation." in name)
    with pytest.raises(ConversionError, match=r"has been trained: .* differ by up to \d.*allowed: .*KL.*agreement"):
        restore_checkpoint(converted, tmp_path / "back", windows=1)
    assert files_in(tmp_path) == ["sas", "source"]


def test_a_resized_vocabulary_comes_back(converted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(converted)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(converted)
    restore_checkpoint(converted, tmp_path / "back", windows=1)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "back").config.vocab_size == model.config.vocab_size


def test_labels_given_after_the_conversion_come_back(tmp_path):
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    source = source_classes("qwen2")["Qwen2ForSequenceClassification"](tiny_source_config("qwen2", **names))
    source.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sas")
    model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    model.config.save_pretrained(tmp_path / "sas")
    restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    restored = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back")
    assert restored.config.id2label == {0: "no", 1: "yes"}


def test_norms_of_phi_that_were_trained_apart_are_refused(tmp_path):
    tiny_source("phi").save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    train(tmp_path / "sas", lambda name: "layernorm" in name)
    with pytest.raises(ConversionError, match="share one norm in Phi.*trained apart"):
        restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    assert not (tmp_path / "back").exists()


def never_converted(sas, tmp_path):
    gpt("sas").save_pretrained(sas)
    (sas / "fidelity.json").unlink()


def no_sas_model(sas, tmp_path):
    LlamaForCausalLM.from_pretrained(tmp_path / "source").save_pretrained(sas)


def lossy(sas, tmp_path):
    report = json.loads((sas / "fidelity.json").read_text())
    (sas / "fidelity.json").write_text(json.dumps(report | {"lossy": "gqa"}))


def older_report(sas, tmp_path):
    report = json.loads((sas / "fidelity.json").read_text())
    (sas / "fidelity.json").write_text(json.dumps({k: v for k, v in report.items() if k != "source_config"}))


def evil_source(sas, tmp_path):
    report = json.loads((sas / "fidelity.json").read_text())
    report["source_architecture"] = "Trainer"
    (sas / "fidelity.json").write_text(json.dumps(report))


def damaged_report(sas, tmp_path):
    (sas / "fidelity.json").write_text("{")


def truncated(sas, tmp_path):
    data = (sas / "model.safetensors").read_bytes()
    (sas / "model.safetensors").write_bytes(data[:-8])


def existing_output(sas, tmp_path):
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "precious").write_text("mine")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (never_converted, ConversionError, "no fidelity.json, so it was not converted"),
        (no_sas_model, ConversionError, "no SAS checkpoint: its `model_type` is 'llama'"),
        (lossy, ConversionError, "lossy conversion.*gqa"),
        (older_report, ConversionError, "does not say what was converted"),
        (evil_source, ConversionError, "does not say what was converted"),
        (damaged_report, ConversionError, "fidelity.json is damaged"),
        (truncated, ConversionError, "damaged or truncated"),
        (existing_output, FileExistsError, "back exists and is not an empty folder"),
    ],
)
def test_what_cannot_go_back_is_refused_and_nothing_is_left(converted, tmp_path, damage, error, message):
    damage(converted, tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(error, match=message):
        restore_checkpoint(converted, tmp_path / "back", windows=1)
    assert files_in(tmp_path) == before
    assert not (tmp_path / "back").exists() or files_in(tmp_path / "back") == ["precious"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        restore_checkpoint(tmp_path / "nowhere", tmp_path / "back")


def test_without_simulation_there_is_nothing_to_lose(llama_folder, tmp_path):
    options = ConversionOptions(num_simulated_heads=0, simulated_head_dim=0)
    convert_checkpoint(llama_folder, tmp_path / "sas", options, windows=1)
    report = restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    assert report["fidelity"]["max_abs_difference"] < 1e-4


def test_the_command_restores_and_explains(converted, llama_folder, tmp_path):
    run = sas_hf("restore", converted, tmp_path / "back")
    assert run.returncode == 0, run.stderr
    assert "LlamaForCausalLM" in run.stdout and "100.00%" in run.stdout and "perplexity" in run.stdout
    assert_same_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "back"), LlamaForCausalLM.from_pretrained(llama_folder)
    )
    run = sas_hf("restore", llama_folder, tmp_path / "again")
    assert run.returncode == 1 and "no SAS checkpoint" in run.stderr and "Traceback" not in run.stderr
