"""What a conversion is verified on: windows of text for language models, padded batches for encoders and
encoder-decoders, batches of images for classifiers of images."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.text import python_reference
from ..modeling import SASEncoderForMultipleChoice, SASViTConfig
from ..modeling.configuration_text import SASTextConfig
from .fidelity import MINIMUM_TOKENS, Batch, Sample, text_windows


IMAGES_AT_ONCE = 4
CHARACTERS_PER_TOKEN = 8  # of a stretch of text, which is cut to its window's length: more than languages have


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
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    processor: PreTrainedTokenizerBase | BaseImageProcessor | None,
    text: str | None,
    images: str | Path | None,
    windows: int,
    window_length: int,
    seed: int,
) -> tuple[Sequence[Sample], str]:
    """What a SAS model of this class and configuration is compared with its counterpart on, and where it comes from.

    Args:
        processor: the image processor or tokenizer of the two.
        text, images, windows, window_length: as in `convert_checkpoint`.
        seed: of random samples.

    Raises:
        ValueError: for a text that says too little, or text or images that nothing can prepare for the model.
        FileNotFoundError: if the folder holds no images.
    """
    if isinstance(config, SASViTConfig):
        return image_samples(cast(BaseImageProcessor | None, processor), images, config, windows, seed)
    length, tokenizer = (
        min(window_length, config.max_position_embeddings),
        cast(PreTrainedTokenizerBase | None, processor),
    )
    if isinstance(config, SASTextConfig):
        return padded_samples(model_class, config, tokenizer, text, length, windows, seed)
    return text_samples(tokenizer, text, config.vocab_size, length, windows, seed)


def text_samples(
    tokenizer: PreTrainedTokenizerBase | None, text: str | None, vocab_size: int, length: int, count: int, seed: int
) -> tuple[list[torch.Tensor], str]:
    """`count` windows `[1, length]` of token ids, and where they come from."""
    if tokenizer is None and text is not None:
        raise ValueError("`text` is given, but the source has no tokenizer to read it with.")
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        samples = [torch.randint(vocab_size, (1, length), generator=generator, device="cpu") for _ in range(count)]
        return samples, "random tokens (the source has no tokenizer)"
    samples = text_windows(python_reference() if text is None else text, tokenizer, length, count)
    check_token_ids(samples, tokenizer, vocab_size)
    return samples, "the Python language reference" if text is None else "the text given"


def check_token_ids(samples: list[torch.Tensor], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise a `ValueError` if a text has tokens that a model of this size has no embeddings for."""
    largest = max(int(ids.max()) for ids in samples)
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer makes {tokenizer.convert_ids_to_tokens(largest)!r} (number {largest}) of the text, but "
            f"the model's `vocab_size` is {vocab_size}; give the model embeddings for it: "
            f"model.resize_token_embeddings({largest + 1})."
        )


