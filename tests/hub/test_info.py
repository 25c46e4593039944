"""`sas-hf info`: named configurations and checkpoints, counted without allocating them."""

import json
import resource

import pytest
import torch
from helpers import gpt, gpt_config, sas_hf
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from sas_hf import SASSeq2SeqForConditionalGeneration, named_config
from sas_hf.cli import app
from sas_hf.cli.info import head_text
from sas_hf.conversion import convert_model
from sas_hf.conversion.checkpoint import before_and_after
from sas_hf.hub.info import describe, find_config


def test_a_large_configuration_needs_no_memory():
    run = sas_hf("info", "sas-10.6b")
    assert run.returncode == 0, run.stderr
    assert "10,644,637,904" in run.stdout and "40 -> 120 of 128 -> 192" in run.stdout
    # All children of the tests so far stayed far below the 42 GB of its weights.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4e6


def test_a_checkpoint_is_described(tmp_path):
    gpt("sas").save_pretrained(tmp_path)
    run = sas_hf("info", tmp_path, "--context", "32")
    assert run.returncode == 0, run.stderr
    assert "4 -> 12 of 8 -> 12" in run.stdout and "context 32" in run.stdout


def test_a_source_is_described_before_and_after_its_conversion(tmp_path):
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **small)),
        "bert": BertModel(BertConfig(num_attention_heads=4, **small)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        before, after = before_and_after(tmp_path / name).values()
        assert describe(before).parameters == model.num_parameters()
        assert describe(after).parameters == convert_model(model).num_parameters()
    run = sas_hf("info", tmp_path / "llama", "--context", "32")
    assert run.returncode == 0, run.stderr
    assert "as it is" in run.stdout and "4 (2 kv) of 8" in run.stdout and "4 (2 kv) -> 12 of 8 -> 12" in run.stdout


def explained(folder) -> str:
    """What the command says of a folder, on one line."""
    run = CliRunner().invoke(app, ["info", str(folder)])
    assert run.exit_code == 0, run.output
    return " ".join(run.output.replace("│", " ").split())


def refused(folder) -> str:
    """Why the command does not describe a folder, in a line."""
    run = CliRunner().invoke(app, ["info", str(folder)])
    assert run.exit_code == 1 and len(run.stderr.splitlines()) == 1, run.exception
    return run.stderr


def test_what_cannot_be_converted_is_counted_and_the_reason_told(tmp_path):
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    models = {
        "`model_type` 't5' cannot be converted": T5ForConditionalGeneration(
            T5Config(vocab_size=30, d_model=16, d_ff=8)
        ),
        "has no SAS counterpart": BertForPreTraining(BertConfig(num_attention_heads=4, **small)),
        "convert the model it was made from": LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **small)),
    }
    for reason, model in models.items():
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        if isinstance(model, LlamaForCausalLM):
            settings = json.loads((folder / "config.json").read_text())
            settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
            (folder / "config.json").write_text(json.dumps(settings))
        told = explained(folder)
        assert folder.name in told and f"{model.num_parameters():,}" in told and reason in told


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
def test_an_adapter_is_described(tmp_path):
    base = LlamaForCausalLM(LlamaConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    told = explained(tmp_path / "adapter")
    assert "LORA" in told and f"{adapted.get_nb_trainable_parameters()[0]:,}" in told and "sas-hf merge" in told
    weights, settings = (
        tmp_path / "adapter" / "adapter_model.safetensors",
        tmp_path / "adapter" / "adapter_config.json",
    )
    weights.write_bytes(b"no weights")
    assert f"{weights} is damaged" in refused(tmp_path / "adapter")
    settings.write_text(json.dumps({"base_model_name_or_path": [1]}))
    assert f"`base_model_name_or_path` in {settings} is [1], where no model is" in refused(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0; it must be a positive integer"),
        ({"num_attention_heads": 5}, "The hidden size (32) is not a multiple of the number of attention heads (5)"),
        ({"num_attention_heads": "four"}, "'num_attention_heads' expected int, got str (value: 'four')"),
        ({"vocab_size": 0}, "`vocab_size` is 0; it must be a positive integer"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "'nope'; it must be one of 'default'"),
        ({"model_type": ["llama"]}, "`model_type` in FILE is ['llama']; it must be one name"),
        ({"architectures": [3]}, "`architectures` in FILE is [3]; it must be a list of names"),
        ([1], "FILE holds no JSON object"),
        ({"dtype": "nope"}, "Transformers cannot make a configuration of FILE (AttributeError: module 'torch' has no"),
        ({"id2label": ["a"]}, "Transformers cannot make a configuration of FILE (AttributeError: 'list' object"),
        ({"quantization_config": "4bit"}, "Transformers cannot make a configuration of FILE (AttributeError: 'str'"),
        (
            {"model_type": "sas_gpt", "dtype": [1]},
            "Transformers cannot make a configuration of FILE (IndexError: list",
        ),
    ],
)
def test_a_broken_configuration_is_told_in_a_line(fields, told, tmp_path):
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, architectures=["LlamaForCausalLM"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict() | fields if isinstance(fields, dict) else fields))
    assert told.replace("FILE", str(file)) in refused(tmp_path)


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("sas", "4 -> 12 of 8 -> 12"),
        ("linear", "4 -> 12 of 8 -> 12, identity"),
        ("beyond_paper", "4 (2 kv) -> 12 of 8 -> 12 (values', too), W^O for each group"),
        ("mha", "4 of 8"),
    ],
)
def test_what_is_simulated_and_how_is_told(variant, told):
    assert head_text(gpt_config(variant)) == told


def test_all_names_are_listed():
    run = sas_hf("info")
    assert run.returncode == 0, run.stderr
    assert all(name in run.stdout for name in ("mla-sas-125m", "imdb-super", "nmt-efficient"))


def test_a_translator_is_counted_on_both_sides(tmp_path):
    """By the whole model on this machine, with 20 tokens of a source and 20 of a target."""
    config = named_config("nmt-sas", hidden_size=64, simulated_head_dim=24, vocab_size=90, decoder_vocab_size=90)
    found, model = describe(config), SASSeq2SeqForConditionalGeneration(config)
    assert found.parameters == model.num_parameters()
    tokens = torch.zeros(1, 20, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False)
    assert found.forward_flops == counter.get_total_flops() // 20
    # 12 simulated heads: keys of 24 features and values of 16, of the target and of the source.
    assert found.cache_numbers == 2 * 12 * (24 + 16)
    assert found.cache_bytes == found.cache_numbers * 2 * 4  # two layers decode
    model.save_pretrained(tmp_path)
    assert describe(find_config(str(tmp_path))) == found


@pytest.mark.parametrize(
    ("arguments", "message"), [(["sas-125"], "sas-125m"), (["sas-125m", "--dtype", "int4"], "floating-point")]
)
def test_mistakes_are_explained(arguments, message):
    run = sas_hf("info", *arguments)
    assert run.returncode == 1
    assert message in run.stderr and "Traceback" not in run.stderr
