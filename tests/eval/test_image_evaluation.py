"""Image classifiers through `sas-hf eval`: right numbers, any classifier and dataset, clear refusals."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch
import typer
from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from helpers import gpt, sas_hf, vit, write_idx
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.testing import CliRunner

from sas_hf import SASViTForMaskedImageModeling
from sas_hf.cli import app, explain_errors
from sas_hf.data.image_files import open_image
from sas_hf.data.images import _with_standard_columns, load_image_dataset, read_idx
from sas_hf.eval import evaluate_images
from sas_hf.eval.images import check_labels
from sas_hf.eval.results import digest
from sas_hf.modeling.image_processing_sas_vit import SASViTImageProcessor


NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory):
    """Forty grey images of seven classes in MNIST's format."""
    folder, random = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for prefix, count in (("train", 20), ("t10k", 40)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 7)
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """The layout of `datasets`: test/<class>/<file>."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(21):
        place = folder / "test" / NAMES[number % 7]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return folder


@pytest.fixture
def grey_model(tmp_path):
    model = vit("mean")
    model.save_pretrained(tmp_path / "model")
    SASViTImageProcessor(num_channels=1, size={"height": 12, "width": 12}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_numbers_are_right(grey_model, idx_folder):
    result = evaluate_images(grey_model, idx_folder, batch_size=7)
    task = result.tasks["image_classification"]
    assert (task.split, task.num_samples, task.num_available) == ("test", 40, 40)

    rows = load_image_dataset(idx_folder)["test"]
    pixels = SASViTImageProcessor.from_pretrained(grey_model)(rows["image"][:], return_tensors="pt")["pixel_values"]
    labels = torch.tensor(rows["label"][:])
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(grey_model)(pixels).logits
    right = (logits.argmax(-1) == labels).double()
    among_five = (logits.topk(5).indices == labels[:, None]).any(-1).double()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
    for name, values in (("accuracy", right), ("top5_accuracy", among_five), ("loss", losses)):
        assert task.metrics[name].value == pytest.approx(values.mean().item(), abs=1e-5)
        assert task.metrics[name].stderr == pytest.approx(values.std().item() / 40**0.5, abs=1e-5)


def test_any_classifier_and_classes_by_name(image_folder, tmp_path):
    """Transformers' own ViT, whose classes are in another order, gives the same through names as in order."""
    accuracies = []
    model = ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, image_size=12,
                  patch_size=4, num_labels=7, initializer_range=0.5)
    )  # fmt: skip
    weight, bias = (parameter.data.clone() for parameter in model.classifier.parameters())
    processor = ViTImageProcessorPil(size={"height": 12, "width": 12})
    for order in (list(range(7)), [3, 1, 4, 0, 6, 5, 2]):
        model.classifier.weight.data, model.classifier.bias.data = weight[order], bias[order]
        names = [NAMES[number] for number in order]
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        result = evaluate_images(model.train(), image_folder, image_processor=processor)
        assert model.training  # left as it was found
        accuracies.append(result.tasks["image_classification"].metrics["accuracy"].value)
    assert accuracies[0] == accuracies[1] > 0


