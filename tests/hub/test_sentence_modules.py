"""What sentence-transformers keeps beside a model goes where the model goes, whole, or nothing does."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizer

from sas_hf.conversion import ConversionError, convert_checkpoint, restore_checkpoint
from sas_hf.hub.export import export_model
from sas_hf.hub.sentence_modules import find_sentence_modules


SETTINGS = {
    "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}, "prompts": {}},
    "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
}


def module(number: int, kind: str, path: str, package: str = "sentence_transformers.models") -> dict:
    return {"idx": number, "name": str(number), "path": path, "type": f"{package}.{kind}"}


def write_sentence_encoder(folder, *further):
    """A tiny sentence encoder as sentence-transformers saves one: mean pooling, a dense layer, unit length."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1
    )
    BertModel(config).save_pretrained(folder)
    modules = [
        module(0, "Transformer", ""),
        module(1, "Pooling", "1_Pooling"),
        module(2, "Dense", "2_Dense", "sentence_transformers.base.modules.dense"),
        module(3, "Normalize", "3_Normalize"),  # which has no folder
        *further,
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, settings in SETTINGS.items():
        (folder / name).write_text(json.dumps(settings))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 24}')
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 24, "out_features": 8}')
    save_file(
        {"linear.weight": torch.randn(8, 24), "linear.bias": torch.randn(8)}, folder / "2_Dense" / "model.safetensors"
    )
    return folder


CARRIED = [
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
]


def assert_carried(folder, source):
    for name in CARRIED:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name


def test_a_conversion_its_export_and_the_way_back_have_them(tmp_path):
    source = write_sentence_encoder(tmp_path / "source")
    (source / "1_Pooling" / "code.py").write_text("raise SystemExit")
    (source / "openvino").mkdir()
    (source / "openvino" / "model.bin").write_bytes(b"other weights")
    assert sorted(find_sentence_modules(source)) == CARRIED
    report = convert_checkpoint(source, tmp_path / "sas", windows=1)
    assert sorted(report["sentence_modules"]) == CARRIED and report["files_left_out"] == ["openvino/"]
    export_model(tmp_path / "sas", tmp_path / "hub")
    back = restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    assert sorted(back["sentence_modules"]) == CARRIED and back["files_left_out"] == []
    for name in ("sas", "hub", "back"):
        assert_carried(tmp_path / name, source)
        assert not list((tmp_path / name).glob("*/*.py")) and not (tmp_path / name / "openvino").exists()
        card = (tmp_path / name / "README.md").read_text()
        assert "library_name: sentence-transformers" in card and "pipeline_tag: sentence-similarity" in card
        assert "SentenceTransformer(" in card
        assert ("import sas_hf" in card) == (name != "back")
    assert 'SentenceTransformer("PATH", trust_remote_code=True)' in (tmp_path / "hub" / "README.md").read_text()


def test_a_checkpoint_that_is_not_for_sentence_transformers_has_none(tmp_path):
    BertModel(BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "source"
    )
    assert find_sentence_modules(tmp_path / "source") == []


def code_of_its_own(folder):
    return module(4, "CustomPooling", "4_Custom", "custom_st")


def second_model(folder):
    return module(4, "Transformer", "4_Transformer")


def router(folder):
    return module(4, "Router", "4_Router", "sentence_transformers.base.modules")


def pickled(folder):
    (folder / "4_Dense").mkdir(parents=True)
    (folder / "4_Dense" / "pytorch_model.bin").write_bytes(b"a pickle")
    return module(4, "Dense", "4_Dense")


def elsewhere(folder):
    return module(4, "Pooling", "../secrets")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            code_of_its_own,
            r"modules.json of .* names the module 'custom_st.CustomPooling', which is code.*take modules.js",
        ),
        (second_model, "'sentence_transformers.models.Transformer' in the folder '4_Transformer'.*Pooling, Normalize"),
        (router, "'sentence_transformers.base.modules.Router'"),
        (pickled, r"4_Dense/pytorch_model.bin, a pickle.*SentenceTransformer\(.*\).save_pretrained"),
        (elsewhere, "'../secrets', which is no folder beside it"),
    ],
)
def test_what_would_give_other_embeddings_or_run_code_is_refused_before_work_begins(make, message, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_sentence_encoder(source, make(source))
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(source, tmp_path / "sas", progress=lambda told: pytest.fail(f"work began: {told}"))
    assert not (tmp_path / "sas").exists()


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', '[{"type": "sentence_transformers.models.Pooling"}]'])
def test_a_damaged_list_is_refused(content, tmp_path):
    source = write_sentence_encoder(tmp_path / "source")
    (source / "modules.json").write_text(content)
    with pytest.raises(ConversionError, match="modules.json is no list of modules"):
        convert_checkpoint(source, tmp_path / "sas")
    assert not (tmp_path / "sas").exists()


def test_sentence_transformers_gives_the_sources_embeddings(tmp_path):
    """Where the package is there; benchmarks/sentence_embeddings.py does the same with real weights, and trains."""
    package = pytest.importorskip("sentence_transformers")
    source = write_sentence_encoder(tmp_path / "source")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "sentence",
        "of",
        "four",
        "one",
        "word",
        "the",
        "three",
    ]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(source)
    convert_checkpoint(source, tmp_path / "sas", windows=1)
    export_model(tmp_path / "sas", tmp_path / "hub")
    sentences = ["a sentence of four", "one word", "the three is the two of a sentence of an unknown one"]
    expected = package.SentenceTransformer(str(source)).encode(sentences)
    assert expected.shape == (3, 8)
    for name, options in (("sas", {}), ("hub", {"trust_remote_code": True})):
        model = package.SentenceTransformer(str(tmp_path / name), **options)
        assert model.max_seq_length == 256
        assert abs(model.encode(sentences) - expected).max() < 1e-5
