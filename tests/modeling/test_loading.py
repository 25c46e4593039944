"""Saving, loading, the Auto classes, a fresh process, tied weights, and the contract of public names."""

import subprocess
import sys

import pytest
import torch
from helpers import all_tensors, assert_identical, gpt, gpt_config, python_environment, token_ids, train_tokenizer
from model_mixin import SASGPT, LoadingTests, SASEncoder, SASSeq2Seq, SASViT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

import sas_hf
from sas_hf import (
    SASGPTConfig,
    SASGPTForCausalLM,
    SASGPTForQuestionAnswering,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    SASGPTModel,
)


AUTO_CLASSES = {
    AutoModel: SASGPTModel,
    AutoModelForCausalLM: SASGPTForCausalLM,
    AutoModelForSequenceClassification: SASGPTForSequenceClassification,
    AutoModelForTokenClassification: SASGPTForTokenClassification,
    AutoModelForQuestionAnswering: SASGPTForQuestionAnswering,
}


class TestSASGPT(SASGPT, LoadingTests):
    pass


class TestSASEncoder(SASEncoder, LoadingTests):
    pass


class TestSASSeq2Seq(SASSeq2Seq, LoadingTests):
    pass


class TestSASViT(SASViT, LoadingTests):
    pass


@pytest.mark.parametrize(("auto_class", "model_class"), AUTO_CLASSES.items(), ids=lambda c: c.__name__)
def test_auto_classes(auto_class, model_class, tmp_path):
    config = gpt_config("sas_k5_gqa", num_labels=3)
    built = auto_class.from_config(config)
    assert type(built) is model_class
    built.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SASGPTConfig
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert_identical(all_tensors(loaded), all_tensors(built))


@pytest.mark.parametrize("model_class", list(AUTO_CLASSES.values())[1:], ids=lambda c: c.__name__)
def test_heads_load_from_the_base_model_and_back(model_class, tmp_path):
    base = gpt("sas", model_class=SASGPTModel, num_labels=3)
    base.save_pretrained(tmp_path / "base")
    head = model_class.from_pretrained(tmp_path / "base")
    assert_identical(dict(head.model.named_parameters()), dict(base.named_parameters()))
    assert all(torch.isfinite(parameter).all() for parameter in head.parameters())
    head.save_pretrained(tmp_path / "head")
    assert_identical(all_tensors(SASGPTModel.from_pretrained(tmp_path / "head")), all_tensors(base))


FRESH_PROCESS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import sas_hf

folder = sys.argv[1]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    save_file({"logits": model(load_file(f"{folder}/ids.safetensors")["ids"]).logits}, f"{folder}/logits.safetensors")
assert type(model).__module__.startswith("sas_hf."), type(model)
"""


def test_a_fresh_process_computes_the_same_bits(tmp_path):
    model, ids = gpt("sas_k5_gqa"), token_ids(2, 14)
    model.save_pretrained(tmp_path)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(tmp_path)], check=True, env=python_environment())
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], model(ids).logits)


def test_tied_weights_are_stored_once(tmp_path):
    gpt("sas").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "model.embed_tokens.weight" in keys and "lm_head.weight" not in keys
    loaded = SASGPTForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.resize_token_embeddings(70)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded(token_ids(1, 5)).logits.shape[-1] == 70


def test_untied_weights_are_stored_apart(tmp_path):
    model = gpt("sas", tie_word_embeddings=False)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    assert_identical(all_tensors(SASGPTForCausalLM.from_pretrained(tmp_path)), all_tensors(model))


def test_sharded_checkpoint(tmp_path):
    model = gpt("sas")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_identical(all_tensors(SASGPTForCausalLM.from_pretrained(tmp_path)), all_tensors(model))


def test_pipeline_from_a_saved_folder(tmp_path, tolerate_deprecations):
    tokenizer = train_tokenizer()
    model = gpt(
        "sas_k5_gqa",
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), max_new_tokens=8, do_sample=False)
    assert type(generator.model) is SASGPTForCausalLM
    prompt = "The assignment statement"
    (result,) = generator(prompt)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert result["generated_text"] == expected
    # In a batch, the shorter prompt is padded on the left.
    tokenizer.padding_side = "left"
    batched = pipeline(
        "text-generation", model=str(tmp_path), tokenizer=tokenizer, max_new_tokens=8, do_sample=False, batch_size=2
    )(["A much longer prompt than the other one", prompt])
    assert batched[1][0]["generated_text"] == expected


PUBLIC_NAMES = [
    "SASEncoderConfig",
    "SASEncoderForMaskedLM",
    "SASEncoderForMultipleChoice",
    "SASEncoderForQuestionAnswering",
    "SASEncoderForSequenceClassification",
    "SASEncoderForTokenClassification",
    "SASEncoderModel",
    "SASGPTConfig",
    "SASGPTForCausalLM",
    "SASGPTForQuestionAnswering",
    "SASGPTForSequenceClassification",
    "SASGPTForTokenClassification",
    "SASGPTModel",
    "SASSeq2SeqConfig",
    "SASSeq2SeqForConditionalGeneration",
    "SASSeq2SeqModel",
    "SASViTConfig",
    "SASViTForImageClassification",
    "SASViTForMaskedImageModeling",
    "SASViTImageProcessor",
    "SASViTModel",
]


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_names_are_exported_and_documented(name):
    assert getattr(sas_hf, name).__name__ == name
    assert len(getattr(sas_hf, name).__doc__.split()) > 5


def test_no_other_class_is_public():
    found = {name for name in dir(sas_hf) if name.startswith("SAS")}
    assert found == set(PUBLIC_NAMES)
