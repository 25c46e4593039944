"""The SAS ViT: equal to Transformers' ViT and DeiT, every kind to its reference, and clear about wrong images."""

import numpy as np
import pytest
import torch
from helpers import (
    VIT_BASE,
    VIT_VARIANTS,
    WITHOUT_CLASS_TOKEN,
    all_tensors,
    assert_identical,
    images,
    scramble,
    train_tokenizer,
    vit,
)
from PIL import Image
from plain_references import attention
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from sas_hf import (
    SASViTConfig,
    SASViTForImageClassification,
    SASViTForMaskedImageModeling,
    SASViTModel,
    named_config,
)
from sas_hf.configurations import NAMED_CONFIGS
from sas_hf.hub.info import describe
from sas_hf.modeling.image_processing_sas_vit import SASViTImageProcessor


PAIRS = {
    ViTModel: SASViTModel,
    ViTForImageClassification: SASViTForImageClassification,
    ViTForMaskedImageModeling: SASViTForMaskedImageModeling,
}


def pair(theirs_class=ViTForImageClassification, **fields):
    fields = VIT_BASE | fields
    theirs = scramble(theirs_class(ViTConfig(**fields)))
    ours = PAIRS[theirs_class](SASViTConfig(**fields)).eval()
    report = ours.load_state_dict(theirs.state_dict())  # the same keys
    assert not report.missing_keys and not report.unexpected_keys
    return ours, theirs


def assert_same(ours, theirs, **inputs):
    with torch.no_grad():
        found, expected = ours(**inputs), theirs(**inputs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_class", PAIRS, ids=lambda c: c.__name__)
def test_equals_vit(model_class, implementation):
    ours, theirs = pair(model_class, attn_implementation=implementation)
    inputs = {"pixel_values": images(ours.config, 3)}
    if model_class is ViTForMaskedImageModeling:
        inputs["bool_masked_pos"] = torch.rand(3, 9) < 0.5
    if model_class is ViTForImageClassification:
        inputs["labels"] = torch.tensor([0, 6, 3])
    assert_same(ours, theirs, **inputs)
    inputs.pop("bool_masked_pos", None)
    assert_same(ours, theirs, **inputs | {"pixel_values": torch.randn(3, 3, 20, 20)}, interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_bias": False, "num_channels": 1},
        {"num_channels": 5, "patch_size": (4, 6), "image_size": (12, 12)},
        {"hidden_act": "relu", "layer_norm_eps": 1e-2, "pooler_act": "relu", "pooler_output_size": 5},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_equals_vit_with_its_options(fields):
    for model_class in (ViTModel, ViTForImageClassification):
        ours, theirs = pair(model_class, **fields)
        assert_same(ours, theirs, pixel_values=images(ours.config))


def test_a_mask_over_tokens_equals_vits():
    ours, theirs = pair()
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1, 1], [1] * 10])
    assert_same(ours, theirs, pixel_values=images(ours.config), attention_mask=mask)


def test_gradients_equal_vits():
    ours, theirs = pair()
    inputs = {"pixel_values": images(ours.config), "labels": torch.tensor([0, 6])}
    for model in (ours, theirs):
        model(**inputs).loss.backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("teacher", [False, True], ids=["", "distilled classifier"])
def test_equals_deit(teacher):
    theirs_class = DeiTForImageClassificationWithTeacher if teacher else DeiTForImageClassification
    theirs = scramble(theirs_class(DeiTConfig(**VIT_BASE)))
    pooling = {"classifier_pooling": "distilled"} if teacher else {}
    ours = SASViTForImageClassification(SASViTConfig(**VIT_BASE, use_distillation_token=True, **pooling)).eval()
    ours.load_state_dict(
        {
            name.replace("deit.", "vit.").replace("cls_classifier", "classifier"): weight
            for name, weight in theirs.state_dict().items()
        }
    )
    pixels = images(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels).logits, atol=1e-6, rtol=0)
        other = torch.randn(2, 3, 20, 20)
        found, expected = (model(other, interpolate_pos_encoding=True).logits for model in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("variant", VIT_VARIANTS)
def test_every_kind_equals_its_reference(variant, bias):
    """One attention layer in float64, with the tokens of an image, outputs and gradients."""
    model = vit(variant, qkv_bias=bias, num_hidden_layers=1).double()
    layer, seen = model.vit.layers[0].attention, {}
    for module in layer.modules():
        if type(module).__name__ == "SASRMSNorm":  # computes in float32 whatever the type: compare without it
            module.forward = lambda x, n=module: (
                x / (x.pow(2).mean(-1, keepdim=True) + n.variance_epsilon).sqrt() * n.weight
            )
    layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    layer.register_forward_hook(lambda module, args, output: seen.update(output=output[0]))
    model(images(model.config, 1).double())
    direction, weights = torch.randn_like(seen["output"]), dict(layer.named_parameters())
    sources = [seen["x"], *weights.values()]
    expected = attention(weights, seen["x"][0], layer.config)[None]
    actual_gradients = torch.autograd.grad((seen["output"] * direction).sum(), sources, retain_graph=True)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), sources)
    torch.testing.assert_close(seen["output"], expected, rtol=0, atol=1e-10 * max(1, expected.abs().max().item()))
    scale = max(1.0, *(gradient.abs().max().item() for gradient in expected_gradients))
    for name, a, b in zip(["x", *weights], actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}")


