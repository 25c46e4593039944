"""Model cards: what is carried along, what is added, and what is never made up."""

import pytest
from helpers import gpt, vit
from hub_server import card_errors
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from sas_hf import SASGPTModel, SASViTForMaskedImageModeling, SASViTModel
from sas_hf.conversion import ConversionOptions, convert_checkpoint, restore_checkpoint
from sas_hf.hub.card import conversion_card, export_card, read_card, restoration_card
from sas_hf.hub.export import export_model


REPORT = {
    "source": "someone/source",
    "revision": "v2",
    "source_architecture": "LlamaForCausalLM",
    "architecture": "SASGPTForCausalLM",
    "options": {"num_simulated_heads": None, "perturbation": 1.0},
    "simulation": {
        "num_simulated_heads": 12,
        "simulated_head_dim": None,
        "simulate_value_features": True,
        "simulation_kernel_size": 3,
        "head_aggregation": "mean",
    },
    "verified_on": "the text given",
    "fidelity": {
        "max_abs_difference": 1.25e-5,
        "max_abs_output": 12.5,
        "mean_kl": 3e-12,
        "argmax_agreement": 1.0,
        "source_eager_sdpa_difference": 2e-5,
        "tokens": 777,
    },
    "parameters": 1_100,
    "parameters_source": 1_000,
    "versions": {"sas_hf": "0.1.0"},
}


def test_a_converted_models_card_tells_recipe_numbers_and_how_to_load():
    card = conversion_card(REPORT, ModelCard("---\nlicense: mit\nlanguage: [en, de]\ntags: [llama]\n---\n# Source\n"))
    assert card_errors(str(card)) == ([], [])
    data = card.data
    assert (data.license, data.language, data.base_model) == ("mit", ["en", "de"], "someone/source")
    assert (data.base_model_relation, data.library_name) == ("finetune", "transformers")
    assert (data.pipeline_tag, data.tags) == ("text-generation", ["sas", "sas_hf"])
    for text in (
        "revision `v2`",
        "12 simulated heads",
        '"perturbation": 1.0',
        "1.25e-05",
        "777 tokens",
        "import sas_hf",
    ):
        assert text in card.text, text


def test_a_card_of_an_image_model_counts_images_and_names_its_task():
    report = REPORT | {
        "architecture": "SASViTForImageClassification",
        "fidelity": REPORT["fidelity"] | {"images": 8, "tokens": 0},
    }
    card = conversion_card(report, None)
    assert card.data.pipeline_tag == "image-classification"
    assert "8 images" in card.text and "tokens" not in card.text and "AutoModelForImageClassification" in card.text
    tasks = {
        SASViTModel: "image-feature-extraction",
        SASViTForMaskedImageModeling: None,
        SASGPTModel: "feature-extraction",
    }
    for model_class, task in tasks.items():
        model = (gpt if model_class is SASGPTModel else vit)("sas", model_class=model_class)
        assert export_card(model, "model", None, None).data.pipeline_tag == task


def test_no_licence_is_made_up():
    for source_card in (None, ModelCard("# A card without metadata\n")):
        assert conversion_card(REPORT, source_card).data.license is None
    assert export_card(gpt("mha"), "model", None, None).data.license is None


@pytest.mark.parametrize(
    ("named", "kept"),
    [("someone/base", "someone/base"), (["someone/a", "/home/me/b"], "someone/a"), ("/home/me/b", None), (None, None)],
)
def test_a_local_sources_base_model_is_the_one_that_its_card_names(tmp_path, named, kept):
    source = ModelCard("---\nlicense: mit\n---\n")
    source.data.base_model, source.data.base_model_relation = named, "merge"
    card = conversion_card(REPORT | {"source": str(tmp_path)}, source)
    assert card.data.base_model == kept
    assert card.data.get("base_model_relation") == ("merge" if kept else None)
    assert card_errors(str(card)) == ([], [])


def test_an_exports_card_keeps_what_its_author_wrote():
    own = (
        "---\nlicense: other\nlicense_name: mine\ntags: [chess]\npipeline_tag: text-generation\n---\n\n# My model\n\n"
    )
    own += "Trained by hand.\n\n## How to load\n\nI do not know.\n\n## Thanks\n\nTo all.\n"
    card = export_card(gpt("mha"), "model", ModelCard(own), REPORT)
    assert card_errors(str(card)) == ([], [])
    assert (card.data.license, card.data.license_name) == ("other", "mine")
    assert card.data.tags == ["chess", "sas", "sas_hf", "custom_code"]
    assert "Trained by hand." in card.text and "To all." in card.text
    assert "I do not know" not in card.text and card.text.count("## How to load") == 1
    assert "trust_remote_code=True" in card.text and "import sas_hf" in card.text
    assert card.text.index("## How to load") < card.text.index("## Thanks") < card.text.index("## Fidelity")
    assert "1.25e-05" in card.text
    # Exported again, nothing is told twice.
    assert str(export_card(gpt("mha"), "model", ModelCard(str(card)), REPORT)) == str(card)


def test_a_checkpoint_without_card_gets_one_that_describes_it():
    card = export_card(gpt("gqa", model_class=SASGPTModel), "thing", None, None)
    assert card_errors(str(card)) == ([], [])
    assert card.text.startswith("# thing\n") and "SASGPTModel" in card.text and "4 heads" in card.text
    assert "AutoModel.from_pretrained" in card.text
    assert "Fidelity" not in card.text


