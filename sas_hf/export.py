"""A SAS checkpoint in, a folder for the Hub out: weights, code and card, for readers with and without sas_hf."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME

from . import modeling
from .card import export_card, read_card
from .checkpoints import (
    CARD_NAME,
    REPORT_NAME,
    load_tokenizer,
    new_folder,
    optional_file,
    read_config,
    refuse_existing,
    save_model,
)
from .modeling.sharing import add_code, auto_classes


def export_model(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Write a folder from which `AutoModel*.from_pretrained(output, trust_remote_code=True)` works without sas_hf.

    It holds the weights in the checkpoint's own dtype, the code of its architecture, tokenizer, image processor,
    generation configuration, fidelity report and a model card, and is complete for `hf upload`. Where sas_hf is
    imported, the installed classes are used and nothing of that code is run. The folder is written aside and renamed
    when it is complete.

    Args:
        source: a SAS checkpoint folder or Hub id, with safetensors weights; code in it is neither run nor copied.
        output: the new folder; must not exist, or be empty.
        revision: branch, tag or commit of a Hub source.
        progress: called with a line of text at each stage.

    Raises:
        FileExistsError: if `output` holds something.
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the source is no SAS model, or its weights, report or card are damaged or incomplete.
        OSError: if it has no safetensors weights, or the disk is full. Nothing is left behind in any of these cases.
    """
    output = Path(output)
    refuse_existing(output)
    config = read_config(source, revision)
    model_class = _sas_class(config, source)
    card, report = read_card(source, revision), _read_report(source, revision)

    with new_folder(output) as folder:
        progress(f"Loading {source}")
        model = _load(model_class, source, revision)
        tokenizer = load_tokenizer(source, revision)

        progress(f"Saving {output}")
        save_model(model, folder, source, revision)
        add_code(folder, model, auto_classes(type(config)))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _export_image_processor(source, revision, folder)
        if report is not None:
            shutil.copyfile(optional_file(source, REPORT_NAME, revision), folder / REPORT_NAME)
        name = Path(source).resolve().name if Path(source).is_dir() else str(source).rpartition("/")[2]
        export_card(model, name, card, report).save(folder / CARD_NAME)


def _is_ours(some_class: type) -> bool:
    return some_class.__module__.startswith(modeling.__name__ + ".")


def _sas_class(config: PreTrainedConfig, source: str | Path) -> type[PreTrainedModel]:
    """The class named in the configuration, one that is registered with an Auto class."""
    if not _is_ours(type(config)):
        raise ValueError(
            f"{source} has `model_type` {config.model_type!r}; only SAS models are exported. Convert it first: "
            "sas-hf convert."
        )
    classes = {made.__name__: made for name, made in auto_classes(type(config)).items() if name != "AutoConfig"}
    named = (config.architectures or [None])[0]
    if named not in classes:
        raise ValueError(f"`architectures` of {source} names {named}; it must be one of {', '.join(classes)}.")
    return classes[named]


def _load(model_class: type[PreTrainedModel], source: str | Path, revision: str | None) -> PreTrainedModel:
    """The model in its own dtype, complete and finite."""
    try:
        model, loading = model_class.from_pretrained(
            source,
            revision=revision,
            dtype="auto",
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"The weights of {source} are damaged or truncated ({error}); save them again.") from error
    absent, unknown = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    for name, found, expected in loading["mismatched_keys"]:
        raise ValueError(
            f"`{name}` of {source} has shape {tuple(found)}; its configuration asks for {tuple(expected)}."
        )
    if absent:
        raise ValueError(f"{source} lacks weights of {model_class.__name__}: {', '.join(absent[:5])}.")
    if unknown:
        raise ValueError(f"{source} holds weights unknown to {model_class.__name__}: {', '.join(unknown[:5])}.")
    for name, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"`{name}` of {source} is not finite (NaN or infinite); the weights are damaged.")
    return model


def _read_report(source: str | Path, revision: str | None) -> dict | None:
    file = optional_file(source, REPORT_NAME, revision)
    try:
        return None if file is None else json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); mend or remove it.") from error


def _export_image_processor(source: str | Path, revision: str | None, folder: Path) -> None:
    """With its code, where it is one of ours; a processor of Transformers needs none."""
    if optional_file(source, IMAGE_PROCESSOR_NAME, revision) is None:
        return
    processor = AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    processor.save_pretrained(folder)
    if _is_ours(type(processor)):
        add_code(folder, processor, {"AutoImageProcessor": type(processor)}, IMAGE_PROCESSOR_NAME)
