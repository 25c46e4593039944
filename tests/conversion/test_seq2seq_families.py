"""Encoder-decoders: a conversion computes and writes what its source does, with attention simulated in every place."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_seq2seq import (
    FAMILY_NAMES,
    HEADS,
    SHAPES,
    bart_tokenizer,
    head_of,
    mbart_tokenizer,
    padded_pair,
    tiny_seq2seq,
    write_marian_tokenizer,
)
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from sas_hf.conversion import (
    ConversionError,
    ConversionOptions,
    compare_models,
    convert_checkpoint,
    convert_model,
    restore_checkpoint,
)
from sas_hf.conversion.convert import SEQ2SEQ_FAMILIES
from sas_hf.conversion.samples import verification_samples
from sas_hf.modeling.attention import SASAttention


OPTIONS = {
    "plain": ConversionOptions(num_simulated_heads=0, simulated_head_dim=0),
    "kernel 1": ConversionOptions(),
    "kernel 3": ConversionOptions(simulation_kernel_size=3, perturbation=2.0),
    "beyond the paper": ConversionOptions(simulate_value_features=True, head_aggregation="concat"),
}


def samples(converted, count: int = 3, length: int = 40) -> list:
    return verification_samples(type(converted), converted.config, None, None, None, count, length, seed=0)[0]


def test_every_family_has_a_source_here():
    assert set(FAMILY_NAMES) == {family.model_type for family in SEQ2SEQ_FAMILIES}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("shape", "name"), HEADS)
@torch.no_grad()
def test_every_shape_is_exact_in_float32_and_float64(shape, name, option):
    source = tiny_seq2seq(shape, name)
    converted = convert_model(source, OPTIONS[option])
    batches = samples(converted)
    fidelity = compare_models(source, converted, batches)
    assert fidelity.is_exact, fidelity
    has_head = not name.endswith("Model") or name == "MarianMTModel"
    assert fidelity.compared == (("logits",) if has_head else ("last_hidden_state", "encoder_last_hidden_state"))
    assert fidelity.argmax_agreement == (1.0 if has_head else None)
    assert fidelity.tokens == 3 * 2 * (40 + 20), "source and target, without padding"

    source, converted = source.double(), converted.double()
    for batch in batches:
        mask = batch["labels"] != -100 if has_head else batch["decoder_attention_mask"] != 0
        found, expected = (
            model(**batch)["logits" if has_head else "last_hidden_state"] for model in (converted, source)
        )
        # Marian's table is float32 whatever the model is in, and so is ours.
        assert (found - expected)[mask].abs().max() <= 1e-9


def test_attention_is_simulated_in_every_place():
    source = tiny_seq2seq("bart")
    converted = convert_model(source)
    layers = {name: module for name, module in converted.named_modules() if isinstance(module, SASAttention)}
    assert len(layers) == 2 + 3 + 3 and sum("encoder_attn" in name for name in layers) == 3
    for name, layer in layers.items():
        heads = layer.v_simulation.heads.expansion.weight
        assert heads.shape[0] == 15, name
        # Groups of copies of the 5 heads, apart, whose mean is the source's.
        groups = heads.unflatten(0, (3, 5))
        assert (groups[0] - groups[1]).abs().max() > 0.1, name
        assert torch.equal(groups.sum(0)[..., 0], 3 * torch.eye(5)), name


@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_a_conversion_can_learn(shape):
    converted = convert_model(tiny_seq2seq(shape))
    batch = padded_pair(converted.config)
    converted(**batch, labels=torch.randint(3, 200, (2, 20))).loss.backward()
    simulated = 0
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None, name
        if "_simulation." in name and name.endswith("weight"):
            simulated += 1
            assert parameter.grad.norm() > 1e-6, name
        if "_simulation.heads.expansion.weight" in name or "q_simulation.features.expansion.weight" in name:
            assert parameter.grad.flatten(1).norm(dim=1).min() > 0, name
    assert simulated >= 8 * 5


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_and_beams_are_the_sources(shape, side):
    source = tiny_seq2seq(shape)
    batch = padded_pair(source.config, side)
    start = {} if source.config.decoder_start_token_id is not None else {"decoder_start_token_id": 7}
    converted = convert_model(source)
    for beams in (1, 3):
        settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams} | start
        expected = source.generate(**batch, **settings)
        for cache in ("expanded", "base"):
            converted.config.simulation_cache = cache
            assert torch.equal(converted.generate(**batch, **settings), expected), (beams, cache)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_decoder_starts_as_the_sources_does(shape):
    source = tiny_seq2seq(shape)
    labels = torch.randint(3, 30, (3, 9))
    labels[1, 6:] = -100
    found = convert_model(source).prepare_decoder_input_ids_from_labels(labels)
    if shape.startswith("mbart"):
        expected = transformers.models.mbart.modeling_mbart.shift_tokens_right(labels, source.config.pad_token_id)
        assert found[0, 0] == labels[0, -1] and found[1, 0] == labels[1, 5]
    else:
        expected = source.prepare_decoder_input_ids_from_labels(labels)
        assert (found[:, 0] == source.config.decoder_start_token_id).all()
    assert torch.equal(found, expected)


def test_what_no_output_shows_is_the_sources():
    rates = {"dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.4, "use_cache": False}
    config = convert_model(
        tiny_seq2seq("bart", **rates, bos_token_id=5, eos_token_id=6, decoder_start_token_id=7)
    ).config
    assert (config.hidden_dropout, config.attention_dropout, config.activation_dropout) == (0.2, 0.3, 0.4)
    assert (config.bos_token_id, config.eos_token_id, config.decoder_start_token_id) == (5, 6, 7)
    assert (config.use_cache, config.initializer_range, config.max_position_embeddings) == (False, 0.2, 128)
    assert (config.encoder_layers, config.decoder_layers) == (2, 3)


GENERATION = {
    "num_beams": 3,
    "bad_words_ids": [[41], [42, 43]],
    "forced_bos_token_id": 50,
    "forced_eos_token_id": 2,
    "max_length": 20,
    "early_stopping": True,
    "decoder_start_token_id": 9,
}


def with_tokenizer(folder, family: str):
    """A checkpoint of this family with a real tokenizer and a generation configuration."""
    if family.startswith("marian"):
        pytest.importorskip("sentencepiece")
        separate = family == "marian-two-vocabularies"
        write_marian_tokenizer(folder, separate)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        fields = {"vocab_size": len(json.loads((folder / "vocab.json").read_text()))}
        if separate:
            fields["decoder_vocab_size"] = len(json.loads((folder / "target_vocab.json").read_text()))
        fields["decoder_start_token_id"] = tokenizer.pad_token_id
    else:
        tokenizer = bart_tokenizer() if family == "bart" else mbart_tokenizer()
        fields = {"vocab_size": len(tokenizer)}
    source = tiny_seq2seq(family, **fields, pad_token_id=tokenizer.pad_token_id)
    source.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(**GENERATION, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    return source, tokenizer


@pytest.mark.parametrize("family", ["bart", "mbart", "marian", "marian-two-vocabularies"])
def test_a_checkpoint_is_converted_with_all_that_belongs_to_it(family, tmp_path):
    source, tokenizer = with_tokenizer(tmp_path / "source", family)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=2, window_length=64)
    assert report["fidelity"]["exact"] and report["fidelity"]["compared"] == ["logits"]
    assert report["verified_on"] == "the Python language reference, padded pairs of source and target"
    assert report["files_left_out"] == []
    read = (tmp_path / folder / "generation_config.json" for folder in ("sas", "source"))
    assert json.loads(next(read).read_text()) == json.loads(next(read).read_text())

    converted = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sas")
    source = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "source")
    carried = AutoTokenizer.from_pretrained(tmp_path / "sas")
    texts = {"text": ["an expression", "of two or three"], "text_target": ["a statement", "two of them, at most"]}
    assert carried(**texts) == tokenizer(**texts)
    batch = carried(texts["text"], padding=True, return_tensors="pt")
    expected = source.generate(**batch)
    assert torch.equal(converted.generate(**batch), expected)
    assert expected[0, 0] == 9 and expected[0, 1] == 50 and expected.shape[1] <= 20
    for file in ("tokenizer_config.json", "source.spm", "target.spm", "vocab.json", "target_vocab.json"):
        assert (tmp_path / "sas" / file).exists() == (tmp_path / "source" / file).exists(), file
    settings = [json.loads((tmp_path / folder / "tokenizer_config.json").read_text()) for folder in ("sas", "source")]
    assert settings[0].get("tgt_lang") == settings[1].get("tgt_lang"), "the verification's language was kept"


def test_generation_parameters_in_an_old_config_come_along(tmp_path):
    """As opus-mt models were saved: no generation_config.json."""
    tiny_seq2seq("marian").save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").unlink()
    settings = json.loads((tmp_path / "source" / "config.json").read_text())
    own = {"num_beams": 4, "bad_words_ids": [[299]], "max_length": 19}
    (tmp_path / "source" / "config.json").write_text(json.dumps(settings | own))
    convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    source, converted = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name) for name in ("source", "sas"))
    for name, value in own.items():
        assert getattr(converted.generation_config, name) == getattr(source.generation_config, name) == value, name
    batch = padded_pair(source.config)
    assert torch.equal(converted.generate(**batch), source.generate(**batch))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", ["marian", "mbart"])
def test_a_narrow_source_is_exact_and_so_is_one_that_is_rounded(shape, dtype, tmp_path):
    """Sinusoids are computed, whatever the weights are in; embeddings are scaled after they were widened."""
    source = tiny_seq2seq(shape)
    source.save_pretrained(tmp_path / "wide")
    report = convert_checkpoint(tmp_path / "wide", tmp_path / "rounded", dtype=dtype, windows=2)
    assert report["fidelity"]["exact"] and report["exact_to"].endswith(f"rounded to {dtype}")
    source.to(getattr(torch, dtype)).save_pretrained(tmp_path / "narrow")
    report = convert_checkpoint(tmp_path / "narrow", tmp_path / "sas", windows=2)
    assert report["fidelity"]["exact"] and report["dtype_saved"] == dtype and report["exact_to"] == "the source"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_comes_back(shape, tmp_path):
    source = tiny_seq2seq(shape)
    source.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    report = restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    assert report["fidelity"]["exact"] and report["architecture"] == type(source).__name__
    restored = type(source).from_pretrained(tmp_path / "back")
    expected = source.state_dict()
    assert restored.state_dict().keys() == expected.keys()
    for name, weight in restored.state_dict().items():
        unused = 2 if "embed_positions" in name and "marian" not in shape else 0
        if name == "model.shared.weight" and shape.endswith("-untied"):
            continue  # nobody's
        assert torch.equal(weight[unused:], expected[name][unused:]), name
        assert not weight[:unused].any(), name
    written = ("dtype", "_name_or_path", "transformers_version", "architectures")
    found, expected = (model.config.to_dict() for model in (restored, source))
    assert {name: found[name] for name in found if name not in written} == {
        name: expected[name] for name in expected if name not in written
    }


def test_positions_that_are_no_sinusoids_are_refused(tmp_path):
    source = tiny_seq2seq("marian")
    source.model.decoder.embed_positions.weight.data[5, 3] += 1e-3
    message = "model.decoder.embed_positions.weight holds other numbers than Marian's sinusoidal.*0.001 apart"
    with pytest.raises(ConversionError, match=message):
        convert_model(source)
    source.save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    assert "model.decoder.embed_positions.weight" not in stored
    stored["model.decoder.embed_positions.weight"] = source.model.decoder.embed_positions.weight.data
    save_file(stored, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas")
    assert not (tmp_path / "sas").exists()


def test_tables_that_differ_where_they_are_tied_are_refused():
    source = tiny_seq2seq("bart")
    source.model.decoder.embed_tokens.weight = torch.nn.Parameter(source.model.shared.weight + 1)
    with pytest.raises(ConversionError, match="decoder.embed_tokens.weight and .*shared.weight are one weight"):
        convert_model(source)


def wrong_cross_attention(converted):
    converted.model.decoder.layers[1].encoder_attn.k_proj.weight.data += 0.01


def wrong_encoder(converted):
    converted.model.encoder.layers[1].mlp.up_proj.bias.data[3] += 0.01


def wrong_start(converted):
    converted.config.decoder_start_token_id += 1


@pytest.mark.parametrize("damage", [wrong_cross_attention, wrong_encoder, wrong_start])
def test_verification_sees_what_is_wrong(damage, tmp_path, monkeypatch):
    tiny_seq2seq("bart").save_pretrained(tmp_path / "source")

    def damaged(source, options, share, calibration):
        converted = convert_model(source, options)
        damage(converted)
        return converted

    monkeypatch.setattr("sas_hf.conversion.checkpoint.convert", damaged)
    with pytest.raises(ConversionError, match="The conversion is not exact"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=2, window_length=64)
    assert not (tmp_path / "sas").exists()


REFUSED = {  # shape, class that the source names, fields, what the message must say
    "encoder layers left out": ("bart", None, {"encoder_layerdrop": 0.1}, "`encoder_layerdrop` is 0.1.*set it to 0"),
    "decoder layers left out": ("mbart", None, {"decoder_layerdrop": 0.2}, "`decoder_layerdrop` is 0.2.*set it to 0"),
    "two numbers of heads": (
        "marian",
        None,
        {"decoder_attention_heads": 6},
        r"`encoder_attention_heads` \(5\) and `decoder_attention_heads` \(6\) differ.*`num_attention_heads`",
    ),
    "no start": ("bart", None, {"decoder_start_token_id": None}, "`decoder_start_token_id` is null.*`eos_token_id`"),
    "no padding": ("mbart", None, {"pad_token_id": None}, "`pad_token_id` is null"),
    "a start beyond the vocabulary": (
        "marian-two-vocabularies",
        None,
        {"decoder_start_token_id": 250},
        "`decoder_start_token_id` is 250, but the vocabulary has 200 tokens",
    ),
    "a classifier": ("bart", "BartForSequenceClassification", {}, "no SAS.*BartModel, BartForCond.*`BartModel.from"),
    "a decoder alone": ("marian", "MarianForCausalLM", {}, r"MarianForCausalLM.*MarianModel, MarianMTModel\.$"),
    "quantised": ("bart", None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
}


@pytest.mark.parametrize(("shape", "named", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_an_approximation_is_refused_before_weights_are_read(shape, named, fields, message, tmp_path):
    config = AutoConfig.for_model(**SHAPES[shape] | fields, architectures=[named or head_of(shape)])
    config.save_pretrained(tmp_path / "source")  # no weights: an error about them would mean that this came too late
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas")
    assert not (tmp_path / "sas").exists()


def test_the_class_of_a_source_that_names_none_is_found_or_asked_for(tmp_path):
    for name in ("BartModel", "BartForConditionalGeneration"):
        tiny_seq2seq("bart", name).save_pretrained(tmp_path / name)
        settings = json.loads((tmp_path / name / "config.json").read_text())
        del settings["architectures"]
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    report = convert_checkpoint(tmp_path / "BartForConditionalGeneration", tmp_path / "sas", windows=1)
    assert report["source_architecture"] == "BartForConditionalGeneration"
    with pytest.raises(ConversionError, match="BartModel and BartForConditionalGeneration; write there which one"):
        convert_checkpoint(tmp_path / "BartModel", tmp_path / "body")  # whose head may be its embeddings
