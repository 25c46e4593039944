"""Image files: which a folder holds, and how one is opened for a model of so many channels."""

import io
from pathlib import Path

from PIL import Image, ImageOps

from ..modeling.image_processing_sas_vit import to_rgb


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted; a `FileNotFoundError` if there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return files


def open_image(source: Path | dict, num_channels: int) -> Image.Image:
    """
    The image upright, of 8 bits, in grey for one channel, else in RGB: the first one, of a file that holds several.

    Args:
        source: a file, or a row of `datasets` that is not decoded: `{"path": ..., "bytes": ...}`.

    Raises:
        ValueError: names the file, if it is no image, damaged, or has no 8-bit form ([`to_rgb`]).
    """
    name: str | Path
    file: str | Path | io.BytesIO
    if isinstance(source, Path):
        name = file = source
    else:
        name = source["path"] or "An image of the dataset"
        file = source["path"] if source["bytes"] is None else io.BytesIO(source["bytes"])
    try:
        image = to_rgb(ImageOps.exif_transpose(Image.open(file)))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is no image or is damaged ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}.") from error
    return image.convert("L") if num_channels == 1 else image
