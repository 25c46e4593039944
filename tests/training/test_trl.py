"""TRL's trainers on a SAS GPT: from a folder, from an export, and from a live model, with and without LoRA."""

import json

import pytest
import torch
from helpers import gpt, train_tokenizer
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl_steps import STEPS, TEXTS, step

from sas_hf import SASGPTForCausalLM, SASGPTForSequenceClassification
from sas_hf.hub.export import export_model


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of TRL and peft


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model and a reward model, each as a saved and as an exported folder."""
    torch.manual_seed(0)
    made = {}
    for head, model_class in (("reward", SASGPTForSequenceClassification), ("language", SASGPTForCausalLM)):
        tokenizer = train_tokenizer()
        saved, exported = (tmp_path_factory.mktemp(head) / name for name in ("saved", "exported"))
        model = gpt("sas_k5_gqa", model_class, vocab_size=400, pad_token_id=0, eos_token_id=1, num_labels=1)
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        export_model(saved, exported)
        made[head] = {"saved": str(saved), "exported": str(exported)}
    return made


@pytest.fixture(scope="module")
def first_losses():
    """What each trainer logged first, by the first source that it ran from."""
    return {}


SOURCES = [("saved", False), ("exported", False), ("live", False), ("saved", True), ("live", True)]


@pytest.mark.parametrize(
    ("source", "lora"), SOURCES, ids=lambda value: {True: "lora", False: "whole"}.get(value, value)
)
@pytest.mark.parametrize("kind", STEPS)
def test_trl_trains(kind, source, lora, folders, first_losses, tmp_path, tolerate_deprecations):
    """The same step from every source, on the weights of the folder; what they save loads again."""
    head = "reward" if kind == "reward" else "language"
    auto_class = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    model, others = folders[head]["saved" if source == "live" else source], {}
    if source == "exported":
        others = {"trust_remote_code": True}
    if source == "live":
        model, others = auto_class.from_pretrained(model), {"tokenizer": train_tokenizer()}
    trainer, first = step(kind, model, str(tmp_path / "run"), lora, **others)

    same = first_losses.setdefault((kind, lora), {name: first[name] for name in ("loss", "grad_norm")})
    assert {name: first[name] for name in same} == pytest.approx(same, rel=1e-4)
    assert first["grad_norm"] > 1e-3
    trainer.save_model(str(tmp_path / "trained"))
    if lora:
        auto_class = AutoPeftModelForSequenceClassification if kind == "reward" else AutoPeftModelForCausalLM
        again = auto_class.from_pretrained(tmp_path / "trained")
        assert type(again.get_base_model()).__module__ == "sas_hf.modeling.modeling_sas_gpt"
    else:
        again = auto_class.from_pretrained(tmp_path / "trained")
        assert "auto_map" not in json.loads((tmp_path / "trained" / "config.json").read_text())
        assert not list((tmp_path / "trained").glob("*.py"))
    ids = train_tokenizer()(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["sft", "sft-packed"])
def test_the_loss_of_trl_is_that_of_the_next_token(kind, folders, first_losses, tmp_path, tolerate_deprecations):
    _, first = step(kind, folders["language"]["saved"], str(tmp_path))
    model, total, count = SASGPTForCausalLM.from_pretrained(folders["language"]["saved"]), 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[*train_tokenizer()(text)["input_ids"], 1]])[:, :16]
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert first["loss"] == pytest.approx(total / count, rel=1e-4)


def test_a_dpo_reference_is_the_model_as_it_was(folders, tmp_path, tolerate_deprecations):
    """TRL loads it from the folder that the live model came from."""
    model = AutoModelForCausalLM.from_pretrained(folders["language"]["saved"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer, _ = step("dpo", model, str(tmp_path), tokenizer=train_tokenizer())
    assert type(trainer.ref_model) is SASGPTForCausalLM
    for name, parameter in trainer.ref_model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