# Table 1, "# Param." (exact in Tables 5 and 6): attention of one layer.
LAYER_PARAMETERS = {
    "mnist": {"standard": 66_048, "optimised": 49_536, "efficient": 33_024, "super": 37_184},
    "cifar100": {"standard": 263_168, "optimised": 197_376, "efficient": 131_584, "super": 197_890},
    "imagenet": {"standard": 2_362_368, "optimised": 1_771_776, "efficient": 1_181_184, "super": 1_220_190},
}


@pytest.mark.parametrize("task", LAYER_PARAMETERS)
def test_the_papers_counts_come_out(task):
    for kind, expected in LAYER_PARAMETERS[task].items():
        config = named_config(f"{task}-{kind}")
        costs = describe(config)
        assert costs.attention_parameters == expected * config.num_hidden_layers, kind
    assert costs.context == {"mnist": 64, "cifar100": 257, "imagenet": 197}[task]


def test_the_imagenet_models_total_is_a_plain_vits():
    """57.8M: a linear classifier. Table 7's 60.54M have a hidden layer in it (tests/test_configurations.py)."""
    fields = {key: value for key, value in NAMED_CONFIGS["imagenet-standard"].items() if key != "attention_type"}
    with torch.device("meta"):
        plain = ViTForImageClassification(ViTConfig(**fields))
    assert describe(named_config("imagenet-standard")).parameters == plain.num_parameters() == 57_773_800


@pytest.mark.parametrize("pooling", ["class_token", "distilled"])
def test_a_classifier_with_a_hidden_layer(pooling):
    fields = {"use_distillation_token": pooling == "distilled", "classifier_pooling": pooling}
    model = vit("hidden_classifier", **fields, hidden_act="relu", initializer_range=0.3)
    pixels = images(model.config)
    with torch.no_grad():
        tokens = model.vit(pixels).last_hidden_state

        def expected(head, token):
            hidden = torch.relu(tokens[:, token] @ head.dense.weight.T + head.dense.bias)
            assert hidden.shape == (2, 9) and (hidden > 0).any() and (hidden == 0).any()
            return hidden @ head.out_proj.weight.T + head.out_proj.bias

        logits = expected(model.classifier, 0)
        if pooling == "distilled":
            logits = (logits + expected(model.distillation_classifier, 1)) / 2
        torch.testing.assert_close(model(pixels).logits, logits, atol=1e-5, rtol=1e-5)


def test_a_hidden_layer_of_the_classifier_must_be_one():
    for width in (0, -3):
        with pytest.raises(ValueError, match=f"`classifier_hidden_size` is {width}; it must be positive, or None"):
            SASViTConfig(classifier_hidden_size=width)
    with pytest.raises(Exception, match="classifier_hidden_size"):
        SASViTConfig(classifier_hidden_size="wide")


@pytest.mark.parametrize("kind", ["standard", "optimised", "efficient", "super", "sas"])
def test_the_mnist_models_run(kind):
    model = SASViTForImageClassification(named_config(f"mnist-{kind}"))
    assert model(torch.randn(2, 1, 32, 32)).logits.shape == (2, 10)


def test_positions_of_oblong_images_are_interpolated_row_by_row():
    """A wider image of the same height: what is constant along a row stays constant along it."""
    model = vit("oblong", model_class=SASViTModel)
    rows = torch.randn(2, 1, 32)
    model.embeddings.position_embeddings.data[:, 1:] = rows.expand(2, 3, 32).flatten(0, 1)
    positions = model.embeddings.positions((2, 5))
    assert torch.equal(positions[:, :1], model.embeddings.position_embeddings[:, :1])
    torch.testing.assert_close(positions[:, 1:], rows.expand(2, 5, 32).flatten(0, 1)[None])
    output = model(torch.randn(2, 3, 8, 30), interpolate_pos_encoding=True)
    assert output.last_hidden_state.shape == (2, 11, 32)


