"""Lossy conversions: asked for by name, better than no fit, exact where the construction allows, honestly reported."""

import json

import pytest
import torch
from helpers import DEVICE, generator, real_text, sas_hf, train_tokenizer
from test_vit_families import source as vit_source
from tiny_llama import tiny_llama
from tiny_sources import tiny_source
from transformers import AutoModelForCausalLM

from sas_hf.conversion import ConversionError, ConversionOptions, compare_models, convert_checkpoint, convert_model
from sas_hf.data.text import python_reference


def windows(count: int, seed: int, length: int = 40) -> list[torch.Tensor]:
    source = generator(seed)
    return [torch.randint(300, (1, length), generator=source, device=DEVICE) for _ in range(count)]


CALIBRATION, HELD_OUT = windows(40, seed=0), windows(4, seed=1)
TEXTS = {"calibration": CALIBRATION[:4], "held out": HELD_OUT}


def gqa(heads: int) -> ConversionOptions:
    return ConversionOptions(lossy="gqa", num_key_value_heads=heads)


CONVERSIONS = {  # shape of the source (C = 60), options
    "optimised of learned positions": ("gpt2", ConversionOptions(lossy="optimised")),
    "optimised of kv heads, biases on qkv alone": ("qwen2", ConversionOptions(lossy="optimised")),
    "optimised with partial rotation, parallel": ("gpt_neox", ConversionOptions(lossy="optimised")),
    "efficient of learned positions": ("gpt2", ConversionOptions(lossy="efficient")),
    "efficient of layers with and without RoPE": ("smollm3", ConversionOptions(lossy="efficient")),
    "efficient with partial rotation": ("phi-partial", ConversionOptions(lossy="efficient")),
}


@torch.no_grad()
def unfitted(source, converted):
    """The same kind of attention with the source's W^O, and for the slicing kinds its queries: nothing fitted."""
    plain = convert_model(source, ConversionOptions(num_simulated_heads=0, simulated_head_dim=0))
    for old, new in zip(plain.model.layers, converted.model.layers, strict=True):
        sides = ("q_proj", "o_proj") if converted.config.attention_type == "efficient" else ("o_proj",)
        for side in sides:
            for name, parameter in getattr(new.self_attn, side).named_parameters():
                held = dict(getattr(old.self_attn, side).named_parameters())
                parameter.copy_(held[name]) if name in held else parameter.zero_()
    return converted


