"""Encoders: a conversion computes what its source computes, padded and in pairs, with every head."""

import json

import pytest
import torch
import transformers
from helpers import scramble
from safetensors.torch import load_file, save_file
from tiny_encoders import (
    FAMILY_NAMES,
    HEADS,
    SHAPES,
    architecture,
    padded_batches,
    tiny_encoder,
    tiny_tokenizer,
)
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from sas_hf.conversion import (
    ConversionError,
    ConversionOptions,
    compare_models,
    convert_checkpoint,
    convert_model,
    restore_checkpoint,
)
from sas_hf.conversion.convert import ENCODER_FAMILIES
from sas_hf.modeling.attention import SASAttention


OPTIONS = {
    "plain": ConversionOptions(num_simulated_heads=0, simulated_head_dim=0),
    "kernel 1": ConversionOptions(),
    "kernel 3": ConversionOptions(simulation_kernel_size=3, perturbation=2.0),
    "beyond the paper": ConversionOptions(simulate_value_features=True, head_aggregation="concat"),
}


def test_every_family_has_a_source_here():
    assert set(FAMILY_NAMES) == {family.model_type for family in ENCODER_FAMILIES}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_shape_is_exact_in_float32_and_float64(shape, option):
    source = tiny_encoder(shape, architecture(shape, "ForMaskedLM"))
    converted = convert_model(source, OPTIONS[option])
    batches = padded_batches(converted)
    fidelity = compare_models(source, converted, batches)
    assert fidelity.is_exact, fidelity
    assert fidelity.compared == ("logits",) and fidelity.argmax_agreement == 1.0
    assert converted.config.simulates == (option != "plain")
    if option == "kernel 1":
        heads, width = source.config.num_attention_heads, 60 // source.config.num_attention_heads
        simulated = (converted.config.num_simulated_heads, converted.config.simulated_head_dim)
        assert simulated == (3 * heads, width * 3 // 2)

    source, converted = source.double(), converted.double()
    for batch in batches:
        real = batch["attention_mask"] != 0
        assert (converted(**batch).logits - source(**batch).logits)[real].abs().max() <= 1e-9


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_padding_on_the_left_is_what_it_is_in_the_source(shape):
    source = tiny_encoder(shape, architecture(shape, "ForMaskedLM"))
    converted = convert_model(source)
    pad = source.config.pad_token_id
    ids = torch.randint(pad + 1, 300, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    batch = {"input_ids": ids * mask + pad * (1 - mask), "attention_mask": mask}
    expected, found = source(**batch).logits, converted(**batch).logits
    assert (found - expected)[mask != 0].abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("shape", "name"), HEADS)
@torch.no_grad()
def test_every_head_is_carried_over(shape, name):
    two = name.endswith("ForQuestionAnswering")
    names = {"id2label": {0: "a", 1: "b"}} if two else {"id2label": {0: "a", 1: "b", 2: "c"}}
    source = tiny_encoder(shape, name, **names)
    converted = convert_model(source)
    fidelity = compare_models(source, converted, padded_batches(converted))
    assert fidelity.is_exact, fidelity
    assert type(converted).__name__.removeprefix("SASEncoder") == name[name.index(type(converted).__name__[10:]) :]
    assert converted.config.id2label == source.config.id2label
    compared = {
        "Model": ("last_hidden_state", "pooler_output"),
        "ForQuestionAnswering": ("start_logits", "end_logits"),
    }
    expected = compared.get(type(converted).__name__.removeprefix("SASEncoder"), ("logits",))
    assert fidelity.compared == (expected[:1] if name == "DistilBertModel" else expected)
    is_body = type(converted).__name__ == "SASEncoderModel"
    assert (fidelity.mean_kl is None, fidelity.argmax_agreement) == (is_body, None if is_body else 1.0)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_labels_that_are_no_distribution_have_no_agreement(problem):
    labels = {"num_labels": 1} if problem == "regression" else {"num_labels": 3}
    source = tiny_encoder("bert", "BertForSequenceClassification", problem_type=problem, **labels)
    converted = convert_model(source)
    fidelity = compare_models(source, converted, padded_batches(converted))
    assert fidelity.is_exact and converted.config.problem_type == problem
    assert (fidelity.mean_kl is not None) == (problem == "single_label_classification")
    assert (fidelity.argmax_agreement is not None) == (problem == "single_label_classification")


@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_a_conversion_can_learn(shape):
    converted = convert_model(tiny_encoder(shape, architecture(shape, "ForMaskedLM")))
    batch = torch.randint(6, 300, (2, 40))
    converted(input_ids=batch, labels=batch.flip(1)).loss.backward()
    simulated = 0
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None, name
        if "_simulation." in name and name.endswith("weight"):
            simulated += 1
            assert parameter.grad.norm() > 1e-6, name
        if "_simulation.heads.expansion.weight" in name or "q_simulation.features.expansion.weight" in name:
            assert parameter.grad.flatten(1).norm(dim=1).min() > 0, name
    assert simulated >= 3 * 5


@pytest.mark.parametrize(
    ("shape", "name", "fields", "expected"),
    [
        ("bert", "BertForSequenceClassification", {"classifier_dropout": 0.4}, (0.1, 0.1, 0.4)),
        ("bert", "BertModel", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}, (0.2, 0.3, None)),
        ("roberta", "RobertaForSequenceClassification", {"classifier_dropout": 0.4}, (0.1, 0.1, 0.4)),
        (
            "roberta",
            "RobertaForMultipleChoice",
            {"classifier_dropout": 0.4, "hidden_dropout_prob": 0.2},
            (0.2, 0.1, 0.2),
        ),
        (
            "distilbert",
            "DistilBertForSequenceClassification",
            {"dropout": 0.2, "attention_dropout": 0.3, "seq_classif_dropout": 0.4},
            (0.2, 0.3, 0.4),
        ),
        (
            "distilbert",
            "DistilBertForTokenClassification",
            {"dropout": 0.2, "seq_classif_dropout": 0.4},
            (0.2, 0.1, None),
        ),
    ],
)
def test_dropouts_are_the_sources(shape, name, fields, expected):
    config = convert_model(tiny_encoder(shape, name, **fields)).config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout) == expected