def test_a_limit_takes_images_of_all_classes(grey_model, image_folder, tmp_path):
    """Folders are sorted by class: the first images alone would be of one."""
    result = evaluate_images(grey_model, image_folder, limit=14, output=tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["tasks"]["image_classification"]["num_samples"] == 14 and saved["limit"] == 14
    again = evaluate_images(grey_model, image_folder, limit=14)
    assert again.tasks["image_classification"].metrics == result.tasks["image_classification"].metrics
    rows = load_image_dataset(image_folder)["test"].shuffle(seed=0).select(range(14))
    assert len(set(rows["label"])) > 4
    questions = digest([image_folder.name, "test", *map(str, rows["label"])])
    assert result.tasks["image_classification"].questions == questions


def test_the_command(grey_model, idx_folder, tmp_path):
    run = sas_hf("eval", grey_model, "--images", idx_folder, "--limit", 20, "--output", tmp_path / "result.json")
    assert run.returncode == 0, run.stderr
    assert " 20 " in run.stdout and "20.0" not in run.stdout  # the limit, which the command line reads as 20.0
    assert "top5_accuracy" in run.stdout and (tmp_path / "result.json").is_file()


@pytest.mark.parametrize("arguments", [[], ["--tasks", "arc_easy", "--images", "there"]], ids=["neither", "both"])
def test_tasks_or_images(arguments):
    run = sas_hf("eval", "model", *arguments)
    assert run.returncode == 1 and "either `--tasks`" in run.stderr


def test_few_classes_have_no_top_five(idx_folder, tmp_path):
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((6, 8, 8)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(6) % 3)
    model = vit("mean", num_labels=3)
    processor = SASViTImageProcessor(num_channels=1, size={"height": 12, "width": 12})
    result = evaluate_images(model, tmp_path, image_processor=processor)
    assert set(result.tasks["image_classification"].metrics) == {"accuracy", "loss"}


def test_a_checkpoint_of_another_task_is_refused(image_folder, tmp_path):
    vit("vit", model_class=SASViTForMaskedImageModeling).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SASViTForMaskedImageModeling.*classifier.*no image classifier yet"):
        evaluate_images(tmp_path, image_folder)


def test_a_model_without_processor_is_refused(image_folder, tmp_path):
    vit("vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no image processor.*image_processor"):
        evaluate_images(tmp_path, image_folder)


def test_other_classes_are_refused(image_folder):
    with pytest.raises(ValueError, match="has 7 classes and the model 4; the model does not know ant, bee"):
        evaluate_images(vit("vit", num_labels=4), image_folder, image_processor=SASViTImageProcessor())


def test_classes_of_other_names_are_refused(image_folder):
    """As many classes, but others: by position they would be scored against each other."""
    model = vit("vit", id2label=dict(enumerate([*NAMES[:6], "hen"])))
    with pytest.raises(ValueError, match="does not know gnu"):
        evaluate_images(model, image_folder, image_processor=SASViTImageProcessor(size={"height": 12, "width": 12}))


def test_a_share_of_the_images(grey_model, image_folder):
    task = evaluate_images(grey_model, image_folder, limit=0.5).tasks["image_classification"]
    assert (task.num_samples, task.num_available) == (10, 21)


def test_two_models_can_be_compared_image_by_image(grey_model, image_folder):
    first, second = (evaluate_images(grey_model, image_folder, limit=9).tasks["image_classification"] for _ in "ab")
    assert first.questions == second.questions and first.scores == second.scores
    assert len(first.scores["accuracy"]) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--images", "nothere"], "nothere is no folder here, nor a dataset"),
        (["mnist-sas", "--images", "IMAGES"], "is a named configuration, which has no weights"),
        (["./nothing", "--images", "IMAGES"], "nothing does not exist"),
        (["TEXT", "--images", "IMAGES"], "'sas_gpt', which has no image classifier; score a language model"),
        (["MODEL", "--images", "IMAGES", "--num-fewshot", "2"], "`--num-fewshot` is 2, but images"),
        (["MODEL", "--images", "IMAGES", "--stride", "2"], "`--stride` is 2, but images are scored without it"),
        (["MODEL", "--images", "IMAGES", "--truncation"], "`--truncation` is True, but images"),
        (["MODEL", "--images", "IMAGES", "--no-add-bos-token"], "`--no-add-bos-token` is True, but images"),
        (["TEXT", "--tasks", "arc_easy", "--image-split", "dev"], "`--image-split` is 'dev', but there are no"),
        (
            ["TEXT", "--tasks", "arc_easy", "--context-lengths", "8"],
            "`--context-lengths` is '8', but there is no text",
        ),
        (["TEXT", "--tasks", "arc_easy", "--text-split", "dev"], "`--text-split` is 'dev', but there is no text"),
        (["TEXT", "--perplexity", "x.txt", "--limit", "3"], "`limit` is 3.0, but there are no `tasks`"),
        (["TEXT", "--perplexity", "x.txt", "--columns", "PIQA"], "`columns` is ['PIQA'], but there are no `tasks`"),
        (["TEXT", "--perplexity", "x.txt", "--num-fewshot", "0"], "`num_fewshot` is 0, but there are no `tasks`"),
        (["TEXT", "--tasks", "arc_easy", "--limit", "inf"], "`limit` is inf"),
        (["MODEL", "--images", "IMAGES", "--batch-size", "x"], "`batch_size` is 'x'"),
        (["MODEL", "--images", "IMAGES", "--device", "hopper"], "`device` is 'hopper'"),
        (["MODEL", "--images", "IMAGES", "--image-split", "dev"], "`split` is 'dev'"),
    ],
)
def test_the_command_explains_mistakes(grey_model, image_folder, tmp_path, arguments, message):
    gpt("sas").save_pretrained(tmp_path / "text")
    places = {"MODEL": grey_model, "IMAGES": image_folder, "TEXT": tmp_path / "text"}
    run = CliRunner().invoke(app, ["eval", *(str(places.get(argument, argument)) for argument in arguments)])
    assert run.exit_code == 1
    assert message in run.stderr and "Traceback" not in run.stderr


