"""Exact means: what was written, loaded again, computes what the whole source computes, in the saved dtype."""

import copy
import json

import pytest
import torch
from helpers import generator, sas_hf, scramble
from safetensors.torch import load_file, save_file
from test_vit_families import ARCHITECTURES
from test_vit_families import source as vit_source
from tiny_llama import AWKWARD, tiny_llama, tiny_llama_config
from tiny_sources import FAMILY_NAMES, SHAPES, source_classes, tiny_source, tiny_source_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from sas_hf.conversion import ConversionError, ConversionOptions, convert_checkpoint, find_source, restore_checkpoint
from sas_hf.conversion.convert import FAMILIES
from sas_hf.conversion.sources import read_stored_weights, source_class


HEADS = [(shape, name) for shape in FAMILY_NAMES for name in FAMILIES[SHAPES[shape]["model_type"]].architectures]
LLAMA_HEADS = list(FAMILIES["llama"].architectures)


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def set_fields(folder, **fields):
    """Fields of the folder's config.json; `...` takes one away."""
    settings = json.loads((folder / "config.json").read_text()) | fields
    kept = {name: value for name, value in settings.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def change_weights(folder, change):
    """Let `change` edit the weights in a folder, as a dictionary."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(
        {name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


@torch.no_grad()
def outputs(model, seed=0):
    ids = torch.randint(300, (2, 40), generator=generator(seed))
    return model.eval()(ids).logits


def rounded(model, dtype):
    """The model with its weights rounded, computing in float32."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_conversion_that_rounds_is_exact_to_the_rounding_and_says_so(llama_folder, tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    report = convert_checkpoint(llama_folder, tmp_path / "sas", dtype=name, windows=2)
    source = LlamaForCausalLM.from_pretrained(llama_folder)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "sas", dtype=torch.float32)
    assert (outputs(saved) - outputs(rounded(source, dtype))).abs().max() <= 1e-5 * outputs(source).abs().max()
    assert report["exact_to"] == f"the source's weights rounded to {name}" and report["fidelity"]["exact"]
    assert report["dtype_saved"] == name
    # How far it is from the source as it is, is told too; on other tokens it is about as much.
    told, found = report["fidelity_unrounded"], (outputs(saved) - outputs(source)).abs().max().item()
    assert not told["exact"] and 0.2 * found < told["max_abs_difference"] < 5 * found
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "sas")
    off = (outputs(own).float() - outputs(source)).abs().max().item()
    assert 0.2 * off < report["in_saved_dtype"]["max_abs_difference"] < 5 * off
    card = (tmp_path / "sas" / "README.md").read_text()
    assert f"rounded to {name}" in card and f"{told['max_abs_difference']:.3g}" in card
    assert "computed what its source computes." not in card


def test_wider_weights_are_exact_to_the_source(llama_folder, tmp_path):
    LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16).save_pretrained(llama_folder)
    for dtype in (None, "float32"):
        report = convert_checkpoint(llama_folder, tmp_path / str(dtype), dtype=dtype, windows=1)
        assert report["exact_to"] == "the source" and report["fidelity_unrounded"] is None
        assert f"saved in {dtype or 'bfloat16'}" in (tmp_path / str(dtype) / "README.md").read_text()
    # bfloat16 has numbers that float16 has not
    report = convert_checkpoint(llama_folder, tmp_path / "half", dtype="float16", windows=1)
    assert report["exact_to"] == "the source's weights rounded to float16"


def too_large(weights):
    weights["model.embed_tokens.weight"][7, 3] = 1e5


def too_small(weights):
    weights["model.layers.1.mlp.up_proj.weight"].mul_(1e-9)


