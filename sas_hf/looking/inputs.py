"""What is looked at: texts and images, as a model reads them and as a page shows them."""

import base64
import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from tokenizers.models import WordPiece
from transformers import BaseImageProcessor, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from ..data.languages import begin_with_language, set_languages


LONGEST_OUTPUT = 64  # tokens that a translator writes by itself


@dataclass
class Side:
    """
    What one side of attention is made of.

    Attributes:
        title: such as "Text".
        labels: of each token, a space in front where a word begins; of a patch, its row and column from 1.
        special: which tokens are not of the input itself.
        parts: of a pair, which text each token is of; None for special tokens.
        grid: of an image, patches from top to bottom and from left to right; they are the last tokens.
        image: as the model sees it, a PNG as data URL.
    """

    title: str
    labels: list[str]
    special: list[bool]
    parts: list[int | None] = field(default_factory=list)
    grid: tuple[int, int] | None = None
    image: str | None = None


def read_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], target: str | None
) -> tuple[dict[str, torch.Tensor], dict[str, Side]]:
    """
    The inputs of a text model, one row each, and the sides that they show.

    Args:
        texts: one, or a pair.
        target: what a decoder has read of its own, for a model that has an encoder too; `None`: what it writes by
            itself, its likeliest or as its generation configuration says, up to 64 tokens.

    Raises:
        ValueError: for texts without tokens, with unknown ones, or more than the model can read.
    """
    apart = model.config.is_encoder_decoder
    if apart:
        tokenizer = copy.deepcopy(tokenizer)
        set_languages(tokenizer, (None, None), ("the source's language", "the target's language"), keep=True)
    encoded = tokenizer(*texts, return_tensors="pt")
    taken = {"input_ids", "attention_mask", "token_type_ids"} & encoded.keys() & set(tokenizer.model_input_names)
    inputs = {name: encoded[name].to(model.device) for name in sorted(taken)}
    ids = inputs["input_ids"][0].tolist()
    _check(model, ids, "`inputs`", model.config.vocab_size)
    titles = "Source" if apart else "Pair of texts" if len(texts) > 1 else "Text"
    sides = {"source": _text_side(titles, tokenizer, ids)}
    if len(texts) > 1:
        sides["source"].parts = encoded.sequence_ids(0) if encoded.is_fast else []
    if apart:
        size = getattr(model.config, "decoder_vocab_size", None) or model.config.vocab_size
        read = _written(model, tokenizer, inputs) if target is None else _given(model, tokenizer, target)
        _check(model, read[0].tolist(), "`target`", size)
        inputs["decoder_input_ids"] = read
        title = "Target" if target is not None else "Target, written by the model"
        sides["target"] = _text_side(title, tokenizer, read[0].tolist(), target=True)
    return inputs, sides


