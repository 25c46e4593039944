"""Labelled images for training and evaluation, as `datasets` of an image and a class, from wherever they are."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset

from .image_files import find_images


def load_image_dataset(source: str | Path, class_names: list[str] | None = None) -> DatasetDict:
    """
    The splits of a dataset of labelled images, with the columns `image` and `label` (a `ClassLabel`).

    Args:
        source: a folder with MNIST's IDX files (`train-images-idx3-ubyte.gz`, ...; splits "train" and "test"), a
            folder of images as `datasets` reads it (`<split>/<class>/<file>`), or a dataset's id on the Hub.
        class_names: of the classes, in their order; by default the dataset's own, for IDX files the numbers.

    Raises:
        FileNotFoundError: for a folder without images, or neither folder nor dataset.
        ValueError: for a dataset without images or classes, damaged IDX files, or a wrong number of names.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if any(folder.glob("*-idx3-ubyte*")):
            dataset = _idx_dataset(folder)
        else:
            find_images(folder)  # an empty folder is refused here, in words
            dataset = load_dataset("imagefolder", data_dir=str(folder.resolve()))
    elif isinstance(source, Path) or folder.is_absolute() or str(source).startswith((".", "~")):
        raise FileNotFoundError(f"{folder} does not exist.")
    else:
        try:
            dataset = load_dataset(str(source))
        except (OSError, ValueError) as error:  # not there, or the Hub cannot be reached
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"{source} is no folder here, nor a dataset that the Hub gives: {reason}"
            ) from error
    return DatasetDict({name: _with_standard_columns(split, source, class_names) for name, split in dataset.items()})


def undecoded(split: Dataset) -> Dataset:
    """The same rows with images as [`~sas_hf.data.image_files.open_image`] takes them: it knows their files' names."""
    return split.cast_column("image", Image(decode=False))


def find_split(dataset: DatasetDict, *wanted: str) -> str:
    """The first of the wanted splits that the dataset has; a `ValueError` with those it has if there is none."""
    for name in wanted:
        if name in dataset:
            return name
    raise ValueError(f"The dataset has no split {' or '.join(map(repr, wanted))}; it has {', '.join(dataset)}.")


def _with_standard_columns(split: Dataset, source: str | Path, class_names: list[str] | None) -> Dataset:
    images = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    labels = {name: feature for name, feature in split.features.items() if isinstance(feature, ClassLabel)}
    if not images or not labels:
        raise ValueError(
            f"{source} needs a column of images and one of class labels; its columns are {dict(split.features)}."
        )
    # The finest where there are several, as in CIFAR100.
    label = "label" if "label" in labels else max(labels, key=lambda name: labels[name].num_classes)
    split = split.select_columns([images[0], label]).rename_columns({images[0]: "image", label: "label"})
    if class_names is not None:
        count = split.features["label"].num_classes
        if len(class_names) != count:
            raise ValueError(f"`class_names` has {len(class_names)} names, but {source} has {count} classes.")
        split = split.cast_column("label", ClassLabel(names=class_names))
    return split


def _idx_dataset(folder: Path) -> DatasetDict:
    """MNIST's own format: http://yann.lecun.com/exdb/mnist, gzipped or not."""
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        found = {kind: sorted(folder.glob(f"{prefix}-{kind}-ubyte*")) for kind in ("images-idx3", "labels-idx1")}
        if not any(found.values()):
            continue
        for kind, files in found.items():
            if not files:
                raise FileNotFoundError(f"{folder} has no {prefix}-{kind}-ubyte(.gz).")
        images, labels = (str(files[0]) for files in found.values())
        if len(read_idx(images)) != len(read_idx(labels)):
            raise ValueError(f"{images} and {labels} hold different numbers of items.")
        names = [str(number) for number in range(int(read_idx(labels).max()) + 1)]
        splits[split] = Dataset.from_generator(
            _idx_rows,
            features=Features({"image": Image(), "label": ClassLabel(names=names)}),
            gen_kwargs={"images": images, "labels": labels},
        )
    return DatasetDict(splits)


def _idx_rows(images: str, labels: str) -> Iterator[dict]:
    for image, label in zip(read_idx(images), read_idx(labels), strict=True):
        yield {"image": image, "label": int(label)}


def read_idx(path: str) -> np.ndarray:
    """The array of unsigned bytes in an IDX file; a `ValueError` if the file is not one or is cut short."""
    try:
        data = (gzip.open if str(path).endswith(".gz") else open)(path, "rb").read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); fetch it again.") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes.")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        raise ValueError(f"{path} announces {shape.prod()} bytes, but holds {values.size}; fetch it again.")
    return values.reshape(shape)