def test_brackets_in_messages_are_shown():
    @explain_errors
    def command():
        raise ImportError("pip install sas_hf[eval]")

    cli = typer.Typer()
    cli.command()(command)
    assert "pip install sas_hf[eval]" in CliRunner().invoke(cli).stderr


def test_logits_that_are_no_numbers_are_refused(image_folder):
    model = vit("vit")
    model.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not numbers"):
        evaluate_images(model, image_folder, image_processor=SASViTImageProcessor(size={"height": 12, "width": 12}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "`limit` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"split": "dev"}, "`split` is 'dev'.*test"),
        ({"device": "cpu"}, "live model"),
    ],
)
def test_unusable_arguments_are_refused(image_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_images(vit("vit"), image_folder, image_processor=SASViTImageProcessor(), **arguments)


# The data.


def test_idx_files_are_read_as_they_are(idx_folder):
    dataset = load_image_dataset(idx_folder, NAMES)
    assert len(dataset["train"]) == 20 and len(dataset["test"]) == 40
    assert dataset["test"].features["label"].names == NAMES
    array = read_idx(idx_folder / "t10k-images-idx3-ubyte.gz")
    assert np.array_equal(np.array(dataset["test"][5]["image"]), array[5])
    assert dataset["test"]["label"][:8] == [0, 1, 2, 3, 4, 5, 6, 0]


def test_of_several_labels_the_finest_is_taken():
    """CIFAR100 on the Hub has fine labels before coarse ones, others have them behind."""
    fine, coarse = ClassLabel(names=["beaver", "dolphin", "orchid"]), ClassLabel(names=["mammal", "flower"])
    columns = {"img": ImageFeature(), "fine_label": fine, "coarse_label": coarse}
    rows = {"img": [Image.new("RGB", (4, 4))] * 3, "fine_label": [0, 1, 2], "coarse_label": [0, 0, 1]}
    for names in (list(columns), list(reversed(columns))):
        split = Dataset.from_dict(rows, Features(columns)).select_columns(names)
        found = _with_standard_columns(split, "cifar100", None)
        assert found.features["label"].names == fine.names and found["label"][:] == [0, 1, 2]


def cut_short(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])


def not_idx(folder):
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"something else")


def too_few_bytes(folder):
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]))


def other_counts(folder):
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.zeros(5))


def no_labels(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut_short, ValueError, "t10k-images.*damaged or truncated"),
        (not_idx, ValueError, "t10k-labels.*no IDX file"),
        (too_few_bytes, ValueError, "announces 9 bytes, but holds 2"),
        (other_counts, ValueError, "different numbers of items"),
        (no_labels, FileNotFoundError, "no t10k-labels-idx1-ubyte"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, damage, error, message):
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((6, 28, 28)) + np.arange(28))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(6))
    damage(tmp_path)
    with pytest.raises(error, match=message):
        load_image_dataset(tmp_path)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_image_dataset(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no images"):
        load_image_dataset(tmp_path)


def test_images_without_classes_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="one of class labels"):
        load_image_dataset(tmp_path)


def test_a_wrong_number_of_names_is_refused(idx_folder):
    with pytest.raises(ValueError, match="has 2 names, but .* has 7 classes"):
        load_image_dataset(idx_folder, ["ant", "bee"])


# Files of every kind.
LEVELS = np.random.default_rng(1).integers(0, 256, (12, 12), dtype=np.uint8)


def sixteen_bit(image):
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)