def padded_samples(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | None,
    length: int,
    count: int,
    seed: int,
) -> tuple[list[Batch], str]:
    """`count` batches for an encoder or an encoder-decoder, and where they come from.

    One row of a batch is `length` tokens long, the other shorter and padded on the side on which the tokenizer pads.
    The shorter row of an encoder is a pair of texts with their token types; multiple choice is between two pairs. An
    encoder-decoder gets what follows in the text as its target.
    """
    if tokenizer is None and text is not None:
        raise ValueError("`text` is given, but the source has no tokenizer to read it with.")
    is_pair = config.is_encoder_decoder
    tokenizer = copy.deepcopy(tokenizer)  # some remember a target language as soon as they read one
    if tokenizer is None or tokenizer.pad_token is None:
        lacks = "tokenizer" if tokenizer is None else "padding token"
        generator = torch.Generator().manual_seed(seed)
        samples = [_random_batch(config, length, generator) for _ in range(count)]
        told = f"random tokens (the source has no {lacks})"
    else:
        told = "the Python language reference" if text is None else "the text given"
        text = python_reference() if text is None else text
        found = len(tokenizer(text[: CHARACTERS_PER_TOKEN * MINIMUM_TOKENS * 8], verbose=False)["input_ids"])
        if found < MINIMUM_TOKENS:
            raise ValueError(f"`text` has {found} tokens; comparing models needs at least {MINIMUM_TOKENS}.")
        size = min(CHARACTERS_PER_TOKEN * length * (2 if is_pair else 1), len(text))
        starts = torch.linspace(0, len(text) - size, min(count, max(1, len(text) // size))).long().tolist()
        stretches = [text[start : start + size] for start in starts]
        batch = _translation_batch if is_pair else _encoder_batch
        samples = [batch(tokenizer, stretch, config, length) for stretch in stretches]
        check_token_ids([sample["input_ids"] for sample in samples], tokenizer, config.vocab_size)
        if is_pair:
            targets = [sample["decoder_input_ids"] for sample in samples]
            check_token_ids(targets, tokenizer, config.decoder_vocab_size)
    if is_pair:
        if model_class.can_generate():
            samples = [_with_labels(sample) for sample in samples]
        return samples, f"{told}, padded pairs of source and target"
    if model_class is SASEncoderForMultipleChoice:
        # Two choices of one question.
        return [{name: values[None] for name, values in sample.items()} for sample in samples], f"{told}, two choices"
    return samples, f"{told}, in padded batches with text pairs"


def _encoder_batch(tokenizer: PreTrainedTokenizerBase, text: str, config: PreTrainedConfig, length: int) -> Batch:
    """A whole stretch of text, and a pair of its first and last eighths."""
    eighth = len(text) // 8
    rows = [
        tokenizer(text, truncation=True, max_length=length, verbose=False),
        tokenizer(text[:eighth], text[-eighth:], truncation=True, max_length=max(length // 4, 8), verbose=False),
    ]
    sample = tokenizer.pad(rows, return_tensors="pt", verbose=False)
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (config.type_vocab_size > 1)
    return {name: sample[name] for name in names if name in sample}


def _translation_batch(tokenizer: PreTrainedTokenizerBase, text: str, config: PreTrainedConfig, length: int) -> Batch:
    """A stretch of text with the next as its target, and an eighth of each."""
    half, eighth = len(text) // 2, len(text) // 16
    source, target = text[:half], text[half:]
    lengths = (length, max(length // 4, 8))
    sources = [
        tokenizer(part, truncation=True, max_length=most, verbose=False)
        for part, most in zip((source, source[:eighth]), lengths, strict=True)
    ]
    targets = [
        tokenizer(text_target=part, truncation=True, max_length=most, verbose=False)
        for part, most in zip(
            (target[:eighth], target), reversed(lengths), strict=True
        )  # the long one beside the short
    ]
    padded, padded_targets = (tokenizer.pad(rows, return_tensors="pt", verbose=False) for rows in (sources, targets))
    return {
        "input_ids": padded["input_ids"],
        "attention_mask": padded["attention_mask"],
        "decoder_input_ids": padded_targets["input_ids"],
        "decoder_attention_mask": padded_targets["attention_mask"],
    }


def _random_batch(config: PreTrainedConfig, length: int, generator: torch.Generator) -> Batch:
    """Two rows of random tokens, the second shorter and padded on the right."""

    def draw(count):
        return torch.randint(count, (2, length), generator=generator, device="cpu")

    def ids(vocab_size):
        drawn = draw(vocab_size)
        # A padding token inside a text is none to some models, a gap to others.
        drawn[drawn == pad] = (pad + 1) % vocab_size
        return drawn * mask + pad * (1 - mask)

    pad = config.pad_token_id or 0
    mask = torch.ones(2, length, dtype=torch.long, device="cpu")
    mask[1, max(length // 2, 1) :] = 0
    sample = {"input_ids": ids(config.vocab_size), "attention_mask": mask}
    if config.is_encoder_decoder:
        return sample | {"decoder_input_ids": ids(config.decoder_vocab_size), "decoder_attention_mask": mask}
    if config.type_vocab_size > 1:
        sample["token_type_ids"] = draw(config.type_vocab_size)
    return sample


def _with_labels(sample: Batch) -> Batch:
    """With the target as labels, from which each model makes its decoder's inputs itself."""
    target, mask = sample["decoder_input_ids"], sample["decoder_attention_mask"]
    kept = {name: values for name, values in sample.items() if not name.startswith("decoder_")}
    return kept | {"labels": target.masked_fill(mask == 0, -100)}


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
        coarse = torch.randn(*shape, 8, 8, generator=generator, device="cpu").flatten(0, 1)
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