def too_large_sums(weights):
    """Numbers that float16 holds, whose products it does not; a norm follows, so that float32 is content."""
    weights["model.layers.0.mlp.down_proj.weight"].mul_(3e4)
    weights["model.layers.0.mlp.up_proj.weight"].mul_(3e4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            too_large,
            r"`dtype` float16 holds numbers up to 65504, but model.embed_tokens.weight has 1e\+05; choose bfl",
        ),
        (too_small, r"`dtype` float16 would make all of model.layers.1.mlp.up_proj.weight zero .*choose bfloat16"),
        (too_large_sums, "Computing in float16, the checkpoint gives outputs that are not finite.*bfloat16"),
    ],
)
def test_a_dtype_that_destroys_is_refused(llama_folder, tmp_path, change, message):
    change_weights(llama_folder, change)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(llama_folder, tmp_path / "sas", dtype="float16", windows=1)
    assert files_in(tmp_path) == ["source"]
    assert convert_checkpoint(llama_folder, tmp_path / "sas", dtype="bfloat16", windows=1)["fidelity"]["exact"]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_a_dtype_that_no_checkpoint_is_saved_in_is_refused(llama_folder, tmp_path, dtype):
    with pytest.raises(ValueError, match=f"`dtype` is '{dtype}'"):
        convert_checkpoint(llama_folder, tmp_path / "sas", dtype=dtype)
    assert files_in(tmp_path) == ["source"]


def test_a_float64_source_of_images_is_converted(tmp_path):
    vit_source("vit", "ViTForImageClassification").double().save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    assert report["dtype_saved"] == "float64" and report["exact_to"] == "the source"


