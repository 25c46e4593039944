"""What is collected: the model's own numbers, base heads by an independent way, sides, distances, and refusals."""

import html
import json
import re

import pytest
import torch
from helpers import SAS_VARIANTS, encoder, gpt, real_text, seq2seq, train_tokenizer, vit
from PIL import Image
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)
from typer.testing import CliRunner

import sas_hf
from sas_hf.cli import app
from sas_hf.looking.collecting import Place, collect


TEXT = real_text()[3][:120]
SIZES = {"vocab_size": 400, "max_position_embeddings": 128}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "forced_eos_token_id": None}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 400, "n_positions": 128}
PLAIN = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "bert": lambda: BertModel(BertConfig(**LLAMA, **SIZES)),
}
IMAGE_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    gpt("sas", **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_weights(model, tokenizer) -> torch.Tensor:
    """`[layers, heads, T, T]` as Transformers gives them."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.cat(model(**tokenizer(TEXT, return_tensors="pt"), output_attentions=True).attentions)


@pytest.mark.parametrize("variant", ["sas_k5_gqa", "mla_sas", "feature_only", "values_only", "tpa"])
def test_weights_are_what_the_model_computes_with(variant, tokenizer):
    model = gpt(variant, **SIZES)
    (place,) = sas_hf.look(model, TEXT, processor=tokenizer).places
    assert torch.equal(place.weights, own_weights(model, tokenizer))
    assert (place.base is None) == (variant == "tpa")


@pytest.mark.parametrize("family", PLAIN)
def test_plain_models_have_heads_alone(family, tokenizer):
    model = PLAIN[family]().eval()
    found = sas_hf.look(model, TEXT, processor=tokenizer)
    (place,) = found.places
    assert torch.equal(place.weights, own_weights(model, tokenizer))
    assert (place.base, place.parted, place.moved, place.maps, place.num_copies) == (None, None, None, [], 0)
    assert found.sides["source"].labels[0] and len(found.sides["source"].labels) == place.weights.shape[-1]


@pytest.mark.parametrize("variant", [name for name in SAS_VARIANTS if name != "all_rotated"])
def test_base_heads_are_those_of_the_model_without_simulation(variant, tokenizer):
    """Of the first layer, whose input is the same; by the same projections in a plain model."""
    model = gpt(variant, num_hidden_layers=1, **SIZES | ({"no_rope_layers": [1]} if "qk_norm" in variant else {}))
    off = {"num_simulated_heads": None, "simulated_head_dim": None, "simulate_value_features": False}
    fields = {name: value for name, value in model.config.to_dict().items() if name != "transformers_version"}
    plain = type(model)(type(model.config)(**fields | off | {"head_aggregation": "mean"})).eval()
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    kept = {name: tensor for name, tensor in model.state_dict().items() if shapes.get(name) == tensor.shape}
    assert not [name for name in plain.load_state_dict(kept, strict=False).missing_keys if "o_proj" not in name]
    (place,) = sas_hf.look(model, TEXT, processor=tokenizer).places
    torch.testing.assert_close(place.base, own_weights(plain, tokenizer), atol=1e-6, rtol=1e-5)


def test_a_simulation_that_changes_nothing_has_moved_and_parted_by_nothing(tokenizer):
    """Where RoPE turns simulated features, too."""
    model = gpt("all_rotated", **SIZES)
    for layer in model.model.layers:
        for simulation in (layer.self_attn.q_simulation, layer.self_attn.k_simulation):
            for maps, start in ((simulation.heads, "tiled_identity"), (simulation.features, "padded_identity")):
                for parameter in maps.parameters():
                    torch.nn.init.zeros_(parameter)
                maps.expansion.weight.data = getattr(maps.expansion, start)()
    (place,) = sas_hf.look(model, TEXT, processor=tokenizer).places
    assert place.moved.max() < 1e-5 and place.parted.max() < 1e-5
    torch.testing.assert_close(place.weights, place.base.repeat(1, 3, 1, 1), atol=1e-6, rtol=1e-5)


def test_distances():
    """Two base heads with two copies each: 0 and 2 are of the first, 1 and 3 of the second."""
    first, second = [[1.0, 0, 0], [1, 0, 0], [0.5, 0.5, 0]], [[1.0, 0, 0], [0, 1, 0], [0, 0.5, 0.5]]
    weights = torch.tensor([[first, first, second, first]])
    place = Place("self", "source", "source", weights, base=weights[:, :2])
    assert (place.num_heads, place.num_copies) == (2, 2)
    # The first row sees one token; the second moves all, the third half of its attention.
    torch.testing.assert_close(place.parted, torch.tensor([[0.75, 0.0]]))
    torch.testing.assert_close(place.moved, torch.tensor([[0.0, 0.0, 0.75, 0.0]]))
    single = Place("self", "source", "source", torch.ones(1, 4, 1, 1), base=torch.ones(1, 2, 1, 1))
    assert single.parted.isnan().all()


@pytest.mark.parametrize("variant", ["sas_k5_gqa", "beyond_paper", "head_only"])
def test_maps_are_the_weights_of_the_simulation(variant, tokenizer):
    model = gpt(variant, **SIZES)
    (place,) = sas_hf.look(model, TEXT, processor=tokenizer).places
    for layer, maps in zip(model.model.layers, place.maps, strict=True):
        expected = {
            (side, f"{what}: {part}"): getattr(module, part).weight
            for side in ("query", "key", "value")
            for what, module in getattr(layer.self_attn, f"{side[0]}_simulation").named_children()
            for part in ("expansion", "residual")
        }
        assert maps.keys() == expected.keys() and maps
        for key, weight in expected.items():
            weight = weight[..., None] if weight.ndim == 2 else weight
            torch.testing.assert_close(maps[key], weight.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
def test_adapters_count(tmp_path, tokenizer, folder):
    """Of a folder and on a live model, in training, with dropout."""
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    config = LoraConfig(target_modules=["q_proj", "expansion"], lora_dropout=0.5, init_lora_weights=False, r=2)
    adapted = get_peft_model(sas_hf.SASGPTForCausalLM.from_pretrained(folder), config)
    adapted.save_pretrained(tmp_path)
    live = inject_adapter_in_model(config, sas_hf.SASGPTForCausalLM.from_pretrained(folder))
    live.load_state_dict(adapted.base_model.model.state_dict())
    places = [sas_hf.look(model, TEXT).places[0] for model in (tmp_path, live.train())]
    plain = sas_hf.look(folder, TEXT).places[0]
    torch.testing.assert_close(places[0].weights, places[1].weights, atol=1e-3, rtol=0)  # one is merged
    for key in plain.maps[0]:
        torch.testing.assert_close(places[0].maps[0][key], places[1].maps[0][key], atol=1e-4, rtol=1e-4)
        same = torch.equal(places[0].maps[0][key], plain.maps[0][key])
        assert same == ("residual" in key[1]), key


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings=True:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_adapters_of_one_side_of_tied_weights_are_refused(tmp_path, folder):
    """In merge's words: what they are together would be looked at wrongly."""
    from peft import LoraConfig, get_peft_model

    model = sas_hf.SASGPTForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give other numbers once they are merged.*one side of weights that are tied"):
        sas_hf.look(tmp_path, TEXT)


def test_encoder_decoder(tokenizer):
    model = seq2seq("places", **SIZES, **TOKENS)
    found = sas_hf.look(model, "The import statement", target="names a module", processor=tokenizer)
    encoder_place, decoder_place, cross = found.places
    assert [place.name for place in found.places] == ["encoder", "decoder", "cross"]
    assert encoder_place.base is None and (decoder_place.num_heads, decoder_place.num_copies) == (4, 3)
    assert (cross.num_heads, cross.num_copies) == (2, 6)
    inputs = tokenizer("The import statement", return_tensors="pt")
    labels = tokenizer("names a module", return_tensors="pt")["input_ids"]
    read = model.prepare_decoder_input_ids_from_labels(labels=labels)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**inputs, decoder_input_ids=read, output_attentions=True)
    assert torch.equal(cross.weights, torch.cat(outputs.cross_attentions))
    assert torch.equal(decoder_place.weights, torch.cat(outputs.decoder_attentions))
    assert cross.base.shape == (2, 2, *cross.weights.shape[2:]) and cross.moved.max() > 0.01
    assert found.sides["target"].labels == ["<eot>", *(tokenizer.decode([number]) for number in labels[0, :-1])]
    assert found.sides["target"].special[:2] == [True, False]