def test_mean_pooling_reads_the_visible_patches_only():
    model = vit("vit", classifier_pooling="mean")
    pixels, mask = images(model.config), torch.ones(2, 10, dtype=torch.long)
    mask[0, 6:] = 0
    with torch.no_grad():
        tokens = model.vit(pixels, attention_mask=mask).last_hidden_state
        expected = model.classifier(torch.stack((tokens[0, 1:6].mean(0), tokens[1, 1:].mean(0))))
        torch.testing.assert_close(model(pixels, attention_mask=mask).logits, expected)
        changed = pixels.clone()
        changed[0, :, 8:] += 1.0  # the last row of patches, hidden
        torch.testing.assert_close(model(changed, attention_mask=mask).logits, expected)


def test_hidden_tokens_do_not_mix():
    """Super attention's mixing leaves out what a mask hides, as attention does."""
    model = vit("super_mean")
    pixels, mask = images(model.config), torch.ones(2, 9, dtype=torch.long)
    mask[:, 6:] = 0
    changed = pixels.clone()
    changed[:, :, 8:] += 1.0
    with torch.no_grad():
        expected = model(pixels, attention_mask=mask).logits
        torch.testing.assert_close(model(changed, attention_mask=mask).logits, expected)
        assert not torch.allclose(model(changed).logits, model(pixels).logits, atol=1e-2)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # Transformers to PyTorch
@pytest.mark.parametrize("variant", ["vit", "sas_k5_gqa", "super"])
def test_flex_attention_forward(variant):
    model = vit(variant)
    pixels = images(model.config)
    with torch.no_grad():
        expected = model(pixels).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(pixels).logits, expected, atol=1e-3, rtol=0)


def test_masked_image_modelling_of_every_grid_learns():
    model = vit("sas", model_class=SASViTForMaskedImageModeling, image_size=(8, 12), initializer_range=0.02).train()
    pixels, hidden = images(model.config, 4) * 0 + 0.7, torch.rand(4, 6) < 0.5
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        output = model(pixels, bool_masked_pos=hidden)
        assert output.reconstruction.shape == pixels.shape
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.3 * losses[0]


AUTO_CLASSES = {
    AutoModel: SASViTModel,
    AutoModelForImageClassification: SASViTForImageClassification,
    AutoModelForMaskedImageModeling: SASViTForMaskedImageModeling,
}


@pytest.mark.parametrize(("auto_class", "model_class"), AUTO_CLASSES.items(), ids=lambda c: c.__name__)
def test_auto_classes(auto_class, model_class, tmp_path):
    built = vit(model_class=model_class)
    built.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SASViTConfig
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert_identical(all_tensors(loaded), all_tensors(built))


# Images and their processor.


def random_image(mode: str, size: int = 28) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_processor_gives_every_image_the_models_channels(channels):
    processor = SASViTImageProcessor(num_channels=channels, size={"height": 32, "width": 32})
    grey = random_image("L")
    array = np.array(grey)
    forms = (grey, grey.convert("RGB"), grey.convert("RGBA"), array[None], torch.tensor(array)[None])
    results = [processor(form, return_tensors="pt")["pixel_values"] for form in forms]
    assert results[0].shape == (1, channels, 32, 32)
    for result in results[1:]:
        assert torch.equal(result, results[0])  # a grey image comes back from RGB unchanged


def test_a_grey_image_fills_three_channels_without_conversion_too():
    processor = SASViTImageProcessor(num_channels=3, do_convert_rgb=False, size={"height": 32, "width": 32})
    expected = SASViTImageProcessor(num_channels=3, size={"height": 32, "width": 32})(random_image("L"))
    assert np.array_equal(processor(random_image("L"))["pixel_values"], expected["pixel_values"])