def test_what_no_output_shows_is_the_sources():
    config = convert_model(tiny_encoder("roberta", "RobertaForMaskedLM", bos_token_id=7, eos_token_id=9)).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (7, 9, 1)
    assert (config.initializer_range, config.max_position_embeddings) == (0.2, 126)


@pytest.mark.parametrize(("shape", "side"), [(shape, "right") for shape in FAMILY_NAMES] + [("bert", "left")])
def test_a_checkpoint_is_converted_with_its_tokenizer(shape, side, tmp_path):
    tokenizer = tiny_tokenizer(shape, padding_side=side)
    name = architecture(shape, "ForMaskedLM")
    source = tiny_encoder(shape, name, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).bfloat16()
    source.save_pretrained(tmp_path / "source", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=2, window_length=64)
    assert report["fidelity"]["exact"] and report["dtype_saved"] == "bfloat16"
    assert report["fidelity"]["compared"] == ["logits"]
    assert report["verified_on"] == "the Python language reference, in padded batches with text pairs"
    assert report["fidelity"]["tokens"] == 2 * (64 + 16), "padding counts"
    assert report["files_left_out"] == [] and report["weights_left_out"] == []

    converted = AutoModelForMaskedLM.from_pretrained(tmp_path / "sas", dtype=torch.float32)
    source = getattr(transformers, name).from_pretrained(tmp_path / "source", dtype=torch.float32)
    assert compare_models(source, converted, padded_batches(converted)).is_exact
    carried = AutoTokenizer.from_pretrained(tmp_path / "sas")
    assert type(carried) is type(tokenizer) and carried.padding_side == side
    assert dict(carried("an expression", "of two")) == dict(tokenizer("an expression", "of two"))


def wrong_types(converted):
    converted.model.embeddings.token_type_embeddings.weight.data[1, 7] += 1e-2


def wrong_late_position(converted):
    converted.model.embeddings.embed_positions.weight.data[60, 7] += 1e-2


def wrong_value_of_a_copy(converted):
    layer = next(module for module in converted.modules() if isinstance(module, SASAttention))
    layer.v_simulation.heads.expansion.weight.data[0] += 1e-2


