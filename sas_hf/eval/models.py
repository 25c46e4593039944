"""What is evaluated: a checkpoint, a live model or a peft adapter, looked over before any weights are read."""

import copy
import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ADAPTER_CONFIG_NAME

from ..hub.checkpoints import find_commit, load_config, optional_file, read_adapter
from ..hub.places import check_place, nearest_folder
from .harness import check_vocabulary, require_causal


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass
class Subject:
    """
    A model that can be evaluated.

    Attributes:
        name: as the user gave it, the class of a live model.
        source: a live model, a Hub id, or an absolute path, which cannot be taken for a Hub id.
        config: of the model.
        tokenizer: its own copy; the harness may give it a padding token.
        adapter: folder or Hub id of a peft adapter to put on `source`.
        commit: on the Hub, of which the configuration was looked over.
    """

    name: str
    source: str | PreTrainedModel
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    adapter: str | None = None
    commit: str | None = None

    @property
    def live(self) -> bool:
        return isinstance(self.source, torch.nn.Module)


def inspect_model(
    model: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    adapter: str | Path | None = None,
) -> Subject:
    """
    Look a model over: configuration, kind, weights' presence, tokenizer.

    Args:
        model: a checkpoint's folder, a Hub id or a live model; also a peft adapter's folder or Hub id, which
            stands for its base model with the adapter on it.
        tokenizer: the model's own where `None`: beside the adapter or the weights, for a live model where it was
            loaded from.
        adapter: a peft adapter to put on `model`.

    Raises:
        ValueError: a model, tokenizer or adapter that cannot be evaluated.
        FileNotFoundError: missing folder, configuration or weights.
        ImportError: an adapter without peft.
    """
    if isinstance(model, torch.nn.Module):
        if adapter is not None:
            raise ValueError("`adapter` is given with a live model; put it on the model yourself (`PeftModel`).")
        if not getattr(model, "can_generate", lambda: True)():
            raise ValueError(
                f"`model` is a {type(model).__name__}, which has no language model head; load the checkpoint with "
                "`AutoModelForCausalLM`."
            )
        require_causal(model.config, live=True)
        found = _load_tokenizer(tokenizer, model.config, model.config.name_or_path or "")
        base = get_base_model() if (get_base_model := getattr(model, "get_base_model", None)) else model
        name = type(base).__name__ + (" with adapter" if base is not model else "")
        return Subject(name, model, model.config, found)

    name = str(model) if adapter is None else f"{model} with {adapter}"
    place, revision = _check_place("model", model), None
    if adapter is None and (named := read_adapter(place)) is not None:
        adapter, (base, revision) = place, named
        place = _check_place("model", base)
    elif adapter is not None:
        adapter = _check_place("adapter", adapter)
        if optional_file(adapter, ADAPTER_CONFIG_NAME) is None:
            raise ValueError(f"`adapter` is {adapter!r}, where there is no adapter_config.json of peft's.")
    if adapter is not None:
        if importlib.util.find_spec("peft") is None:
            raise ImportError(f"{adapter} is a peft adapter, and peft is not installed: pip install peft")
        _require_files(adapter, "an adapter's weights", ADAPTER_WEIGHTS)
    _require_files(place, "configuration", ("config.json",))
    config = _load_config(place, revision)
    require_causal(config)
    _require_files(place, "weights", WEIGHTS)
    _require_head(place, config)
    found = _load_tokenizer(tokenizer, config, place, adapter, revision)
    return Subject(name, place, config, found, adapter, find_commit(place, revision))


@contextmanager
def left_as_found(model: torch.nn.Module | None) -> Iterator[None]:
    """Evaluation seeds every generator and sets a model to evaluation; undo both, for evaluating during training."""
    training = [module for module in model.modules() if module.training] if model is not None else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module in training:
            module.training = True


def _check_place(field: str, place: str | Path) -> str:
    """An absolute path, or a Hub id."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    try:
        if isinstance(place, Path):  # and so no id of the Hub
            raise FileNotFoundError(f"{place} does not exist{nearest_folder(folder)}.")
        check_place(place)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`{field}`: {error}") from error
    return str(place)


def _load_config(place: str, revision: str | None) -> PreTrainedConfig:
    try:
        return load_config(place, revision)
    except OSError as error:
        if Path(place).is_dir():
            raise
        raise OSError(f"`model` is {place!r}: there is no such folder, and as a Hub id it fails: {error}") from error


def _require_files(place: str, kind: str, expected: tuple[str, ...]) -> None:
    if Path(place).is_dir() and not any((Path(place) / name).is_file() for name in expected):
        raise FileNotFoundError(f"`model` is {place!r}, a folder without {kind} ({' or '.join(expected)}).")


def _require_head(place: str, config: PreTrainedConfig) -> None:
    """Loading a checkpoint of another head would start the language model's at random."""
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _tuple(names)}
    saved = config.architectures or []
    if saved and not any(name in known or name.endswith(("ForCausalLM", "LMHeadModel")) for name in saved):
        raise ValueError(
            f"`model` is {place!r}, which holds a {', '.join(saved)}: its weights have no causal language model head; "
            "`sas-hf eval` scores others by `--texts`, `--masked-text`, `--images` or `--pairs`."
        )


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _load_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
    config: PreTrainedConfig,
    place: str,
    adapter: str | None = None,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """`place` is the model's, of which `revision` is."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)
    else:
        places = [_check_place("tokenizer", tokenizer)] if tokenizer else [name for name in (adapter, place) if name]
        # An adapter's folder need not have one, then its base does; what a Hub id holds is seen when it is read.
        folders = [place for place in places if Path(place).is_dir()]
        with_tokenizer = [place for place in folders if any((Path(place) / name).is_file() for name in TOKENIZERS)]
        remote = [place for place in reversed(places) if place not in folders]
        chosen = next(iter(with_tokenizer + remote), None)
        if chosen is None:
            raise ValueError(
                f"There is no tokenizer in {(places or [''])[-1]!r}; pass one as `tokenizer`, or save it there with "
                "`tokenizer.save_pretrained`."
            )
        of_place = revision if chosen == place else None
        tokenizer = AutoTokenizer.from_pretrained(chosen, revision=of_place, trust_remote_code=False)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has neither `bos_token` nor `eos_token`; the evaluation begins a text without context "
            "with one of them. Set the one that separated documents in training."
        )
    check_vocabulary(tokenizer, config, adapter)
    return tokenizer
