"""A SAS checkpoint on its way to another architecture: looked at, before its weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from huggingface_hub import ModelCard
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import modeling
from ..hub.card import read_card
from ..hub.checkpoints import check_vocabulary, load_processor, read_settings
from ..hub.sentence_modules import find_sentence_modules
from ..modeling.sharing import config_class_of
from .family import ConversionError
from .fidelity import Sample
from .samples import check_samples, verification_samples
from .sources import check_weights


@dataclass(frozen=True)
class SASCheckpoint:
    """What belongs to a checkpoint besides its weights, and what both models will be compared on.

    Args:
        verified_on: where the samples come from.
        sentence_modules: of sentence-transformers, as the report names them.
        card: its model card, if it has one.
    """

    config: PreTrainedConfig
    processor: PreTrainedTokenizerBase | BaseImageProcessor | None
    samples: Sequence[Sample]
    verified_on: str
    sentence_modules: list[str]
    card: ModelCard | None


def find_sas_class(checkpoint: str | Path, revision: str | None) -> type[PreTrainedModel]:
    """The SAS class that a checkpoint is of; a [`ConversionError`] if it is of none."""
    settings = read_settings(checkpoint, revision)
    names = settings.get("architectures") or ["not given"]
    sas_class = getattr(modeling, str(names[0]), None)
    if not str(settings.get("model_type")).startswith("sas_"):
        raise ConversionError(
            f"{checkpoint} is no SAS checkpoint: its `model_type` is {settings.get('model_type')!r}, its class "
            f"{names[0]}."
        )
    if len(names) != 1 or not (isinstance(sas_class, type) and issubclass(sas_class, PreTrainedModel)):
        raise ConversionError(
            f"`architectures` in the config.json of {checkpoint} is {settings.get('architectures')!r}; write there "
            'which SAS class it is, for instance ["SASGPTForCausalLM"].'
        )
    return sas_class


def open_sas_checkpoint(
    checkpoint: str | Path,
    revision: str | None,
    sas_class: type[PreTrainedModel],
    text: str | None,
    images: str | Path | None,
    windows: int,
    window_length: int,
) -> SASCheckpoint:
    """Read all of a checkpoint but its weights, which are looked for.

    Args:
        text, images, windows, window_length: as in `convert_checkpoint`.

    Raises:
        FileNotFoundError: if it has no weights.
        ConversionError: if it is damaged, or an adapter.
        ValueError: for samples that do not fit.
    """
    check_samples(sas_class, text, images, windows, window_length)
    check_weights(checkpoint, revision)
    sentence_modules = find_sentence_modules(checkpoint, revision, ConversionError)
    card = read_card(checkpoint, revision)
    config = config_class_of(sas_class).from_pretrained(checkpoint, revision=revision or "main")
    processor = load_processor(sas_class, checkpoint, revision)
    if hasattr(config, "vocab_size") and processor is not None:
        check_vocabulary(cast(PreTrainedTokenizerBase, processor), config.vocab_size, checkpoint)
    samples, verified_on = verification_samples(
        sas_class, config, processor, text, images, windows, window_length, seed=0
    )
    return SASCheckpoint(config, processor, samples, verified_on, sentence_modules, card)
