"""Checkpoints: looked at before anything is loaded, read without running their code, written whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    cached_file,
)

from .files import writing


REPORT_NAME = "fidelity.json"
CARD_NAME = "README.md"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def read_settings(source: str | Path, revision: str | None = None) -> dict:
    """What the `config.json` of the checkpoint in that folder or at that Hub id says.

    Raises:
        FileNotFoundError: if there is no such folder or checkpoint, or no configuration in it.
        ValueError: for a revision of a folder, which has none.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} holds adapters, and no model of its own; `sas-hf export {folder} OUT` makes one of them "
                "and their SAS model, peft's `merge_and_unload()` of any."
            )
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}; it is not a checkpoint folder.")
    if folder.is_dir() and revision is not None:
        raise ValueError(f"`revision` ({revision!r}) is of a repository on the Hub, but {folder} is a folder here.")
    # What cannot be a Hub id ("name" or "owner/name") is a path.
    is_path = folder.is_absolute() or str(source).startswith(".") or len(folder.parts) > 2
    if not folder.is_dir() and (folder.exists() or is_path):
        raise FileNotFoundError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}.")
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"{source} is no folder here, nor a checkpoint that the Hub gives: {str(error).splitlines()[0]}"
        ) from error
    return settings


def optional_file(source: str | Path, name: str, revision: str | None = None) -> Path | None:
    """A file of the checkpoint (from the cache when the Hub cannot be reached), or `None` if it has no such file."""
    found = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def read_report(source: str | Path, revision: str | None = None) -> dict | None:
    """The fidelity report of the checkpoint, or `None` if it has none.

    Raises:
        ValueError: if it is damaged.
    """
    file = optional_file(source, REPORT_NAME, revision)
    try:
        report = None if file is None else json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); mend or remove it.") from error
    if file is not None and not isinstance(report, dict):
        raise ValueError(f"{file} is no fidelity report, which is a JSON object; mend or remove it.")
    return report


def read_adapter(source: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """The base model of the peft adapters in that folder or at that Hub id, and its revision; `None` for others, and
    for a model with adapters beside it.

    Raises:
        FileNotFoundError: if the base is a folder that is not there.
    """
    if Path(source).is_dir() and (Path(source) / CONFIG_NAME).is_file():
        return None
    file = optional_file(source, ADAPTER_CONFIG_NAME, revision)
    if file is None:
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise FileNotFoundError(
            f"`base_model_name_or_path` in {file} is {base!r}, where no model is; if it has moved (the `base` of a "
            "run moves with its folder), write there where it is now."
        )
    return base, settings.get("revision")


def refuse_existing(output: Path) -> None:
    """Raise a `FileExistsError` unless `output` is free or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; choose another output.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well and vanishes when it does not."""
    path = path.absolute()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with writing(path):
            yield temporary
            temporary.chmod(0o755)  # mkdtemp's 0700 would keep others from reading a shared checkpoint
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_model(model: PreTrainedModel, folder: Path, source: str | Path, revision: str | None) -> None:
    """Save, with the source's generation configuration to the letter.

    Transformers loads generation configurations with contradictions, of which the Hub has many, but refuses to save
    them; what the source says is none of our business.
    """
    file = optional_file(source, GENERATION_CONFIG_NAME, revision)
    if model.can_generate() and file is not None:
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    if file is not None:
        shutil.copyfile(file, folder / GENERATION_CONFIG_NAME)


def load_model(
    model_class: type[PreTrainedModel],
    source: str | Path,
    revision: str | None,
    error_class: type[ValueError] = ValueError,
    *,
    new_head: bool = False,
    **options,
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of weights in the checkpoint that are not the model's.

    Args:
        model_class: or an Auto class.
        new_head: weights outside the base model that are missing or of another shape begin anew.
        options: of `from_pretrained`, such as `config`; the dtype is the checkpoint's own by default.

    Raises:
        ValueError: of `error_class`, if weights are damaged, missing, misshapen or not finite.
        OSError: if there are no safetensors weights.
    """
    try:
        model, loading = model_class.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, not as a RuntimeError
            output_loading_info=True,
            **{"dtype": "auto"} | options,
        )
    except SafetensorError as error:
        raise error_class(f"The weights of {source} are damaged ({error}); download or save them again.") from error
    inside = f"{model.base_model_prefix}."
    absent = sorted(name for name in loading["missing_keys"] if name.startswith(inside) or not new_head)
    if absent:
        raise error_class(f"{source} lacks weights of {type(model).__name__}: {', '.join(absent[:5])}.")
    misshapen = [weight for weight in loading["mismatched_keys"] if weight[0].startswith(inside) or not new_head]
    if misshapen:
        name, found, expected = min(misshapen)
        raise error_class(
            f"{source} holds {name} as {list(found)}, but its config.json asks for {list(expected)}; they do not "
            "belong together."
        )
    for name, weight in model.named_parameters():
        # Of a model that DeepSpeed shards as it loads, this process may hold nothing.
        if weight.numel() and not all(torch.isfinite(extreme) for extreme in weight.detach().aminmax()):
            raise error_class(f"{source} is damaged: {name} holds NaN or infinite numbers.")
    return model, sorted(loading["unexpected_keys"])


def load_processor(
    model_class: type[PreTrainedModel], source: str | Path, revision: str | None
) -> PreTrainedTokenizerBase | BaseImageProcessor | None:
    """What makes inputs for models of this class: an image processor or a tokenizer, or `None` if there is none."""
    load = load_image_processor if "image" in model_class.input_modalities else load_tokenizer
    return load(source, revision)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str | Path) -> None:
    """Raise a `ValueError` if a text can have tokens that a model of this size has no embeddings for.

    Special tokens may be beyond it: many tokenizers got a padding token that their model was never given, and some
    classes of Transformers add theirs to any.
    """
    beyond = sorted(
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= vocab_size and token not in tokenizer.all_special_tokens
    )
    if beyond:
        raise ValueError(
            f"The tokenizer of {source} has {len(beyond)} tokens beyond the model's `vocab_size` ({vocab_size}), the "
            f"first {beyond[0][1]!r} with number {beyond[0][0]}; take them out of it, or give the model embeddings "
            f"for them: model.resize_token_embeddings({beyond[-1][0] + 1})."
        )


def load_tokenizer(source: str | Path, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or `None` if it has none."""
    if not any(optional_file(source, name, revision) for name in TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    tokenizer.init_kwargs.pop("auto_map", None)
    return _without_code(tokenizer)


def load_image_processor(source: str | Path, revision: str | None) -> BaseImageProcessor | None:
    """The checkpoint's image processor, or `None` if it has none."""
    if not any(optional_file(source, name, revision) for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)):
        return None
    return _without_code(AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False))


def _without_code(processor):
    """A checkpoint's `auto_map` names code of its own, which is not carried along."""
    vars(processor).pop("auto_map", None)
    return processor