@pytest.mark.parametrize(
    ("family", "name"), [("vit", "ViTForMaskedImageModeling"), ("deit", "DeiTForImageClassification")]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_image_models_are_rounded_and_narrow_ones_converted(family, name, dtype, tmp_path):
    vit_source(family, name).save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas", dtype=dtype, windows=1)
    assert report["exact_to"].endswith(dtype) and not report["fidelity_unrounded"]["exact"]
    vit_source(family, name).to(getattr(torch, dtype)).save_pretrained(tmp_path / "narrow")
    report = convert_checkpoint(tmp_path / "narrow", tmp_path / "narrow-sas", windows=1)
    assert report["exact_to"] == "the source" and report["dtype_saved"] == dtype


@pytest.mark.parametrize("direction", ["convert", "restore"])
def test_what_is_on_the_disk_is_what_is_compared(llama_folder, tmp_path, direction):
    """Damage between writing and reading again, as a failing disk or a wrong `save_pretrained` would do it."""
    convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)

    def damage(message):
        if message.startswith("Comparing"):
            (unfinished,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out.") and path.is_dir())
            change_weights(unfinished, lambda weights: weights["model.norm.weight"].mul_(1.01))

    with pytest.raises(ConversionError, match="not exact|differ by up to"):
        if direction == "convert":
            convert_checkpoint(llama_folder, tmp_path / "out", windows=1, progress=damage)
        else:
            restore_checkpoint(tmp_path / "sas", tmp_path / "out", windows=1, progress=damage)
    assert files_in(tmp_path) == ["sas", "source"]


def norms_in_float32(weights):
    source = torch.Generator().manual_seed(0)  # what was read from a file is on the CPU
    for name, weight in weights.items():
        noise = torch.rand(weight.shape, generator=source, device="cpu")
        weights[name] = weight + noise if "norm" in name else weight.bfloat16()


def test_weights_of_several_dtypes_are_all_kept(llama_folder, tmp_path):
    """Norms in float32 beside matrices in bfloat16: in the dtype of its configuration, they would be rounded."""
    change_weights(llama_folder, norms_in_float32)
    set_fields(llama_folder, dtype="bfloat16")
    report = convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    assert set(report["dtypes_source"]) == {"bfloat16", "float32"}
    source = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    for folder, cls in ((tmp_path / "sas", AutoModelForCausalLM), (tmp_path / "back", LlamaForCausalLM)):
        if folder.name == "back":
            restore_checkpoint(tmp_path / "sas", folder, windows=1)
        model = cls.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert (outputs(model) - outputs(source)).abs().max() <= 1e-5 * outputs(source).abs().max()
    rounds = convert_checkpoint(llama_folder, tmp_path / "narrow", dtype="bfloat16", windows=1)
    assert rounds["exact_to"].endswith("rounded to bfloat16")


def without_architectures(model, folder, value=...):
    model.save_pretrained(folder)
    set_fields(folder, architectures=value)
    return folder


def found_class(folder):
    config, family = find_source(folder)
    return source_class(folder, config, family, read_stored_weights(folder, None)).__name__


@pytest.mark.parametrize(("shape", "name"), HEADS)
def test_the_head_is_found_where_no_class_is_named(shape, name, tmp_path):
    model = source_classes(SHAPES[shape]["model_type"])[name](tiny_source_config(shape))
    folder = without_architectures(model, tmp_path)
    # What a language model would save without prefix is the same, but for Phi, whose head has a bias.
    if model is model.base_model and model.config.tie_word_embeddings and shape != "phi":
        with pytest.raises(
            ConversionError, match=f"`architectures` .* is not given, and the weights there fit {name}"
        ):
            found_class(folder)
    else:
        assert found_class(folder) == name


@pytest.mark.parametrize("name", LLAMA_HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_llama_is_found(name, tied, tmp_path):
    model = source_classes("llama")[name](tiny_llama_config(**AWKWARD["gqa"], tie_word_embeddings=tied))
    folder = without_architectures(model, tmp_path)
    if name == "LlamaModel" and tied:
        with pytest.raises(ConversionError, match="fit LlamaModel and LlamaForCausalLM"):
            found_class(folder)
    else:
        assert found_class(folder) == name


@pytest.mark.parametrize(("family", "name"), ARCHITECTURES)
def test_the_head_of_an_image_model_is_found(family, name, tmp_path):
    assert found_class(without_architectures(vit_source(family, name), tmp_path)) == name


@pytest.mark.parametrize("value", [..., None, []], ids=["absent", "null", "empty"])
@pytest.mark.parametrize("source", ["untied", "tied", "classifier"])
def test_no_head_is_lost_where_no_class_is_named(tmp_path, source, value):
    config = tiny_llama_config(**AWKWARD["gqa"], tie_word_embeddings=source == "tied", pad_token_id=0, num_labels=3)
    model_class = LlamaForSequenceClassification if source == "classifier" else LlamaForCausalLM
    auto_class = AutoModelForSequenceClassification if source == "classifier" else AutoModelForCausalLM
    model = scramble(model_class(config))
    without_architectures(model, tmp_path / "source", value)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    assert report["source_architecture"] == model_class.__name__
    converted = auto_class.from_pretrained(tmp_path / "sas")
    assert (outputs(converted) - outputs(model)).abs().max() <= 1e-5 * outputs(model).abs().max()


def test_of_several_classes_the_one_with_these_heads_is_taken(tmp_path):
    model = LlamaForSequenceClassification(tiny_llama_config(**AWKWARD["gqa"]))
    without_architectures(model, tmp_path, ["LlamaForCausalLM", "LlamaForSequenceClassification"])
    assert found_class(tmp_path) == "LlamaForSequenceClassification"
    set_fields(tmp_path, architectures=["LlamaModel", "LlamaForCausalLM"])
    with pytest.raises(ConversionError, match="names LlamaModel, LlamaForCausalLM, and the weights there fit none of"):
        found_class(tmp_path)


def add_bias(folder):
    change_weights(folder, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(72)}))


def add_layer(folder):
    def copy_layer(weights):
        for name in [name for name in weights if ".layers.2." in name]:
            weights[name.replace(".2.", ".3.")] = weights[name]

    change_weights(folder, copy_layer)


def add_classifier(folder):
    change_weights(folder, lambda w: w.update({"score.weight": torch.ones(2, 60)}))


def add_next_token_head(folder):
    change_weights(folder, lambda w: w.update({"model.mtp.0.proj.weight": torch.ones(60, 60)}))


def own_head(folder):
    change_weights(folder, lambda w: w.update({"lm_head.weight": 2 * w["model.embed_tokens.weight"]}))


