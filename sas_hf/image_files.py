"""Image files: which a folder holds, and how one is opened for a model of so many channels."""

from pathlib import Path

from PIL import Image


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted; a `FileNotFoundError` if there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return files


def open_image(file: Path, num_channels: int) -> Image.Image:
    """The image in grey for one channel, else in RGB; a `ValueError` if the file is no image or damaged."""
    try:
        return with_channels(Image.open(file), num_channels)
    except OSError as error:
        raise ValueError(f"{file} is no image or is damaged ({error}).") from error


def with_channels(image: Image.Image, num_channels: int) -> Image.Image:
    """As pipelines prepare an image, but for models of one channel."""
    return image.convert("L" if num_channels == 1 else "RGB")
