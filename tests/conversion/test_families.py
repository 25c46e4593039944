"""Every family: a conversion computes what its source computes, in all that the two have in common."""

import re
import types
from pathlib import Path

import pytest
import test_restore
import torch
from helpers import scramble, train_tokenizer
from tiny_sources import FAMILY_NAMES, SHAPES, language_model, source_classes, tiny_source, tiny_source_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from sas_hf.conversion import ConversionError, ConversionOptions, compare_models, convert_checkpoint, convert_model
from sas_hf.conversion.convert import FAMILIES, TEXT_FAMILIES


OPTIONS = {
    "plain": ConversionOptions(num_simulated_heads=0, simulated_head_dim=0),
    "kernel 1": ConversionOptions(),
    "kernel 3": ConversionOptions(simulation_kernel_size=3, perturbation=2.0),
    "beyond the paper": ConversionOptions(simulate_value_features=True, head_aggregation="concat"),
}
HEADS = [
    pytest.param(shape, name, id=name)
    for shape in FAMILY_NAMES
    for name in FAMILIES[SHAPES[shape]["model_type"]].architectures
]


def windows(count: int = 3, length: int = 40) -> list[torch.Tensor]:
    return [torch.randint(300, (1, length)) for _ in range(count)]


def test_every_family_has_a_source_here():
    assert set(FAMILY_NAMES) | {"llama"} == {family.model_type for family in TEXT_FAMILIES}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_exact_in_float32(shape, option):
    source = tiny_source(shape)
    converted = convert_model(source, OPTIONS[option])
    fidelity = compare_models(source, converted, windows())
    assert fidelity.is_exact, fidelity
    assert fidelity.argmax_agreement == 1.0
    assert converted.config.simulates == (option != "plain")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_shape_is_exact_in_float64(shape, option):
    """RMSNorm and eager softmax round to float32 inside, which bounds a whole model."""
    source = tiny_source(shape).double()
    converted = convert_model(source, OPTIONS[option])
    ids = windows(1)[0]
    assert (converted(ids).logits - source(ids).logits).abs().max() <= 1e-5

    layer = next(module for module in source.modules() if type(module).__name__.endswith("Attention"))
    inputs = {"hidden_states": torch.randn(1, 40, 60, dtype=torch.float64), "attention_mask": None}
    if hasattr(source.base_model, "rotary_emb"):
        inputs["position_embeddings"] = source.base_model.rotary_emb(inputs["hidden_states"], torch.arange(40)[None])
    expected, _ = layer(**inputs)
    actual, _ = converted.model.layers[0].self_attn(**inputs)
    assert (actual - expected).abs().max() <= 1e-9


@pytest.mark.parametrize(("shape", "name"), HEADS)
def test_every_head_is_carried_over(shape, name):
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config = tiny_source_config(shape, pad_token_id=0, **labels)
    source = scramble(source_classes(config.model_type)[name](config))
    converted = convert_model(source)
    assert compare_models(source, converted, windows()).is_exact
    assert type(converted).__name__.removeprefix("SASGPT") in name.replace("LMHeadModel", "ForCausalLM")
    assert converted.config.id2label == config.id2label


@pytest.mark.parametrize("shape", SHAPES)
def test_the_greedy_text_is_the_sources(shape):
    source = tiny_source(shape)
    prompt = torch.randint(300, (2, 9))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = source.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    converted = convert_model(source)
    for cache in ("expanded", "base"):
        converted.config.simulation_cache = cache
        actual = converted.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_a_conversion_can_learn(shape):
    converted = convert_model(tiny_source(shape))
    batch = torch.randint(300, (2, 40))
    converted(input_ids=batch, labels=batch).loss.backward()
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None, name
        if "_simulation." in name and name.endswith("weight"):
            assert parameter.grad.norm() > 1e-6, name
        # Every row learns, but for the extra key features: they meet query features that start at zero.
        if "_simulation.heads.expansion.weight" in name or "q_simulation.features.expansion.weight" in name:
            assert parameter.grad.flatten(1).norm(dim=1).min() > 0, name