def no_head(folder):
    set_fields(folder, tie_word_embeddings=False)


def another_head(folder):
    set_fields(folder, architectures=["LlamaForSequenceClassification"], tie_word_embeddings=False)
    change_weights(folder, lambda w: w.update({"lm_head.weight": 2 * w["model.embed_tokens.weight"]}))


def body_of_a_language_model(folder):
    set_fields(folder, architectures=["LlamaModel"])
    change_weights(folder, lambda w: w.update({"lm_head.weight": 2 * w["model.embed_tokens.weight"]}))


def twice(folder):
    change_weights(folder, lambda w: w.update({"norm.weight": 2 * w["model.norm.weight"]}))


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')


def adapter_weights(folder):
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    change_weights(folder, lambda w: w.update({name: torch.ones(4, 60)}))


def two_sets(folder):
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder / "more", max_shard_size="50KB")
    for file in (folder / "more").iterdir():
        file.rename(folder / file.name)
    (folder / "more").rmdir()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder / "more")
    (folder / "more" / "model.safetensors").rename(folder / "model.safetensors")


def whole_numbers(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda w: w.update({name: (w[name] * 100).to(torch.int8)}))


def quantised(folder):
    set_fields(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


LOST = {
    add_bias: r"no place for, with this config.json: model.layers.0.self_attn.q_proj.bias.*from_pretrained\(SOURCE\)",
    add_layer: r"no place for.*model.layers.3.input_layernorm.weight.* and 4 more.*num_hidden_layers",
    add_classifier: "LlamaForCausalLM has no place for.*score.weight",
    add_next_token_head: "no place for.*model.mtp.0.proj.weight",
    own_head: "`tie_word_embeddings` is true, but the head has weights of its own.*set it to false",
    no_head: "lacks weights of LlamaForCausalLM: lm_head.weight",
    another_head: "lacks weights of LlamaForSequenceClassification: score.weight",
    body_of_a_language_model: "LlamaModel has no place for.*lm_head.weight.*`architectures`",
    twice: "holds norm.weight and model.norm.weight, which are one weight",
    adapter: "peft adapter.*merge",
    adapter_weights: "no place for.*lora_A",
    two_sets: "has both model.safetensors and model.safetensors.index.json",
    whole_numbers: "mlp.up_proj.weight is stored as I8, as a quantised weight is",
    quantised: "quantised",
}


@pytest.mark.parametrize(("change", "message"), LOST.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_nothing_of_the_source_is_left_out_without_a_word(llama_folder, tmp_path, change, message):
    change(llama_folder)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    assert files_in(tmp_path) == ["source"]


@pytest.mark.parametrize("shape", FAMILY_NAMES)
def test_an_unknown_weight_of_any_family_is_refused(shape, tmp_path):
    tiny_source(shape).save_pretrained(tmp_path / "source")
    body = "gpt_neox" if shape == "gpt_neox" else "transformer" if shape == "gpt2" else "model"
    name = f"{body}.layers.0.attention.extra.bias"
    change_weights(tmp_path / "source", lambda weights: weights.update({name: torch.ones(3)}))
    with pytest.raises(ConversionError, match=f"no place for.*{name}"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_an_unknown_weight_of_an_image_model_is_refused(family, tmp_path):
    vit_source(family, f"{'ViT' if family == 'vit' else 'DeiT'}ForImageClassification").save_pretrained(
        tmp_path / "source"
    )
    change_weights(
        tmp_path / "source", lambda weights: weights.update({f"{family}.pooler.dense.bias": torch.ones(60)})
    )
    with pytest.raises(ConversionError, match=f"no place for.*{family}.pooler.dense.bias"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)


def test_an_equal_head_is_no_head_of_its_own(llama_folder, tmp_path):
    change_weights(llama_folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))
    assert convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)["fidelity"]["exact"]


@pytest.mark.parametrize(
    ("shape", "buffers"),
    [
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 128, 128), "transformer.h.0.attn.masked_bias": ()}),
        (
            "gpt_neox",
            {
                "gpt_neox.layers.0.attention.bias": (1, 1, 8, 8),
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,),
            },
        ),
        ("mistral", {"model.layers.0.self_attn.rotary_emb.inv_freq": (7,)}),
    ],
)
def test_what_is_computed_anew_is_reported(shape, buffers, tmp_path):
    """Buffers that older versions saved; whole numbers among them say nothing about the weights' dtype."""
    tiny_source(shape).save_pretrained(tmp_path / "source")
    made = {name: torch.ones(size, dtype=torch.uint8) for name, size in buffers.items()}
    change_weights(tmp_path / "source", lambda weights: weights.update(made))
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    assert report["weights_recomputed"] == sorted(buffers) and report["dtype_saved"] == "float32"
    assert sorted(buffers)[0] in (tmp_path / "sas" / "README.md").read_text()