def test_a_decoder_without_target_reads_what_it_writes(tokenizer):
    model = BartForConditionalGeneration(BartConfig(**BART, **SIZES, **TOKENS)).eval()
    found = sas_hf.look(model, "The import statement", processor=tokenizer)
    inputs = tokenizer("The import statement", return_tensors="pt")
    written = model.generate(input_ids=inputs["input_ids"], max_length=64, do_sample=False)[0, :-1]
    assert found.places[2].weights.shape[-2:] == (len(written), inputs["input_ids"].shape[1])
    assert found.sides["target"].labels[1:] == [
        tokenizer.convert_ids_to_tokens(int(number))
        if number in tokenizer.all_special_ids or "\ufffd" in tokenizer.decode([number])
        else tokenizer.decode([number])
        for number in written[1:]
    ]


def test_pairs_tell_their_parts(tokenizer):
    found = sas_hf.look(encoder("sas", **SIZES), ["The import", "statement"], processor=tokenizer)
    side = found.sides["source"]
    assert "".join(side.labels) == "The importstatement"
    assert side.parts == sorted(side.parts) and set(side.parts) == {0, 1}


@pytest.mark.parametrize("plain", [True, False])
def test_images_lie_in_a_grid(plain, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (20, 30), (200, 30, 30)).save(picture)
    processor = sas_hf.SASViTImageProcessor(size={"height": 12, "width": 12})
    model = ViTModel(ViTConfig(**IMAGE_SIZES, image_size=12, patch_size=4)).eval() if plain else vit("sas")
    found = sas_hf.look(model, picture, processor=processor)
    side, (place,) = found.sides["source"], found.places
    assert side.labels[:2] == ["[CLS]", "row 1, column 1"] and side.labels[-1] == "row 3, column 3"
    assert side.special == [True] + [False] * 9 and side.grid == (3, 3)
    assert place.weights.shape == (2, 4 if plain else 12, 10, 10)
    pixels = processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    assert torch.equal(collect(model, {"pixel_values": pixels})[0].weights, place.weights)