@pytest.mark.parametrize(("shape", "options"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_the_fit_helps_on_the_calibration_and_beyond(shape, options):
    source = tiny_source(shape, num_hidden_layers=2)
    converted = convert_model(source, options, CALIBRATION)
    assert converted.config.attention_type == options.lossy
    assert not converted.config.simulates
    fitted = {name: compare_models(source, converted, text).mean_kl for name, text in TEXTS.items()}
    naive = unfitted(source, converted)
    for name, text in TEXTS.items():
        assert fitted[name] < 0.8 * compare_models(source, naive, text).mean_kl, name
    assert fitted["held out"] < 1.5 * fitted["calibration"]


def test_optimised_attention_scores_as_its_source():
    """Queries and keys are the source's, each key head in the place of the query heads it serves."""
    source = tiny_source("qwen2")
    converted = convert_model(source, ConversionOptions(lossy="optimised"), CALIBRATION)
    for old, new in zip(source.model.layers, converted.model.layers, strict=True):
        states, width = torch.randn(1, 9, 60), source.config.hidden_size // source.config.num_attention_heads
        query, key, expected_query, expected_key = (
            projection(states).unflatten(-1, (-1, width))
            for attention in (new.self_attn, old.self_attn)
            for projection in (attention.q_proj, attention.k_proj)
        )
        groups = expected_query.shape[2] // expected_key.shape[2]
        assert groups > 1 and expected_key.shape[2] > 1
        torch.testing.assert_close(query, expected_query)
        torch.testing.assert_close(key, expected_key.repeat_interleave(groups, dim=2))


def with_equal_kv_heads(shape: str, groups: int):
    """A source whose neighbouring key/value heads are copies."""
    source = tiny_source(shape)
    width = source.config.head_dim
    for layer in source.model.layers:
        for side in ("k_proj", "v_proj"):
            for parameter in getattr(layer.self_attn, side).parameters():
                heads = parameter.data.unflatten(0, (groups, -1, width))
                parameter.data = heads[:, :1].expand_as(heads).flatten(0, 2).contiguous()
    return source


@pytest.mark.parametrize(("shape", "groups"), [("qwen3", 1), ("mistral", 1)])
def test_merging_equal_heads_is_exact(shape, groups):
    source = with_equal_kv_heads(shape, groups)
    fidelity = compare_models(source, convert_model(source, gqa(groups), CALIBRATION[:10]), HELD_OUT)
    assert fidelity.max_abs_difference <= 1e-4 * fidelity.max_abs_output


def test_latents_of_one_kv_head_are_exact_at_full_rank():
    """Five query heads of eight features in 60: the query latent has room for them all and the constant."""
    source = tiny_llama("mqa")
    full = ConversionOptions(lossy="mla", kv_lora_rank=2 * 8 + 1)
    converted = convert_model(source, full, CALIBRATION)
    fidelity = compare_models(source, converted, HELD_OUT)
    assert fidelity.max_abs_difference <= 1e-4 * fidelity.max_abs_output
    less = convert_model(source, ConversionOptions(lossy="mla", kv_lora_rank=6), CALIBRATION)
    assert compare_models(source, less, HELD_OUT).mean_kl > 100 * fidelity.mean_kl


def test_latents_without_rope_are_exact_at_full_rank():
    """Two key/value heads of twelve: no layer turns anything, so that nothing needs a shared key."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "no_rope_layers": [0, 0, 0]}
    source = tiny_source("smollm3", **shape)
    converted = convert_model(source, ConversionOptions(lossy="mla", kv_lora_rank=2 * 2 * 12 + 1), CALIBRATION)
    fidelity = compare_models(source, converted, HELD_OUT)
    assert fidelity.max_abs_difference <= 1e-4 * fidelity.max_abs_output


def test_more_rank_is_nearer():
    source = tiny_source("mistral")
    kls = [
        compare_models(
            source, convert_model(source, ConversionOptions(lossy="mla", kv_lora_rank=rank), CALIBRATION), HELD_OUT
        ).mean_kl
        for rank in (4, 20, 57)
    ]
    assert kls == sorted(kls, reverse=True)


@pytest.mark.parametrize("name", ["optimised", "efficient", "mla"])
def test_simulation_on_top_changes_nothing(name):
    source = tiny_source("qwen2")
    plain = convert_model(source, ConversionOptions(lossy=name), CALIBRATION)
    options = ConversionOptions(
        lossy=name, num_simulated_heads=12, simulated_head_dim=24, simulate_value_features=True
    )
    simulated = convert_model(source, options, CALIBRATION)
    assert simulated.config.num_simulated_heads == 12 and simulated.config.simulated_head_dim == 24
    fidelity = compare_models(plain, simulated, HELD_OUT)
    assert fidelity.max_abs_difference <= 1e-3 * fidelity.max_abs_output


@pytest.mark.parametrize("name", ["optimised", "efficient", "gqa", "mla"])
def test_the_source_is_left_as_it_is_and_all_can_learn(name):
    source = tiny_source("qwen2")
    before = {key: weight.clone() for key, weight in source.state_dict().items()}
    converted = convert_model(
        source, ConversionOptions(lossy=name, num_key_value_heads=1 if name == "gqa" else None), CALIBRATION
    )
    for key, weight in source.state_dict().items():
        assert torch.equal(weight, before[key]), key
    batch = torch.cat(HELD_OUT)
    converted(input_ids=batch, labels=batch).loss.backward()
    for key, parameter in converted.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert not parameter.is_meta


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_tokenizer()
    tiny_source("qwen2", vocab_size=len(tokenizer), pad_token_id=0).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_lossy_checkpoint_says_that_it_is_one(folder, tmp_path):
    text = "\n\n".join(real_text())
    report = convert_checkpoint(
        folder,
        tmp_path / "sas",
        ConversionOptions(lossy="mla"),
        windows=2,
        calibration=text[:60_000],
        text=text[60_000:80_000],
    )
    assert report["lossy"] == "mla" and report["fidelity"]["exact"] is False
    assert report["fitted_on"] == "the calibration text given" and report["verified_on"] == "the text given"
    assert report["fidelity"]["mean_kl"] > 1e-3 and report["fidelity"]["perplexity"] > 1
    assert json.loads((tmp_path / "sas" / "fidelity.json").read_text()) == report
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "sas")
    assert converted.config.attention_type == "mla" and converted.num_parameters() == report["parameters"]
    ids = torch.randint(300, (1, 30))
    out = converted.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(converted(out[:, :-1]).logits.argmax(-1)[:, 29:], out[:, 30:])


@pytest.mark.parametrize("text", [None, python_reference()[1000:5000]], ids=["all of it", "a part"])
def test_what_was_fitted_is_not_measured_on(text, folder, tmp_path):
    with pytest.raises(ValueError, match="is in `calibration`, which the conversion is fitted on"):
        convert_checkpoint(folder, tmp_path / "sas", gqa(1), text=text, calibration=python_reference())
    assert not (tmp_path / "sas").exists()


def test_what_is_measured_is_not_what_was_fitted(folder, tmp_path):
    report = convert_checkpoint(folder, tmp_path / "sas", gqa(1), windows=2)
    assert report["fitted_on"] == "the first nine tenths of the text verified on"


def test_the_perplexities_are_those_of_the_models_own_loss(folder):
    source = AutoModelForCausalLM.from_pretrained(folder)
    converted = convert_model(source, gqa(1), CALIBRATION)
    fidelity = compare_models(source, converted, HELD_OUT)
    for model, found in ((source, fidelity.perplexity_source), (converted, fidelity.perplexity)):
        with torch.no_grad():
            losses = [model(input_ids=ids, labels=ids).loss for ids in HELD_OUT]
        assert found == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)
    body = compare_models(source.model, source.model, HELD_OUT)
    assert body.perplexity is None and body.perplexity_source is None


REFUSED = {
    "no such name": ("qwen2", ConversionOptions(lossy="magic"), ValueError, "`lossy` is 'magic'.*'optimised', 'eff"),
    "heads that do not divide": ("qwen2", gqa(3), ValueError, "`num_key_value_heads` is 3.*divisor.*2 that"),
    "heads not given": (
        "qwen2",
        ConversionOptions(lossy="gqa"),
        ValueError,
        "`num_key_value_heads` is None.*smaller: 1",
    ),
    "one head is no group": ("qwen3-biases", gqa(1), ConversionError, "has one only"),
    "heads for another name": (
        "qwen2",
        ConversionOptions(lossy="mla", num_key_value_heads=1),
        ValueError,
        "`num_key_value_heads` .1. belongs to `lossy='gqa'`",
    ),
    "rank without a name": ("qwen2", ConversionOptions(kv_lora_rank=4), ValueError, "belongs to `lossy='mla'`"),
    "rank too large": (
        "qwen2",
        ConversionOptions(lossy="mla", kv_lora_rank=42),
        ValueError,
        "`kv_lora_rank` is 42.*from 2 to 41",
    ),
    "slices of another width": (
        "mistral",
        ConversionOptions(lossy="optimised"),
        ConversionError,
        r"`head_dim` \(14\) x `num_attention_heads` \(6\) must be `hidden_size` \(60\)",
    ),
    "normed queries": ("olmo2", ConversionOptions(lossy="efficient"), ConversionError, "qk_norm.*all_heads"),
    "latents of learned positions": ("gpt2", ConversionOptions(lossy="mla"), ConversionError, "positions are learned"),
    "odd partial rotation": ("gpt_neox", ConversionOptions(lossy="mla"), ConversionError, "other frequencies"),
    "simulated heads": (
        "qwen2",
        ConversionOptions(lossy="mla", num_simulated_heads=7),
        ValueError,
        "num_simulated_heads.*7",
    ),
}


@pytest.mark.parametrize(("shape", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_before_weights_are_read(shape, options, error, message, tmp_path):
    source = tiny_source(shape)
    source.config.architectures = [type(source).__name__]
    source.config.save_pretrained(tmp_path / "source")  # no weights: an error about them would come too late
    with pytest.raises(error, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas", options)
    assert files_in(tmp_path) == ["source"]


def test_images_are_refused():
    with pytest.raises(ConversionError, match="model of images"):
        convert_model(vit_source("vit", "ViTModel"), ConversionOptions(lossy="optimised"), CALIBRATION)


@pytest.mark.parametrize(
    ("options", "calibration", "message"),
    [
        (ConversionOptions(lossy="mla"), None, "lossy='mla'` is fitted on `calibration`, which is missing"),
        (ConversionOptions(), CALIBRATION, "nothing to do with it"),
        (ConversionOptions(lossy="mla"), CALIBRATION[:1], "`calibration` has 40 tokens.*60 features"),
    ],
)
def test_calibration_belongs_to_lossy_conversions(options, calibration, message):
    with pytest.raises(ValueError, match=message):
        convert_model(tiny_source("qwen2"), options, calibration)


def test_without_tokenizer_there_is_no_text_to_fit_on(tmp_path):
    tiny_source("qwen2").save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match="no tokenizer"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas", gqa(1))
    assert files_in(tmp_path) == ["source"]


def test_the_command_asks_by_name_and_shows_what_is_lost(folder, tmp_path):
    run = sas_hf("convert", folder, tmp_path / "sas", "--lossy", "gqa", "--num-key-value-heads", "1")
    assert run.returncode == 0, run.stderr
    assert "lossy" in run.stdout and "perplexity before, after" in run.stdout and "allowed" not in run.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sas").config.num_key_value_heads == 1
    run = sas_hf("convert", folder, tmp_path / "other", "--lossy", "magic")
    assert run.returncode == 1 and "must be one of 'optimised'" in run.stderr and "Traceback" not in run.stderr
    assert files_in(tmp_path) == ["sas", "source"]