def test_fields_and_files_that_are_not_carried_are_named(llama_folder, tmp_path):
    set_fields(llama_folder, attn_logit_softcapping=50.0, rope_theta=1e4, torch_dtype="float32", _name_or_path="x")
    (llama_folder / "LICENSE.txt").write_text("Do what is right.")
    (llama_folder / "modeling_own.py").write_text("")
    (llama_folder / "onnx").mkdir()
    (llama_folder / "onnx" / "model.onnx").write_text("")
    (llama_folder / "processor_config.json").write_text("{}")
    run = sas_hf("convert", llama_folder, tmp_path / "sas")
    assert run.returncode == 0, run.stderr
    report, card = (json.loads((tmp_path / "sas" / "fidelity.json").read_text()), (tmp_path / "sas" / "README.md"))
    assert report["fields_unknown"] == {"attn_logit_softcapping": 50.0}
    assert report["files_left_out"] == ["*.py", "onnx/", "processor_config.json"]
    assert (tmp_path / "sas" / "LICENSE.txt").read_text() == "Do what is right."
    for name in ("attn_logit_softcapping", "onnx/", "processor_config.json"):
        assert name in card.read_text() and name in run.stdout.replace("\n", "")
    restored = restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    assert restored["files_left_out"] == [] and (tmp_path / "back" / "LICENSE.txt").is_file()


def test_a_weight_that_a_conversion_does_not_know_is_not_restored_away(llama_folder, tmp_path):
    convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    change_weights(tmp_path / "sas", lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(72)}))
    with pytest.raises(ConversionError, match="SASGPTForCausalLM has no place for.*q_proj.bias"):
        restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)
    assert files_in(tmp_path) == ["sas", "source"]


@pytest.mark.parametrize("value", [None, [], ["SASGPTForCausalLM", "SASGPTModel"], ["attention"]])
def test_a_conversion_without_its_class_is_not_guessed_at(llama_folder, tmp_path, value):
    convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    set_fields(tmp_path / "sas", architectures=value)
    with pytest.raises(ConversionError, match="`architectures` in the config.json .*write there which SAS class"):
        restore_checkpoint(tmp_path / "sas", tmp_path / "back", windows=1)


NO_HEADS, NO_SIMULATION = {"num_simulated_heads": 0}, {"num_simulated_heads": 0, "simulated_head_dim": 0}
IGNORED = [  # options, arguments, message
    ({"perturbation": 1e9}, {}, r"`perturbation` is 1000000000.0; it must be from 0 to 4.24"),
    ({"perturbation": float("nan")}, {}, "`perturbation` is nan"),
    ({"perturbation": float("inf")}, {}, "`perturbation` is inf"),
    ({"perturbation": 0.5} | NO_HEADS, {}, r"`perturbation` \(0.5\) is of simulated heads, but there are none"),
    ({"perturbation": 0.5, "num_simulated_heads": 6}, {}, r"`num_simulated_heads` \(6\) gives each one copy.*12"),
    ({"simulation_kernel_size": 3} | NO_HEADS, {}, r"`simulation_kernel_size` \(3\) is of simulated heads"),
    ({"seed": 1} | NO_SIMULATION, {}, r"`seed` \(1\) is of the simulation's start"),
    ({"kv_lora_rank": 4}, {}, "belongs to `lossy='mla'`"),
    ({}, {"images": "photos"}, r"`images` \(photos\) are given, but the source is a model of text"),
    ({}, {"windows": 0}, "`windows` is 0"),
    ({}, {"window_length": 1}, "`window_length` is 1"),
    ({}, {"revision": "main"}, "`revision` .'main'. is of a repository on the Hub, but .* is a folder here"),
    ({}, {"calibration": "text"}, "`calibration` is what a lossy conversion is fitted on"),
]