def test_a_card_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "README.md").write_text("---\n- a list\n---\n")
    with pytest.raises(ValueError, match="README.md has metadata that cannot be read"):
        read_card(tmp_path)
    (tmp_path / "README.md").unlink()
    assert read_card(tmp_path) is None


def test_a_conversion_carries_its_sources_licence(tmp_path):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\nbase_model: someone/base\n---\n# Source\n")
    convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    export_model(tmp_path / "sas", tmp_path / "export")
    for name in ("sas", "export"):
        card = read_card(tmp_path / name)
        assert card_errors(str(card)) == ([], [])
        assert (card.data.license, card.data.base_model) == ("mit", "someone/base")
        assert "## Fidelity" in card.text

    (tmp_path / "source" / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match="README.md has metadata that cannot be read"):
        convert_checkpoint(tmp_path / "source", tmp_path / "again")
    assert not (tmp_path / "again").exists()


SHAPES = {  # of reports, as the functions write them
    "older": {},
    "exact": {
        "commit": None,
        "dtype_saved": "float32",
        "fidelity_unrounded": None,
        "in_saved_dtype": None,
        "lossy": None,
        "fitted_on": None,
        "weights_recomputed": [],
        "fields_unknown": {},
        "files_left_out": None,
    },
    "rounded": {
        "dtype_saved": "bfloat16",
        "fidelity_unrounded": REPORT["fidelity"] | {"max_abs_difference": 0.0625, "mean_kl": None},
        "in_saved_dtype": {"max_abs_difference": 0.125, "source_max_abs_difference": None},
    },
    "narrow": {
        "dtype_saved": "bfloat16",
        "in_saved_dtype": {"max_abs_difference": None, "source_max_abs_difference": None},
    },
    "lossy": {"dtype_saved": "float32", "lossy": "gqa", "fitted_on": "the calibration text given"},
    "left out": {"fields_unknown": {"extra": None}, "files_left_out": [f"{n}.bin" for n in range(12)]},
    "of a body": {
        "fidelity": REPORT["fidelity"] | {"mean_kl": None, "perplexity": None},
        "commit": "0123456789abcdef",
    },
}
CARDS = {
    "none": None,
    "no metadata": "# A card\n",
    "empty values": "---\nlicense:\nlanguage:\nbase_model:\ntags:\npipeline_tag:\n---\n",
    "licences": "---\nlicense: [mit, apache-2.0]\nbase_model: [a/b, c/d]\n---\n",
    "other": "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: ./here\n---\n",
}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("local", [True, False])
def test_no_card_says_none_or_makes_up_a_licence(shape, card, local, tmp_path):
    source = str(tmp_path) if local else "someone/source"
    report = REPORT | SHAPES[shape] | {"source": source, "revision": None if local else "v2"}
    own = CARDS[card] and ModelCard(CARDS[card])
    licence = own and own.data.license
    restored = {name: value for name, value in report.items() if name not in ("options", "simulation")}
    restored |= {"source_architecture": "SASGPTForCausalLM", "architecture": "LlamaForCausalLM"}
    made = [conversion_card(report, own), export_card(gpt("mha"), "model", own and ModelCard(CARDS[card]), report)]
    if report.get("lossy") is None:
        made.append(restoration_card(restored, own))
    for result in made:
        assert "None" not in str(result).replace("null", "")
        assert result.data.license == (licence or None)
        if card != "licences":  # a list is carried as it is; the Hub has repositories with such
            assert card_errors(str(result)) == ([], [])
        assert "## Fidelity" in result.text and "## How to load" in result.text
    assert (made[0].data.base_model == "someone/source") == (not local)


def test_a_card_says_what_its_numbers_mean():
    card = conversion_card(REPORT | SHAPES["rounded"], None).text
    assert "computes with its weights rounded to bfloat16" in card and "differed by up to 0.0625" in card
    assert "against its source (weights rounded to bfloat16) in float32" in card
    assert "| weights saved in | bfloat16 |" in card
    assert "When it was made, it computed what its source computes." not in card
    lossy = conversion_card(REPORT | SHAPES["lossy"], None).text
    assert "it does not compute what its source computes" in lossy and "saved in float32" in lossy
    assert "`7.bin` and 4 more" in conversion_card(REPORT | SHAPES["left out"], None).text
    assert "(commit `0123456789ab`)" in conversion_card(REPORT | SHAPES["of a body"], None).text


def test_a_folder_that_is_called_by_a_dot_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert conversion_card(REPORT | {"source": "."}, None).text.strip().startswith("# mine with Simulated")


def test_what_was_restored_carries_the_licence_and_loads_without_us(tmp_path):
    fields = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=2)).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\ntags: [chess]\n---\n# Source\n")
    convert_checkpoint(tmp_path / "source", tmp_path / "sas", ConversionOptions(num_simulated_heads=4), windows=1)
    restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    card = read_card(tmp_path / "back")
    assert card_errors(str(card)) == ([], [])
    assert card.data.license == "mit" and card.data.pipeline_tag == "text-generation" and not card.data.base_model
    assert card.text.strip().startswith("# sas as LlamaForCausalLM") and "import sas_hf" not in card.text
    assert "LlamaForCausalLM.from_pretrained" in card.text and "SASGPTForCausalLM" in card.text