def _check(model: PreTrainedModel, ids: list[int], name: str, vocabulary: int) -> None:
    if not ids:
        raise ValueError(f"{name} has no tokens; give a text that has.")
    if max(ids) >= vocabulary:
        raise ValueError(
            f"{name} has token {max(ids)}, but the model's `vocab_size` is {vocabulary}; it is another model's "
            "tokenizer, or the model's embeddings have not grown with it."
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(ids) > longest:
        raise ValueError(f"{name} is {len(ids)} tokens long, but the model reads at most {longest}; shorten it.")


def _given(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: str) -> torch.Tensor:
    """What the decoder reads where it shall write this text `[1, T]`."""
    labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"].to(model.device)
    read_for: Callable[..., torch.Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if read_for is None:
        raise ValueError(
            f"`target` is given, but {type(model).__name__} does not say how its decoder reads one; leave it out."
        )
    return read_for(labels=labels)


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Mapping) -> torch.Tensor:
    """What the decoder has read when it has written what it would by itself `[1, T]`."""
    if not model.can_generate():
        raise ValueError(
            f"`target` is not given, and {type(model).__name__} has no head to write one with; load the checkpoint "
            "with its head (`AutoModelForSeq2SeqLM`)."
        )
    settings = copy.deepcopy(model.generation_config)
    settings.max_length, settings.max_new_tokens, settings.do_sample = LONGEST_OUTPUT, None, False
    begin_with_language(settings, tokenizer)
    return cast(GenerationMixin, model).generate(**inputs, generation_config=settings)[:, :-1]


def _text_side(title: str, tokenizer: PreTrainedTokenizerBase, ids: list[int], target: bool = False) -> Side:
    special = set(tokenizer.all_special_ids)
    if target and hasattr(tokenizer, "_switch_to_target_mode"):  # Marian's, which has two vocabularies
        tokenizer._switch_to_target_mode()
    labels = [_label(tokenizer, number, number in special) for number in ids]
    if target and hasattr(tokenizer, "_switch_to_input_mode"):
        tokenizer._switch_to_input_mode()
    return Side(title, labels, [number in special for number in ids])


def _label(tokenizer: PreTrainedTokenizerBase, number: int, special: bool) -> str:
    token = cast(str | None, tokenizer.convert_ids_to_tokens(number))
    if token is None:
        return f"token {number}"
    text = token if special else tokenizer.convert_tokens_to_string([token])
    if not text or "\ufffd" in text:  # a part of a character
        text = token
    backend = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    starts = not token.startswith("##") if isinstance(backend, WordPiece) else token[0] in "Ġ▁"
    return f" {text}" if starts and not special and not text.startswith(" ") else text


def read_image(model: PreTrainedModel, processor: BaseImageProcessor, image) -> tuple[dict[str, torch.Tensor], Side]:
    """
    The inputs of a model of images, one row each, and the side that they show.

    Args:
        image: a file, or an image of Pillow's.

    Raises:
        ValueError: for a file that is no image, or a model whose patches do not lie in a grid.
    """
    from ..data.image_files import open_image  # needs Pillow

    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise FileNotFoundError(f"`inputs` is {str(image)!r}, where no image is; this model reads images.")
        image = open_image(Path(image), getattr(model.config, "num_channels", 3))
    patch = getattr(model.config, "patch_size", None)
    if patch is None:
        raise ValueError(
            f"`model` is a {type(model).__name__}, whose images are not cut into patches of `patch_size`."
        )
    height, width = (patch, patch) if isinstance(patch, int) else patch
    pixels = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    grid = pixels.shape[-2] // height, pixels.shape[-1] // width
    labels = [f"row {row + 1}, column {column + 1}" for row in range(grid[0]) for column in range(grid[1])]
    seen = as_seen(pixels[0, :, : grid[0] * height, : grid[1] * width].float().cpu(), processor)
    return {"pixel_values": pixels}, Side("Image", labels, [False] * len(labels), grid=grid, image=seen)


def as_seen(pixels: torch.Tensor, processor: BaseImageProcessor) -> str:
    """Pixels `[channels, height, width]` as the model reads them, without their normalisation: a PNG's data URL."""
    from PIL import Image

    if getattr(processor, "do_normalize", False):
        mean, std = (
            torch.tensor(getattr(processor, name)).float().reshape(-1, 1, 1) for name in ("image_mean", "image_std")
        )
        pixels = pixels * std + mean
    if not getattr(processor, "do_rescale", True):
        pixels = pixels / 255
    values = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


PREFIXES = (["[CLS]"], ["[CLS]", "[DIST]"])


def add_prefix(side: Side, tokens: int) -> None:
    """Tell an image's side which tokens come before its patches, of so many in all.

    Raises:
        ValueError: if there are not as many patches as the grid has.
    """
    extra, grid = tokens - len(side.labels), cast(tuple[int, int], side.grid)
    if not 0 <= extra <= 8:
        raise ValueError(
            f"The image has {grid[0]} x {grid[1]} patches, but the model attends to {tokens} tokens; only "
            "models that keep their patches through all layers can be shown."
        )
    names = PREFIXES[extra - 1] if 0 < extra <= 2 else [f"[prefix {number + 1}]" for number in range(extra)]
    side.labels, side.special = [*names, *side.labels], [*[True] * extra, *side.special]