@pytest.mark.parametrize(("options", "arguments", "message"), IGNORED)
def test_an_option_that_would_be_ignored_is_refused_before_weights_are_read(
    llama_folder, tmp_path, options, arguments, message
):
    (llama_folder / "model.safetensors").unlink()  # an error about it would mean that the options came too late
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(llama_folder, tmp_path / "sas", ConversionOptions(**options), **arguments)
    assert files_in(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": "photos"}, "`images` .* the source is a model of text"),
        ({"windows": 0}, "`windows` is 0"),
        ({"window_length": 0}, "`window_length` is 0"),
        ({"revision": "main"}, "`revision` .'main'. is of a repository on the Hub"),
    ],
)
def test_restoring_ignores_no_option_either(llama_folder, tmp_path, arguments, message):
    convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    (tmp_path / "sas" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        restore_checkpoint(tmp_path / "sas", tmp_path / "back", **arguments)


def test_text_is_not_ignored_by_image_models(tmp_path):
    vit_source("vit", "ViTForImageClassification").save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="`text` is given, but the source is a model of images; give `images`"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas", text="words")
    convert_checkpoint(tmp_path / "source", tmp_path / "sas", windows=1)
    with pytest.raises(ValueError, match="`text` is given, but the source is a model of images"):
        restore_checkpoint(tmp_path / "sas", tmp_path / "back", text="words")


def test_text_is_not_ignored_without_tokenizer(tmp_path):
    tiny_llama("gqa").save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="`text` is given, but the source has no tokenizer"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas", text="words")


@pytest.mark.parametrize("direction", ["convert", "restore"])
def test_a_tokenizer_larger_than_the_model_is_refused_before_weights_are_read(llama_folder, tmp_path, direction):
    convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    folder = llama_folder if direction == "convert" else tmp_path / "sas"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<mine>", "<yours>"])
    tokenizer.save_pretrained(folder)
    stages, make = [], convert_checkpoint if direction == "convert" else restore_checkpoint
    message = f"2 tokens beyond the model's `vocab_size` .{size}.*'<mine>' with number {size}.*embeddings.{size + 2}."
    with pytest.raises(ValueError, match=message):
        make(folder, tmp_path / "out", progress=stages.append)
    assert stages == []
    assert files_in(tmp_path) == ["sas", "source"]


def test_special_tokens_may_be_beyond_the_model_until_a_text_has_them(llama_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<mine>"})
    tokenizer.save_pretrained(llama_folder)
    report = convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    assert report["fidelity"]["exact"] and AutoTokenizer.from_pretrained(tmp_path / "sas").pad_token_id == size
    with pytest.raises(ValueError, match=f"makes '<mine>' .number {size}. of the text, but .*`vocab_size` is {size}"):
        convert_checkpoint(llama_folder, tmp_path / "again", text="some words and <mine> " * 30)
    assert files_in(tmp_path) == ["sas", "source"]


def test_text_that_is_not_utf8_is_named(llama_folder, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Grüße aus Köln. ".encode("latin-1") * 50)
    run = sas_hf("convert", llama_folder, tmp_path / "sas", "--text", tmp_path / "latin.txt")
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert f"{tmp_path / 'latin.txt'} is not text in UTF-8" in run.stderr