def test_the_model_is_left_as_it_was(tokenizer):
    model = gpt("sas", **SIZES).train()
    model.set_attn_implementation("sdpa")
    sas_hf.look(model, TEXT, processor=tokenizer)
    assert model.training and model.config._attn_implementation == "sdpa"
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__.startswith("sas_hf")]  # Transformers leaves its own


def test_the_command_writes_the_page(folder, tmp_path):
    page = tmp_path / "made" / "page.html"
    shown = CliRunner().invoke(app, ["look", str(folder), "</script> & @@NUMBERS@@", "-o", str(page)])
    assert shown.exit_code == 0, shown.output
    text = page.read_text()
    content = json.loads(re.search(r'id="content">(.*?)</script>', text, re.S)[1])
    assert "".join(content["sides"]["source"]["labels"]) == "</script> & @@NUMBERS@@"
    assert content["architecture"] == "SASGPTForCausalLM" and "http" not in text


def test_a_folder_is_read_as_a_live_model_is(folder, tokenizer):
    model = sas_hf.SASGPTForCausalLM.from_pretrained(folder)
    one, other = sas_hf.look(folder, TEXT), sas_hf.look(model, TEXT)
    assert torch.equal(one.places[0].weights, other.places[0].weights)
    assert other.model == str(folder)


def test_in_a_notebook(folder):
    found = sas_hf.look(folder, "The import")
    shown = found._repr_html_()
    assert html.unescape(re.search(r'srcdoc="(.*?)"', shown, re.S)[1]) == found.html()


def rewritten(folder, copy, **settings):
    """The folder's checkpoint with other settings."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    known = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(known | settings))
    return copy


def test_code_of_a_checkpoint_is_not_run(folder, tmp_path):
    strange = rewritten(folder, tmp_path / "own", model_type="strange", auto_map={"AutoModel": "model.Strange"})
    (strange / "model.py").write_text("raise AssertionError('was run')")
    with pytest.raises(ValueError, match="`model_type` 'strange', which Transformers .* the code .* is not run"):
        sas_hf.look(strange, TEXT)
    unknown = rewritten(folder, tmp_path / "unknown", architectures=["NoSuchModel"])
    with pytest.raises(ValueError, match="has a NoSuchModel, which Transformers .* does not know"):
        sas_hf.look(unknown, TEXT)


@pytest.mark.parametrize(
    ("inputs", "options", "told"),
    [
        ("", {}, "`inputs` has ''; SASGPTForCausalLM reads texts that are not empty"),
        (__file__, {}, "test_look.py', which is a file; SASGPTForCausalLM reads texts: give the text itself"),
        (["a", "b", "c"], {}, "`inputs` are 3; give one text or image, or two texts"),
        (["a", "b"], {}, "`inputs` are two texts, but SASGPTForCausalLM reads no pairs"),
        ("a", {"target": "b"}, "`target` is 'b', but SASGPTForCausalLM has no decoder beside an encoder"),
        ("word " * 200, {}, r"`inputs` is \d+ tokens long, but the model reads at most 128"),
    ],
)
def test_what_cannot_be_looked_at(folder, inputs, options, told):
    with pytest.raises(ValueError, match=told):
        sas_hf.look(folder, inputs, **options)


def test_a_page_holds_so_many_weights(tokenizer, monkeypatch):
    model = gpt("sas", vocab_size=400, max_position_embeddings=4096)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("a forward pass"))
    # 2 layers of 4 base heads and 12 simulated ones: 32 maps.
    with pytest.raises(ValueError, match=r"is 2000 tokens long, too many for a page.* give at most 1448 tokens"):
        sas_hf.look(model, "!" * 2000, processor=tokenizer)


def test_without_tokenizer_or_image(folder, tmp_path, tokenizer):
    bare = rewritten(folder, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="There is no tokenizer with '.*bare'; pass one as `processor`"):
        sas_hf.look(bare, TEXT)
    with pytest.raises(ValueError, match="There is no image processor with 'SASViT"):
        sas_hf.look(vit("sas"), "a.png")
    with pytest.raises(FileNotFoundError, match="`inputs` is 'no.png', where no image is"):
        sas_hf.look(vit("sas"), "no.png", processor=sas_hf.SASViTImageProcessor())
    with pytest.raises(FileNotFoundError, match="no-folder does not exist"):
        sas_hf.look(tmp_path / "no-folder", TEXT)