def test_colours_become_grey_as_pil_does_it():
    processor = SASViTImageProcessor(num_channels=1, do_resize=False, do_rescale=False, do_normalize=False)
    image = random_image("RGB")
    found = processor(image)["pixel_values"][0][0].astype(int)
    assert np.abs(found - np.array(image.convert("L")).astype(int)).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_pipeline_takes_grey_and_colour(channels, mode, tmp_path):
    names = dict(enumerate("abcdefg"))
    model = vit("sas", num_channels=channels, id2label=names)
    model.save_pretrained(tmp_path)
    SASViTImageProcessor(num_channels=channels, size={"height": 12, "width": 12}).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is SASViTImageProcessor
    classifier = pipeline("image-classification", model=str(tmp_path))
    assert type(classifier.model) is SASViTForImageClassification
    image = random_image(mode)
    found = {row["label"]: row["score"] for row in classifier(image, top_k=7)}
    pixels = classifier.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).logits.softmax(-1)[0]
    assert [found[name] for name in names.values()] == pytest.approx(expected.tolist(), abs=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 30}, r"`image_size` \(30\) is not a multiple of `patch_size` \(4\).*28 or 32"),
        ({"image_size": (12, 10)}, r"2 of 10 pixels would never be seen.*8 or 12"),
        ({"patch_size": 0}, "`patch_size` is 0"),
        ({"num_channels": 0}, "`num_channels` is 0.*1 for grey, 3 for RGB"),
        ({"use_class_token": False}, "`classifier_pooling='class_token'` needs `use_class_token=True`"),
        ({"classifier_pooling": "distilled"}, "needs `use_distillation_token=True`"),
        (WITHOUT_CLASS_TOKEN | {"use_distillation_token": True}, "needs `use_class_token=True`"),
        ({"classifier_pooling": "max"}, "`classifier_pooling` is 'max'.*'mean'"),
        ({"pooler_act": "tangent"}, "`pooler_act` is 'tangent'"),
        ({"is_causal": True}, "`is_causal` is True.*both directions"),
        ({"attention_type": "super"} | {"num_simulated_heads": 12}, "'super'. cannot be simulated"),
        ({"patch_sizes": 8}, "no field `patch_sizes`.*`patch_size`"),
        ({"num_simulated_head": 8}, "no field `num_simulated_head`.*`num_simulated_heads`"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SASViTConfig(**VIT_BASE | fields)


@pytest.mark.parametrize(
    ("variant", "shape", "options", "message"),
    [
        ("sas", (2, 1, 12, 12), {}, "has 1 channels, but this model's `num_channels` is 3; convert.*RGB"),
        ("mean", (2, 3, 12, 12), {}, "has 3 channels, but this model's `num_channels` is 1; convert.*grey"),
        ("sas", (3, 12, 12), {}, r"\[batch, channels, height, width\]"),
        ("sas", (2, 3, 16, 12), {}, "16 x 12 pixels, but `image_size`.*12 x 12.*interpolate_pos_encoding"),
        ("sas", (2, 3, 18, 12), {"interpolate_pos_encoding": True}, "18 x 12 pixels, which patches of 4 x 4"),
        ("super", (2, 3, 16, 16), {"interpolate_pos_encoding": True}, "4 x 4 patches.*10 tokens.*resize"),
        ("sas", None, {}, "specify `pixel_values`"),
        ("sas", (2, 3, 12, 12), {"bool_masked_pos": torch.ones(2, 9)}, "SASViTForMaskedImageModeling"),
    ],
)
def test_wrong_images_are_refused(variant, shape, options, message):
    model = vit(variant, model_class=SASViTModel)
    with pytest.raises(ValueError, match=message):
        model(None if shape is None else torch.randn(shape), **options)


def test_a_reconstruction_of_another_size_is_refused():
    model = vit("vit", model_class=SASViTForMaskedImageModeling, encoder_stride=2)
    with pytest.raises(ValueError, match=r"`patch_size` \(4\) must equal `encoder_stride` \(2\)"):
        model(images(model.config), bool_masked_pos=torch.ones(2, 9))
    assert model(images(model.config)).reconstruction.shape == (2, 3, 6, 6)


def test_a_text_model_is_no_image_classifier(tmp_path):
    train_tokenizer().save_pretrained(tmp_path)
    named_config("imdb-super").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SASEncoderConfig"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("channels", [2, 4])
def test_the_processor_refuses_other_channels(channels):
    with pytest.raises(ValueError, match=f"`num_channels` is {channels}; it must be 1 .* or 3"):
        SASViTImageProcessor(num_channels=channels)


def test_the_processor_refuses_images_of_four_channels():
    with pytest.raises(ValueError, match=r"An image has 4 channels; give it in grey \(1\) or RGB \(3\)"):
        SASViTImageProcessor(num_channels=3, do_convert_rgb=False)(random_image("RGBA"))
