"""Texts and images in: files, tables and datasets of them."""

from typing import TYPE_CHECKING

from ..importing import when_first_used


if TYPE_CHECKING:
    from .image_files import open_image
    from .images import load_image_dataset
    from .text import python_reference, split_text, train_tokenizer
    from .text_files import read_whole

__all__ = ["load_image_dataset", "open_image", "python_reference", "read_whole", "split_text", "train_tokenizer"]
__getattr__ = when_first_used(
    __name__,
    {
        "load_image_dataset": "images",
        "open_image": "image_files",
        "python_reference": "text",
        "read_whole": "text_files",
        "split_text": "text",
        "train_tokenizer": "text",
    },
)