def turned(file):
    """A picture as a camera held sideways writes it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(LEVELS).rotate(90, expand=True).save(file, exif=exif)


def transparent(mode):
    image = Image.fromarray(LEVELS).convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(12) < 6, 255, 0).astype(np.uint8)[None].repeat(12, 0)))
    return image.convert(mode)


ON_WHITE = np.where(np.arange(12)[None] < 6, LEVELS, 255).astype(np.uint8)
KINDS = {
    "sixteen.png": (lambda file: sixteen_bit(LEVELS).save(file), LEVELS),
    "sixteen.tif": (lambda file: sixteen_bit(LEVELS).save(file), LEVELS),
    "turned.png": (turned, LEVELS),
    "rgba.png": (lambda file: transparent("RGBA").save(file), ON_WHITE),
    "la.png": (lambda file: transparent("LA").save(file), ON_WHITE),
    "palette.png": (lambda file: Image.fromarray(LEVELS).convert("P").save(file, transparency=255), None),
    "cmyk.tif": (lambda file: Image.fromarray(LEVELS).convert("RGB").convert("CMYK").save(file), LEVELS),
    "bits.png": (lambda file: Image.fromarray(LEVELS).convert("1", dither=0).save(file), 255 * (LEVELS > 127)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_every_kind_are_read_alike(name, channels, tmp_path):
    """Each as the same picture in eight bits, by what opens files and by the image processor itself."""
    write, levels = KINDS[name]
    write(tmp_path / name)
    found = open_image(tmp_path / name, channels)
    assert found.mode == {1: "L", 3: "RGB"}[channels]
    if levels is None:
        levels = np.where(LEVELS == 255, 255, LEVELS)
    assert np.abs(np.asarray(found.convert("L")).astype(int) - levels).max() <= 1
    processor = SASViTImageProcessor(num_channels=channels, size={"height": 12, "width": 12})
    if name != "turned.png":  # turning is the opener's
        direct, opened = (
            processor(image, return_tensors="pt")["pixel_values"] for image in (Image.open(tmp_path / name), found)
        )
        torch.testing.assert_close(direct, opened, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("integers.tif", lambda: Image.fromarray(LEVELS.astype(np.int32)), "32-bit integers"),
        ("floats.tif", lambda: Image.fromarray(LEVELS.astype(np.float32)), "floats"),
    ],
)
def test_images_without_eight_bits_are_refused_by_name(name, image, message, grey_model, tmp_path):
    for label in NAMES:
        (tmp_path / "odd" / "test" / label).mkdir(parents=True)
        image().save(tmp_path / "odd" / "test" / label / name)
    with pytest.raises(ValueError, match=rf"ant/{name} cannot be used: .*{message}"):
        evaluate_images(grey_model, tmp_path / "odd")
    with pytest.raises(ValueError, match=message):
        SASViTImageProcessor(size={"height": 12, "width": 12})(image())


def test_a_damaged_image_is_named(grey_model, image_folder, tmp_path):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    file = folder / "test" / "cat" / "2.png"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"cat/2.png is no image or is damaged"):
        evaluate_images(grey_model, folder)


def test_arrays_beyond_white_are_refused():
    processor = SASViTImageProcessor(num_channels=1, size={"height": 12, "width": 12})
    sixteen = LEVELS[None].astype(np.uint16) * 257
    with pytest.raises(ValueError, match=r"numbers from \d+ to 65535; by `rescale_factor` .* from 0 to 255"):
        processor(sixteen)
    for options in ({}, {"do_rescale": False, "rescale_factor": None}):
        with pytest.raises(ValueError, match="numbers from nan to nan: it is damaged"):
            processor(np.full((1, 12, 12), np.nan), **options)


# Classes.
def scored_by(image_folder, **fields):
    processor = SASViTImageProcessor(size={"height": 12, "width": 12})
    fields = {"num_labels": len(fields.get("id2label", NAMES))} | fields
    return evaluate_images(vit("vit", **fields), image_folder, image_processor=processor)


def test_two_classes_of_one_name_are_refused(image_folder):
    with pytest.raises(ValueError, match=r"2 classes named 'cat' \(`id2label`: \[2, 7\]\), and the dataset has one"):
        scored_by(image_folder, id2label=dict(enumerate([*NAMES, "cat"])))
    scored_by(image_folder, id2label=dict(enumerate([*NAMES, "hen", "hen"])))  # of which there are no images


def test_numerals_that_are_sorted_as_words_are_refused(tmp_path):
    """ "10" comes before "2": by position the third class would be scored as the tenth."""
    for number in range(11):
        (tmp_path / "test" / str(number)).mkdir(parents=True)
        Image.fromarray(LEVELS).convert("RGB").save(tmp_path / "test" / str(number) / "a.png")
    with pytest.raises(ValueError, match=r"numbers in another order \(0, 1, 10, 2, 3, ...\)"):
        scored_by(tmp_path, num_labels=11)
    scored_by(tmp_path, id2label={number: str(number) for number in range(11)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"id2label": {number + 1: name for number, name in enumerate(NAMES)}}, "must count 0, 1, 2"),
    ],
)
def test_models_that_do_not_choose_one_class(fields, message, image_folder):
    with pytest.raises(ValueError, match=message):
        scored_by(image_folder, **fields)


def test_images_without_label_are_refused(tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    rows = {"image": [Image.fromarray(LEVELS)] * 3, "label": [0, -1, -1]}
    (tmp_path / "set").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "test.parquet")
    dataset = load_dataset(
        "parquet", data_files={"test": str(tmp_path / "set" / "test.parquet")}, cache_dir=str(tmp_path)
    )
    with pytest.raises(ValueError, match="2 of 3 images of the split 'test' have no label"):
        check_labels(dataset["test"], "test")