@pytest.mark.parametrize("damage", [wrong_types, wrong_late_position, wrong_value_of_a_copy])
def test_verification_sees_what_is_wrong(damage, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer("bert")
    tiny_encoder("bert", "BertForMaskedLM").save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    whole = convert_model

    def damaged(source, options, share, calibration):
        converted = whole(source, options)
        damage(converted)
        return converted

    monkeypatch.setattr("sas_hf.conversion.checkpoint.convert", damaged)
    with pytest.raises(ConversionError, match="The conversion is not exact"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=2, window_length=64)
    assert not (tmp_path / "sas").exists()


# Of untied heads: the bias that counts is the decoder's.
UNUSED = {"bert-untied": "cls.predictions.bias", "roberta-untied": "lm_head.bias"}
UNUSED_ROWS = {"roberta": 2, "roberta-untied": 6, "xlm-roberta": 2, "camembert": 2}


def assert_came_back(restored, source, shape):
    expected = source.state_dict()
    assert restored.state_dict().keys() == expected.keys()
    for name, weight in restored.state_dict().items():
        if name == UNUSED.get(shape):
            continue
        unused = UNUSED_ROWS.get(shape, 0) if "position_embeddings" in name else 0
        assert torch.equal(weight[unused:], expected[name][unused:]), name
        assert not weight[:unused].any(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_comes_back(shape, tmp_path):
    source = tiny_encoder(shape, architecture(shape, "ForMaskedLM"))
    source.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    report = restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    assert report["fidelity"]["exact"] and report["architecture"] == type(source).__name__
    restored = type(source).from_pretrained(tmp_path / "back")
    assert_came_back(restored, source, shape)
    written = ("dtype", "_name_or_path", "transformers_version", "architectures")
    found, expected = (model.config.to_dict() for model in (restored, source))
    assert {name: found[name] for name in found if name not in written} == {
        name: expected[name] for name in expected if name not in written
    }


@pytest.mark.parametrize(("shape", "name"), HEADS)
def test_every_head_comes_back(shape, name, tmp_path):
    source = tiny_encoder(shape, name, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    source.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    restored = type(source).from_pretrained(tmp_path / "back")
    assert_came_back(restored, source, shape)
    assert restored.config.id2label == source.config.id2label


def add_weights(folder, weights):
    stored = load_file(folder / "model.safetensors")
    save_file(stored | weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("shape", "head", "body"),
    [
        ("bert", "ForMaskedLM", "bert."),
        ("bert", "ForTokenClassification", "bert."),
        ("roberta", "ForMaskedLM", "roberta."),
        ("roberta", "ForSequenceClassification", "roberta."),
        ("xlm-roberta", "ForQuestionAnswering", "roberta."),
    ],
)
def test_the_pooler_and_the_next_sentence_head_of_another_class_are_left_out_and_told(shape, head, body, tmp_path):
    source = tiny_encoder(shape, architecture(shape, head))
    source.save_pretrained(tmp_path / "source")
    beside = {f"{body}pooler.dense.weight": torch.randn(60, 60), f"{body}pooler.dense.bias": torch.randn(60)}
    if shape == "bert":
        beside |= {"cls.seq_relationship.weight": torch.randn(2, 60), "cls.seq_relationship.bias": torch.randn(2)}
    add_weights(tmp_path / "source", beside)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    assert report["fidelity"]["exact"] and report["weights_left_out"] == sorted(beside)
    assert f"`{body}pooler.dense.weight`" in (tmp_path / "sas" / "README.md").read_text()


@pytest.mark.parametrize("name", ["classifier.weight", "bert.encoder.layer.3.output.dense.weight", "pooler.weight"])
def test_any_other_weight_that_would_be_left_out_is_refused(name, tmp_path):
    tiny_encoder("bert", "BertForMaskedLM").save_pretrained(tmp_path / "source")
    add_weights(tmp_path / "source", {name: torch.randn(60, 60)})
    with pytest.raises(ConversionError, match=f"{name}.*BertForMaskedLM.from_pretrained"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)


def test_names_of_norms_from_tensorflow_and_a_lone_bias_are_read_as_they_are_meant(tmp_path):
    """As bert-base-uncased is stored."""
    source = tiny_encoder("bert", "BertForMaskedLM")
    source.save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in stored.items()
        if not name.startswith("cls.predictions.decoder")
    } | {"bert.embeddings.position_ids": torch.arange(128)[None]}
    assert any(name.endswith("gamma") for name in renamed) and "cls.predictions.bias" in renamed
    save_file(renamed, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    assert report["weights_recomputed"] == ["bert.embeddings.position_ids"]
    converted = AutoModelForMaskedLM.from_pretrained(tmp_path / "sas")
    assert compare_models(source, converted, padded_batches(converted)).is_exact


@pytest.mark.parametrize("shape", ["bert", "roberta"])
def test_a_body_without_pooler_stays_without(shape, tmp_path):
    made = tiny_encoder(shape, architecture(shape, "Model"))
    source = scramble(type(made)(made.config, add_pooling_layer=False))
    converted = convert_model(source)
    assert compare_models(source, converted, padded_batches(converted)).compared == ("last_hidden_state",)
    source.save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    assert report["fidelity"]["exact"] and report["fidelity"]["compared"] == ["last_hidden_state"]
    model, loading = AutoModel.from_pretrained(tmp_path / "sas", output_loading_info=True)
    assert not loading["missing_keys"] and model.pooler is None
    restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    assert_came_back(type(source).from_pretrained(tmp_path / "back", add_pooling_layer=False), source, shape)


def test_half_a_pooler_is_refused(tmp_path):
    tiny_encoder("bert", "BertModel").save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    del stored["pooler.dense.bias"]
    save_file(stored, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match="lacks weights of BertModel: pooler.dense.bias"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas")


def test_a_bias_of_its_own_is_refused_where_matrices_are_tied(tmp_path):
    source = tiny_encoder("bert", "BertForMaskedLM")
    source.cls.predictions.decoder.bias = torch.nn.Parameter(source.cls.predictions.bias + 1)
    with pytest.raises(ConversionError, match="cls.predictions.decoder.bias and cls.predictions.bias are one weight"):
        convert_model(source)


REFUSED = {  # shape, class that the source names, fields, what the message must say
    "a decoder": ("bert", "BertModel", {"is_decoder": True}, "`is_decoder` is true.*SASEncoder.*bart, mbart, marian"),
    "with cross-attention": (
        "roberta",
        "RobertaModel",
        {"add_cross_attention": True},
        "`add_cross_attention` is true",
    ),
    "relative positions": (
        "bert",
        "BertForMaskedLM",
        {"position_embedding_type": "relative_key_query"},
        "`position_embedding_type` is 'relative_key_query'.*\"absolute\"",
    ),
    "pre-training": (
        "bert",
        "BertForPreTraining",
        {},
        "BertForPreTraining, which has no SAS.*BertModel, BertForMaskedLM.*`BertModel.from_pretrained",
    ),
    "next sentence": ("bert", "BertForNextSentencePrediction", {}, "BertForMultipleChoice"),
    "a language model": ("roberta", "RobertaForCausalLM", {}, "RobertaForCausalLM.*RobertaForMaskedLM"),
    "no padding token": ("roberta", "RobertaModel", {"pad_token_id": None}, "`pad_token_id` is null.*config.json"),
    "padding beyond the vocabulary": (
        "distilbert",
        "DistilBertModel",
        {"pad_token_id": 300},
        "`pad_token_id` is 300.*300",
    ),
    "quantised": ("bert", "BertModel", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
}


@pytest.mark.parametrize(("shape", "named", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_an_approximation_is_refused_before_weights_are_read(shape, named, fields, message, tmp_path):
    config = AutoConfig.for_model(**SHAPES[shape] | fields, architectures=[named])
    config.save_pretrained(tmp_path / "source")  # no weights: an error about them would mean that this came too late
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas")
    assert not (tmp_path / "sas").exists()


def test_an_activation_with_weights_is_refused_by_their_names():
    source = tiny_encoder("bert", "BertForMaskedLM", hidden_act="prelu")
    with pytest.raises(ConversionError, match=r"missing \['[a-z0-9_.]+\.act_fn\.weight'"):
        convert_model(source)


def test_a_live_decoder_is_refused():
    config = BertConfig(**{name: value for name, value in SHAPES["bert"].items() if name != "model_type"})
    config.is_decoder = True
    with pytest.raises(ConversionError, match="`is_decoder` is true"):
        convert_model(BertForMaskedLM(config))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("t5", "bias that depends on the distance"),
        ("mt5", "bias that depends on the distance"),
        ("mpnet", "bias that depends on the distance"),
        ("deberta-v2", "relative positions"),
        ("albert", "share their weights"),
        ("encoder-decoder", "two models in one folder"),
        ("whisper", "source is sound"),
        ("pegasus", "not supported"),
    ],
)
def test_what_has_no_family_is_refused_with_the_reason_and_the_families_that_are(model_type, reason, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConversionError, match=f"'{model_type}'.*{reason}.* bert, .* roberta"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas")


@pytest.mark.parametrize("lossy", ["gqa", "optimised"])
def test_lossy_conversions_are_refused(lossy):
    source = tiny_encoder("bert", "BertForMaskedLM")
    with pytest.raises(ConversionError, match=f"`lossy` \\('{lossy}'\\) is for decoders; the source is an encoder,"):
        convert_model(source, ConversionOptions(lossy=lossy), [torch.randint(300, (1, 100))])
