"""What a source holds: its class, its weights as they are stored, and what of it a conversion cannot take along.

A conversion is exact to the whole source, so every weight in its files must be one of its class's. Transformers leaves
out what its classes do not know, with a line in the log at most.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    cached_file,
    has_file,
)

from ..hub.belongings import source_files
from ..hub.checkpoints import CARD_NAME, REPORT_NAME, load_model, optional_file, read_settings
from .family import ConversionError, SourceFamily
from .live import pooler_arguments, refuse_own_head


TOKENIZER_PARTS = {  # of which tokenizer.json and tokenizer_config.json hold all
    "added_tokens.json",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
}
# Tensors that older versions saved and that are computed today: causal masks, positions, token types (zeros), rotary
# frequencies.
COMPUTED = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|(position|token_type)_ids|rotary_emb\.inv_freq)$")
HEADS = re.compile(
    r"^(lm_head|score|classifier|cls_classifier|distillation_classifier|qa_outputs|decoder|cls|pre_classifier|"
    r"vocab_\w+)\."
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredWeights:
    """The weights in a checkpoint's files, by their names there; only the files' headers are read.

    Args:
        dtypes: name → safetensors' name of the dtype.
        numbers: how many numbers all hold.
    """

    dtypes: Mapping[str, str]
    numbers: int

    @property
    def has_pooler(self) -> bool:
        return any(re.search(r"(^|\.)pooler\.", name) for name in self.dtypes)

    def count_dtypes(self) -> dict[str, int]:
        """How many weights are stored in each dtype."""
        counts = Counter(str(DTYPES[dtype]).removeprefix("torch.") for dtype in self._weight_dtypes().values())
        return dict(counts.most_common())

    def widest_dtype(self, config: PreTrainedConfig) -> torch.dtype:
        """The narrowest dtype that holds all weights as they are stored, and is no narrower than the configuration's.

        Raises:
            ConversionError: for weights that are not stored as plain floating-point numbers.
        """
        weights = self._weight_dtypes()
        for name, dtype in weights.items():
            if dtype not in DTYPES:
                raise ConversionError(
                    f"{name} is stored as {dtype}, as a quantised weight is; convert the model it was made from "
                    f"(weights in {', '.join(DTYPES)})."
                )
        own = [config.dtype] if isinstance(config.dtype, torch.dtype) else []
        return reduce(torch.promote_types, [*{DTYPES[dtype] for dtype in weights.values()}, *own])

    def _weight_dtypes(self) -> dict[str, str]:
        return {name: dtype for name, dtype in self.dtypes.items() if not COMPUTED.search(name)}


def check_weights(source: str | Path, revision: str | None) -> None:
    """Raise an error if the safetensors weights are missing, damaged or pickles, or if the source is an adapter; of a
    Hub source only whether there are any is asked."""
    if optional_file(source, ADAPTER_CONFIG_NAME, revision) is not None:
        raise ConversionError(
            f"{source} holds a peft adapter ({ADAPTER_CONFIG_NAME}); merge it first, `sas-hf merge {source} OUT`, "
            "and convert what that gives."
        )
    if Path(source).is_dir():
        read_stored_weights(source, revision)
    elif not any(has_file(source, name, revision) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise _no_weights(source, SAFE_WEIGHTS_NAME, has_file(source, WEIGHTS_NAME, revision))


def read_stored_weights(source: str | Path, revision: str | None) -> StoredWeights:
    """What is in the safetensors files of a checkpoint; those of a Hub source are downloaded.

    Raises:
        FileNotFoundError: if a file is missing.
        ConversionError: if one is damaged, a weight is there twice, or there is none.
    """
    dtypes, numbers = {}, 0
    for file in _weight_files(source, revision):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in list(tensors.keys()):
                    if name in dtypes:
                        raise ConversionError(f"{source} holds {name} twice, the second time in {file.name}.")
                    part = tensors.get_slice(name)
                    dtypes[name] = part.get_dtype()
                    numbers += torch.Size(part.get_shape()).numel()
        except SafetensorError as error:
            raise ConversionError(f"{file} is damaged or truncated ({error}); download or save it again.") from error
    if not dtypes:
        raise ConversionError(f"{file} holds no weights; download or save it again.")
    return StoredWeights(dtypes, numbers)


def _weight_files(source: str | Path, revision: str | None) -> list[Path]:
    index, single = (optional_file(source, name, revision) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
    if index is None:
        if single is None:
            pickled = Path(source).is_dir() and any(Path(source).glob("*.bin"))
            raise _no_weights(source, SAFE_WEIGHTS_NAME, pickled)
        return [single]
    if single is not None:
        raise ConversionError(
            f"{source} has both {SAFE_WEIGHTS_NAME} and {SAFE_WEIGHTS_INDEX_NAME}, and only the former would be read; "
            "remove the one that is not meant."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(
            f"{index} is damaged: it has no readable `weight_map` ({error}); download or save it again."
        ) from error
    files = []
    for name in names:
        file = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is None:
            raise _no_weights(source, name, pickled=Path(source).is_dir() and any(Path(source).glob("*.bin")))
        files.append(Path(file))
    return files


def _no_weights(source: str | Path, file: str, pickled: bool) -> FileNotFoundError:
    reason = " (only a pickle, which could run code when loaded)" if pickled else ""
    return FileNotFoundError(f"{source} has no {file}{reason}; safetensors weights are needed.")


def check_space(nearest: Path, numbers: int, dtype: torch.dtype) -> None:
    """Raise an `OSError` unless the folder `nearest` has room for so many weights."""
    size, free = numbers * dtype.itemsize, shutil.disk_usage(nearest).free
    if free < 1.02 * size:
        raise OSError(f"The result needs about {size / 1e6:.0f} MB, but {nearest} has {free / 1e6:.0f} MB free.")


def named_architectures(config: PreTrainedConfig, family: SourceFamily) -> list[str]:
    """The convertible classes that a configuration names; all of its family if it names none.

    Raises:
        ConversionError: if it names others only.
    """
    named = [config.architectures] if isinstance(config.architectures, str) else config.architectures
    if not named:
        return list(family.architectures)
    known = [name for name in dict.fromkeys(named) if name in family.architectures]
    if not known:
        names, body = ", ".join(map(str, named)), next(iter(family.architectures))
        # A decoder alone shares too little with a body: what it lacks would be random.
        save = f" Convert its body: `{body}.from_pretrained(SOURCE).save_pretrained(FOLDER)`, tokenizer beside it."
        raise ConversionError(
            f"`architectures` names {names}, which has no SAS counterpart; convertible are "
            f"{', '.join(family.architectures)}.{'' if 'CausalLM' in names else save}"
        )
    return known


def source_class(
    source: str | Path, config: PreTrainedConfig, family: SourceFamily, stored: StoredWeights
) -> type[PreTrainedModel]:
    """The Transformers class that a checkpoint is of, never code from it: the one that its configuration names or, if
    it names none or several, the only one that has the heads in its files.

    Raises:
        ConversionError: if it names others, or if that leaves the choice open.
    """
    named = named_architectures(config, family)
    fitting = named if len(named) == 1 else [name for name in named if _has_heads(name, config, family, stored.dtypes)]
    if len(fitting) != 1:
        said = f"names {', '.join(config.architectures)}" if config.architectures else "is not given"
        raise ConversionError(
            f"`architectures` in the {CONFIG_NAME} of {source} {said}, and the weights there fit "
            f"{' and '.join(fitting) or 'none of ' + ', '.join(named)}; write there which one it is, for instance "
            f'"architectures": ["{(fitting or named)[0]}"].'
        )
    return getattr(transformers, fitting[0])


def _has_heads(architecture: str, config: PreTrainedConfig, family: SourceFamily, stored: Iterable[str]) -> bool:
    """Whether the stored weights besides the body are those of this class's heads."""
    model_class = getattr(transformers, architecture)
    with torch.device("meta"):
        names = model_class(config).state_dict().keys()
    body = f"{model_class.base_model_prefix}."
    # GPT-NeoX's head has another name on disk; Transformers renames it too.
    stored = {re.sub(r"^embed_out\.", "lm_head.", name) for name in stored if not COMPUTED.search(name)}
    if family.unread is not None:
        stored = {name for name in stored if not re.search(family.unread, name)}
    if not any(name.startswith(body) for name in names):  # the body alone, whose own weights may be renamed on disk
        return not any(name.startswith(body) or (HEADS.match(name) and name not in names) for name in stored)
    own = {name for name in names if not name.startswith(body)}
    rest = {name for name in stored if not name.startswith(body) and body + name not in names}
    tied = model_class._tied_weights_keys or {} if getattr(config, "tie_word_embeddings", False) else {}
    optional = {*tied, *(model_class._keys_to_ignore_on_load_missing or ())}
    return own - optional <= rest <= own