@pytest.mark.parametrize("shape", SHAPES)
def test_the_source_is_left_as_it_is(shape):
    source = tiny_source(shape)
    before = {name: weight.clone() for name, weight in source.state_dict().items()}
    converted = convert_model(source)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    for name, weight in source.state_dict().items():
        assert torch.equal(weight, before[name]), name
    tied = source.config.tie_word_embeddings
    assert (converted.lm_head.weight is converted.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("shape", FAMILY_NAMES)
def test_a_checkpoint_is_converted_with_its_tokenizer(shape, tmp_path):
    tokenizer = train_tokenizer()
    source = tiny_source(shape, vocab_size=len(tokenizer), pad_token_id=0).bfloat16()
    source.save_pretrained(tmp_path / "source", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "source")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=2, window_length=64)
    assert report["fidelity"]["exact"] and report["dtype_saved"] == "bfloat16"

    source = language_model(source.config.model_type).from_pretrained(tmp_path / "source", dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "sas", dtype=torch.float32)
    assert compare_models(source, converted, windows()).is_exact
    carried = AutoTokenizer.from_pretrained(tmp_path / "sas")
    assert carried("an expression")["input_ids"] == tokenizer("an expression")["input_ids"]


REFUSED = {  # shape, fields of the source, what the message must say
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "gpt2 with cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    "gpt2 with two dropouts": ("gpt2", {"embd_pdrop": 0.2}, r"`embd_pdrop` \(0.2\), `resid_pdrop` \(0.1\) differ"),
    "mistral with a window": ("mistral", {"sliding_window": 16}, "sliding_window.*16.*max_position_embeddings.*128"),
    "qwen2 with a window": ("qwen2-window", {"max_window_layers": 2}, "sliding_window.*32.*128"),
    "qwen3 with a window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        "sliding_window.*16.*128",
    ),
    "smollm3 with a window": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 16},
        "sliding_window.*16.*128",
    ),
    "phi with normed queries": ("phi", {"qk_layernorm": True}, "qk_layernorm.*LayerNorm.*qk_norm"),
    "phi with two dropouts": ("phi", {"resid_pdrop": 0.2}, r"`embd_pdrop` \(0.0\), `resid_pdrop` \(0.2\) differ"),
    "quantised": ("qwen2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
}


@pytest.mark.parametrize(("shape", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_an_approximation_is_refused_before_weights_are_read(shape, fields, message, tmp_path):
    config = tiny_source_config(shape, **fields)
    config.architectures = [language_model(config.model_type).__name__]
    config.save_pretrained(tmp_path / "source")  # no weights: an error about them would mean that this came too late
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas")
    assert not (tmp_path / "sas").exists()


def test_dropouts_and_scale_are_the_sources():
    config = convert_model(tiny_source("gpt2-plain", embd_pdrop=0.2, resid_pdrop=0.2, attn_pdrop=0.3)).config
    assert (config.hidden_dropout, config.attention_dropout, config.query_pre_attn_scalar) == (0.2, 0.3, 1.0)
    config = convert_model(tiny_source("gpt_neox", hidden_dropout=0.2, classifier_dropout=0.4)).config
    assert (config.hidden_dropout, config.classifier_dropout) == (0.2, 0.4)


@pytest.fixture
def the_family_of_the_contributors_page(monkeypatch):
    """StarCoder2, made of the code as it stands there; the names of its tiny sources."""
    document = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    page = document.partition("## Adding a source family")[2].partition("\n## ")[0]
    code, sources = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    module = types.ModuleType("sas_hf.conversion.starcoder2")
    module.__package__ = "sas_hf.conversion"
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))
    monkeypatch.setitem(FAMILIES, "starcoder2", module.STARCODER2)
    found = {"SHAPES": {}}
    exec(compile(sources, "CONTRIBUTING.md", "exec"), found)
    for name, fields in found["SHAPES"].items():
        monkeypatch.setitem(SHAPES, name, fields)
    return found["SHAPES"]


def test_the_family_of_the_contributors_page_is_one(the_family_of_the_contributors_page, tmp_path):
    """It passes what every family passes, refuses what its page says, and can be restored."""
    for number, shape in enumerate(the_family_of_the_contributors_page):
        for option in OPTIONS:
            test_every_shape_is_exact_in_float32(shape, option)
            test_every_shape_is_exact_in_float64(shape, option)
        test_the_greedy_text_is_the_sources(shape)
        test_all_of_a_conversion_can_learn(shape)
        test_the_source_is_left_as_it_is(shape)
        for name in FAMILIES["starcoder2"].architectures:
            test_every_head_is_carried_over(shape, name)
        test_a_checkpoint_is_converted_with_its_tokenizer(shape, tmp_path / str(number))
        test_restore.test_every_text_family_comes_back_bit_by_bit(shape, tmp_path / f"{number}-restored")
        test_what_would_be_an_approximation_is_refused_before_weights_are_read(
            shape, {"sliding_window": 16}, "sliding_window.*16.*128", tmp_path / f"{number}-window"
        )
        test_what_would_be_an_approximation_is_refused_before_weights_are_read(
            shape, {"embedding_dropout": 0.2}, r"`embedding_dropout` \(0.2\)", tmp_path / f"{number}-dropout"
        )
