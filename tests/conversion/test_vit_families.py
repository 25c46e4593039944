"""ViT and DeiT sources: the same function in float32 and float64, images to verify on, and what comes along."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from helpers import images, python_environment, sas_hf, scramble
from PIL import Image
from transformers import AutoModelForImageClassification, DeiTConfig, ViTConfig, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from sas_hf import SASViTForImageClassification
from sas_hf.conversion import ConversionError, ConversionOptions, compare_models, convert_checkpoint, convert_model
from sas_hf.conversion.convert import FAMILIES


# Awkward: three layers, five heads of twelve, an oblong image.
SHAPE = {
    "hidden_size": 60,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": (12, 20),
    "patch_size": (6, 4),
    "num_labels": 7,
    "initializer_range": 0.2,
}
CONFIGS = {"vit": ViTConfig, "deit": DeiTConfig}
ARCHITECTURES = [(family, name) for family in CONFIGS for name in FAMILIES[family].architectures]


def source(family: str, architecture: str, **fields):
    fields = SHAPE | {"encoder_stride": 6} | fields
    if "MaskedImage" in architecture:  # Transformers takes square images here
        fields |= {"image_size": 18, "patch_size": 6}
    return scramble(getattr(transformers, architecture)(CONFIGS[family](**fields)))


@pytest.fixture
def folder(tmp_path):
    """A ViT checkpoint with labels and its image processor."""
    names = {number: f"thing {number}" for number in range(7)}
    model = source("vit", "ViTForImageClassification", id2label=names, label2id={v: k for k, v in names.items()})
    model.save_pretrained(tmp_path / "source")
    ViTImageProcessorPil(size={"height": 12, "width": 20}, image_mean=[0.4] * 3).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def photograph(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


BEYOND_PAPER = {"simulate_value_features": True, "head_aggregation": "concat"}


@pytest.mark.parametrize("bias", [True, False], ids=["", "no biases"])
@pytest.mark.parametrize(
    "options",
    [{"simulation_kernel_size": 1}, {"simulation_kernel_size": 3}, BEYOND_PAPER],
    ids=["kernel 1", "kernel 3", "beyond the paper"],
)
@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)
def test_computes_what_its_source_computes(family, architecture, options, bias):
    model = source(family, architecture, qkv_bias=bias)
    converted = convert_model(model, ConversionOptions(**options))
    assert converted.config.num_simulated_heads == 15 and converted.config.simulated_head_dim == 18
    pixels = images(converted.config, 4)
    fidelity = compare_models(model, converted, [pixels])
    assert fidelity.is_exact and fidelity.images == 4 and fidelity.tokens == 0
    model, converted, pixels = model.double(), converted.double(), pixels.double()
    with torch.no_grad():
        found, expected = (m(pixels).to_tuple()[0] for m in (converted, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_every_copy_of_a_head_can_learn():
    model = convert_model(source("vit", "ViTForImageClassification"))
    model(images(model.config, 8), labels=torch.arange(8) % 7).loss.backward()
    for layer in model.vit.layers:
        for side in (layer.attention.q_simulation, layer.attention.k_simulation):
            groups = side.heads.expansion.weight.grad.unflatten(0, (3, 5))
            shared = groups.mean(dim=0)
            assert (groups - shared).norm() > 0.1 * groups.norm()


def test_the_distilled_classifier_is_kept(tmp_path):
    model = source("deit", "DeiTForImageClassificationWithTeacher")
    model.save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "sas")
    assert report["fidelity"]["exact"] and report["verified_on"] == "random images"
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "sas")
    assert loaded.config.classifier_pooling == "distilled"
    pixels = images(loaded.config)
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=1e-4)


FRESH_PROCESS = """
import json, sys
import sas_hf
from transformers import pipeline

print(json.dumps(pipeline("image-classification", model=sys.argv[1])(sys.argv[2], top_k=7)))
"""


def test_labels_and_processor_come_along_and_the_pipeline_gives_the_same(folder, tmp_path):
    photograph(1).save(tmp_path / "photo.png")
    run = sas_hf("convert", folder, tmp_path / "sas")
    assert run.returncode == 0, run.stderr
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path / "sas", tmp_path / "photo.png"]
    output = subprocess.run(command, check=True, env=python_environment(), capture_output=True, text=True).stdout
    found = {row["label"]: row["score"] for row in json.loads(output.splitlines()[-1])}
    classifier = pipeline("image-classification", model=str(folder))
    expected = {row["label"]: row["score"] for row in classifier(str(tmp_path / "photo.png"), top_k=7)}
    assert found.keys() == expected.keys() and "thing 3" in found
    for name, score in expected.items():
        assert found[name] == pytest.approx(score, abs=1e-5)


def test_verified_on_the_images_given(folder, tmp_path):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for seed, mode in enumerate(("RGB", "L", "RGBA")):
        photograph(seed, mode).save(tmp_path / "photos" / "more" / f"{seed}.png")
    report = convert_checkpoint(folder, tmp_path / "sas", images=tmp_path / "photos")
    assert report["verified_on"] == "the images given"
    assert report["fidelity"]["exact"] and report["fidelity"]["images"] == 3


def no_images(folder, tmp_path):
    (tmp_path / "photos").mkdir()


def damaged_image(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG nothing more")


def no_processor(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    photograph(0).save(tmp_path / "photos" / "a.png")
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda folder, tmp_path: None, FileNotFoundError, "photos is not a folder"),
        (no_images, FileNotFoundError, "holds no images"),
        (damaged_image, ValueError, r"broken.png is no image or is damaged"),
        (no_processor, ValueError, "no image processor"),
    ],
)
def test_unusable_images_are_refused_and_nothing_is_left(folder, tmp_path, prepare, error, message):
    prepare(folder, tmp_path)
    with pytest.raises(error, match=message):
        convert_checkpoint(folder, tmp_path / "sas", images=tmp_path / "photos")
    assert not (tmp_path / "sas").exists()


def test_a_source_whose_patches_do_not_cover_its_images_is_refused(tmp_path):
    source("vit", "ViTForImageClassification", image_size=13, patch_size=6).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"`image_size` \(13\) is not a multiple of `patch_size` \(6\)"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas")
    assert not (tmp_path / "sas").exists()


def test_another_tasks_head_is_refused(tmp_path):
    ViTConfig(**SHAPE, architectures=["ViTForObjectDetection"]).save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match="ViTForObjectDetection.*ViTForImageClassification"):
        convert_checkpoint(tmp_path / "source", tmp_path / "sas")


def test_a_converted_vit_is_not_converted_twice(tmp_path):
    model = convert_model(source("vit", "ViTForImageClassification"))
    assert type(model) is SASViTForImageClassification
    with pytest.raises(ConversionError, match="SAS model already"):
        convert_model(model)
