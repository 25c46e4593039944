"""What a conversion is verified on: windows of text for language models, batches of images for classifiers."""

from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.text import python_reference
from ..modeling import SASViTConfig
from .fidelity import text_windows


IMAGES_AT_ONCE = 4


def check_samples(
    model_class: type[PreTrainedModel],
    text: str | None,
    images: str | Path | None,
    windows: int,
    window_length: int,
) -> None:
    """Raise a `ValueError` for what a SAS model of this class cannot be verified on, or would not be."""
    of_images = "image" in model_class.input_modalities
    if of_images and text is not None:
        raise ValueError("`text` is given, but the source is a model of images; give `images`, a folder of some.")
    if not of_images and images is not None:
        raise ValueError(f"`images` ({images}) are given, but the source is a model of text; give `text`.")
    if windows < 1:
        raise ValueError(f"`windows` is {windows}; it must be positive: so many samples are compared.")
    if window_length < 2:
        raise ValueError(
            f"`window_length` is {window_length}; a window needs at least two tokens, one to look back on."
        )


def verification_samples(
    config: PreTrainedConfig,
    processor: PreTrainedTokenizerBase | BaseImageProcessor | None,
    text: str | None,
    images: str | Path | None,
    windows: int,
    window_length: int,
    seed: int,
) -> tuple[list[torch.Tensor], str]:
    """What a SAS model of this configuration is compared with its counterpart on, and where it comes from.

    Args:
        processor: the image processor or tokenizer of the two.
        text, images, windows, window_length: as in `convert_checkpoint`.
        seed: of random samples.

    Raises:
        ValueError: for a text that says too little, or text or images that nothing can prepare for the model.
        FileNotFoundError: if the folder holds no images.
    """
    if isinstance(config, SASViTConfig):
        return image_samples(processor, images, config, windows, seed)
    length = min(window_length, config.max_position_embeddings)
    return text_samples(processor, text, config.vocab_size, length, windows, seed)


def text_samples(
    tokenizer: PreTrainedTokenizerBase | None, text: str | None, vocab_size: int, length: int, count: int, seed: int
) -> tuple[list[torch.Tensor], str]:
    """`count` windows `[1, length]` of token ids, and where they come from."""
    if tokenizer is None and text is not None:
        raise ValueError("`text` is given, but the source has no tokenizer to read it with.")
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        samples = [torch.randint(vocab_size, (1, length), generator=generator) for _ in range(count)]
        return samples, "random tokens (the source has no tokenizer)"
    samples = text_windows(python_reference() if text is None else text, tokenizer, length, count)
    largest = max(int(ids.max()) for ids in samples)
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer makes {tokenizer.convert_ids_to_tokens(largest)!r} (number {largest}) of the text, but "
            f"the model's `vocab_size` is {vocab_size}; give the model embeddings for it: "
            f"model.resize_token_embeddings({largest + 1})."
        )
    return samples, "the Python language reference" if text is None else "the text given"


def image_samples(
    processor: BaseImageProcessor | None, folder: str | Path | None, config: PreTrainedConfig, count: int, seed: int
) -> tuple[list[torch.Tensor], str]:
    """`count` batches of pixels for a model of this configuration, and where they come from.

    Args:
        config: of the SAS model.
        folder: images are searched in it, subfolders included; `None`: smooth random images.

    Raises:
        ValueError: if a folder is given, but the source has no processor for its images.
        FileNotFoundError: if the folder holds no images.
    """
    if folder is None:
        generator = torch.Generator().manual_seed(seed)
        shape = (count, IMAGES_AT_ONCE, config.num_channels)
        coarse = torch.randn(*shape, 8, 8, generator=generator).flatten(0, 1)
        smooth = torch.nn.functional.interpolate(coarse, size=config.image_shape, mode="bicubic", antialias=True)
        return list(smooth.clamp(-2, 2).split(IMAGES_AT_ONCE)), "random images"
    if processor is None:
        raise ValueError("`images` are given, but the source has no image processor (preprocessor_config.json).")
    from ..data.image_files import find_images, open_image  # needs Pillow, which models of text do without

    files = find_images(Path(folder))
    chosen = [
        files[int(place)] for place in torch.linspace(0, len(files) - 1, min(len(files), count * IMAGES_AT_ONCE))
    ]
    pixels = processor([open_image(file, config.num_channels) for file in chosen], return_tensors="pt")["pixel_values"]
    return list(pixels.split(IMAGES_AT_ONCE)), "the images given"