def load_whole_model(
    model_class: type[PreTrainedModel],
    source: str | Path,
    revision: str | None,
    config: PreTrainedConfig,
    stored: StoredWeights,
    unread: str | None = None,
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """The model with every weight of its files as it is stored there, the names of those that it computes itself, and
    of those that are left out.

    Args:
        unread: pattern of the names that may be left out.

    Raises:
        ConversionError: if weights are damaged, missing or misshapen, or if another would be left out.
    """
    body = f"{model_class.base_model_prefix}."
    names = Counter(name.removeprefix(body) for name in stored.dtypes)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ConversionError(f"{source} holds {twice[0]} and {body}{twice[0]}, which are one weight; remove one.")
    model, unexpected = load_model(
        model_class,
        source,
        revision,
        ConversionError,
        dtype=stored.widest_dtype(config),
        **pooler_arguments(model_class, without=not stored.has_pooler),
    )
    unexpected = [name for name in unexpected if not COMPUTED.search(name)]
    foreseen = [name for name in unexpected if unread is not None and re.search(unread, name)]
    left_out = [name for name in unexpected if name not in foreseen]
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        raise ConversionError(
            f"{source} holds weights that {model_class.__name__} has no place for, with this {CONFIG_NAME}: "
            f"{', '.join(left_out[:5])}{more}. Mend the {CONFIG_NAME} (`architectures`, `num_hidden_layers`, biases); "
            f"or, if they do not belong to it, leave them out: {model_class.__name__}.from_pretrained(SOURCE)"
            ".save_pretrained(FOLDER)."
        )
    refuse_own_head(model)
    return model, sorted(name for name in stored.dtypes if COMPUTED.search(name)), foreseen


def unknown_fields(source: str | Path, revision: str | None, config: PreTrainedConfig) -> dict:
    """Fields of a source's config.json that its class in the installed Transformers does not know, and so ignores."""
    known = {*type(config).__dataclass_fields__, *type(config).attribute_map, "auto_map", "model_type"}
    return {
        name: value
        for name, value in read_settings(source, revision).items()
        if name in vars(config) and name not in known and not name.startswith("_")
    }


def files_left_out(source: str | Path, revision: str | None, output: Path) -> list[str] | None:
    """What of a source's files and folders has no counterpart in `output`; `None` where the Hub cannot be asked.

    Weights, the card and what is the same in another form (a slow tokenizer's files) count as carried.
    """
    names = source_files(source, revision)
    if names is None:
        return None
    carried = {file.name + "/" * file.is_dir() for file in output.iterdir()} | {
        CARD_NAME,
        REPORT_NAME,
        SAFE_WEIGHTS_INDEX_NAME,
    }
    if "tokenizer.json" in carried:
        carried |= TOKENIZER_PARTS
    own = {name.partition("/")[0] + ("/" if "/" in name else "") for name in names}
    own = {"*.py" if name.endswith(".py") else name for name in own}  # code, which is never carried, counts as one
    shards = re.compile(r"model(-\d+-of-\d+)?\.safetensors$")
    return sorted(name for name in own - carried if not shards.match(name) and not name.startswith("."))
