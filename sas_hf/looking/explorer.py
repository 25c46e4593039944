"""`look`: a model and what it shall look at in; attention to explore, as numbers and as a page, out."""

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..hub.checkpoints import load_config, load_model, load_processor, read_adapter
from ..hub.merge import merge, saved_class
from ..modeling.attention import SASAttention
from ..report.files import write_atomically
from .collecting import Place, collect
from .inputs import Side, add_prefix, read_image, read_texts
from .page import make_page


LARGEST = 2**26  # attention weights on a page


@dataclass
class Look:
    """
    What a model looked at. In a notebook it shows itself.

    Attributes:
        model: its name.
        architecture: its class.
        places: where there is attention: the model's own; of encoder–decoders the encoder's, the decoder's and that
            across, in this order. Their weights are exact, those of the page rounded.
        sides: what rows and columns of their weights stand for, by name.
    """

    model: str
    architecture: str
    places: list[Place]
    sides: dict[str, Side]

    def html(self) -> str:
        """One page that needs nothing else."""
        return make_page(self.model, self.architecture, self.places, self.sides)

    def save(self, path: str | Path) -> None:
        """Write the page; missing folders are made."""
        write_atomically(Path(path), self.html().encode())

    def _repr_html_(self) -> str:
        frame = "width: 100%; height: 860px; border: 0; border-radius: 8px"
        return f'<iframe srcdoc="{html.escape(self.html())}" style="{frame}" title="Attention"></iframe>'

    def __repr__(self) -> str:
        shapes = ", ".join(f"{place.name} {tuple(place.weights.shape)}" for place in self.places)
        return f"Look({self.model!r}, {shapes})"


def look(
    model: str | Path | PreTrainedModel,
    inputs: str | Path | Sequence[str],
    *,
    target: str | None = None,
    processor: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
) -> Look:
    """
    See what the heads of a model look at: a SAS model's simulated heads beside the base head each is made of, and the
    heads of any model of Transformers that gives attention weights. Code that a checkpoint brings along is never run.

    Args:
        model: a checkpoint's folder, a Hub id, a peft adapter's, or a live model, which is left as it was found.
        inputs: a text; two texts, for encoders that read pairs; for a model of images, a file or an image of Pillow's.
        target: for encoder–decoders, the text that the decoder reads of its own; `None`: what it writes by itself.
        processor: the tokenizer or image processor; `None`: the model's own, beside its weights.

    Returns:
        a [`Look`]: the numbers, `save(path)` for the page, and the page itself in a notebook.

    Raises:
        ValueError: for a model that Transformers does not know, has no tokenizer or image processor, or gives no
            attention weights; for inputs that it cannot read, or that are too long for it or for a page, which holds
            2^26 weights.
        FileNotFoundError: for a missing folder, or a missing image.
    """
    given: list[Any] = [inputs] if isinstance(inputs, str) or not isinstance(inputs, Sequence) else list(inputs)
    if len(given) not in (1, 2):
        raise ValueError(f"`inputs` are {len(given)}; give one text or image, or two texts.")
    if not isinstance(model, PreTrainedModel | str | Path):
        raise ValueError(
            f"`model` is a {type(model).__name__}; give a folder, a Hub id or a model of Transformers (of peft's, "
            "what `merge_and_unload()` gives)."
        )
    if not isinstance(model, PreTrainedModel):
        name = str(model)
        model, own = _load(name)
        processor = processor or own
    else:
        name = model.name_or_path or type(model).__name__
        if processor is None and model.name_or_path:
            processor = load_processor(type(model), name, None)
    modalities = _modalities(model)
    _check_inputs(model, modalities, given, target)
    if processor is None:
        what = "image processor" if modalities == ("image",) else "tokenizer"
        raise ValueError(f"There is no {what} with {name!r}; pass one as `processor`, or save it there.")
    if modalities == ("image",):
        arguments, side = read_image(model, cast(BaseImageProcessor, processor), given[0])
        sides = {"source": side}
    else:
        arguments, sides = read_texts(model, cast(PreTrainedTokenizerBase, processor), given, target)
    _check_size(model, max(len(side.labels) for side in sides.values()))
    places = collect(model, arguments)
    if modalities == ("image",):
        add_prefix(side, places[0].weights.shape[-1])
    for place in places:
        shape, expected = place.weights.shape[-2:], (len(sides[place.rows].labels), len(sides[place.columns].labels))
        if tuple(shape) != expected:
            raise ValueError(
                f"`model` is a {type(model).__name__}, whose attention weights are {tuple(shape)} where the inputs "
                f"are {expected} tokens; it cannot be shown beside them."
            )
    return Look(name, type(model).__name__, places, sides)


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | BaseImageProcessor | None]:
    """A checkpoint as the class that it was saved with, and its tokenizer or image processor."""
    adapter = read_adapter(name)
    place, revision = adapter or (name, None)
    model_class = saved_class(place, revision)
    config = load_config(place, revision)
    model = load_model(model_class, place, revision, config=config, use_safetensors=None)[0]
    processor = load_processor(type(model), name, None) or load_processor(type(model), place, revision)
    if adapter is not None:
        model = merge(model, name, None)
    return model.eval(), processor


def _modalities(model: PreTrainedModel) -> tuple[str, ...]:
    said = model.input_modalities
    found = (said,) if isinstance(said, str) else tuple(said)
    if found not in (("text",), ("image",)) or model.main_input_name not in ("input_ids", "pixel_values"):
        raise ValueError(
            f"`model` is a {type(model).__name__}, which reads {' and '.join(found)} ({model.main_input_name}); "
            "models of texts and models of images can be looked at."
        )
    return found


def _check_inputs(model: PreTrainedModel, modalities: tuple[str, ...], given: list, target: str | None) -> None:
    kind = type(model).__name__
    if target is not None and not model.config.is_encoder_decoder:
        raise ValueError(f"`target` is {target!r}, but {kind} has no decoder beside an encoder; leave it out.")
    if modalities == ("image",):
        if len(given) > 1:
            raise ValueError(f"`inputs` are two, but {kind} reads one image.")
        return
    for text in given:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"`inputs` has {text!r}; {kind} reads texts that are not empty.")
        if os.path.isfile(text):
            raise ValueError(f"`inputs` has {text!r}, which is a file; {kind} reads texts: give the text itself.")
    causal = getattr(model.config, "is_causal", None) or "CausalLM" in kind or kind.endswith("LMHeadModel")
    if len(given) > 1 and (model.config.is_encoder_decoder or causal):
        raise ValueError(f"`inputs` are two texts, but {kind} reads no pairs, as encoders do; give one text.")


def _check_size(model: PreTrainedModel, tokens: int) -> None:
    """Before the forward pass, by what the model says of its layers and heads."""
    layers = [layer for layer in model.modules() if isinstance(layer, SASAttention)]
    if layers:
        heads = sum(
            layer.num_heads * (1 + layer.num_simulated_groups if layer.config.simulates else 1) for layer in layers
        )
    else:
        config = model.config
        heads = getattr(config, "num_hidden_layers", 1) * getattr(config, "num_attention_heads", 1)
        heads *= 3 if config.is_encoder_decoder else 1
    if heads * tokens**2 > LARGEST:
        raise ValueError(
            f"`inputs` is {tokens} tokens long, too many for a page: with the {heads:,} heads of all layers that is "
            f"{heads * tokens**2:,} attention weights, and a page holds {LARGEST:,}; give at most "
            f"{int((LARGEST / heads) ** 0.5)} tokens."
        )
