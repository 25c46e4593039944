"""A SAS checkpoint in, a folder for the Hub out: weights, code and card, for readers with and without sas_hf."""

import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME

from .. import modeling
from ..modeling.sharing import add_code, auto_classes
from ..report.files import one_at_a_time
from .card import export_card, read_card
from .checkpoints import (
    CARD_NAME,
    REPORT_NAME,
    load_model,
    load_preparation,
    new_folder,
    optional_file,
    read_adapter,
    read_report,
    read_settings,
    refuse_existing,
    required_file,
    save_model,
)
from .merge import merge
from .sentence_modules import copy_sentence_modules, find_sentence_modules


@one_at_a_time("output")
def export_model(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Write a folder from which `AutoModel*.from_pretrained(output, trust_remote_code=True)` works without sas_hf.

    It holds the weights in the checkpoint's own dtype, the code of its architecture, tokenizer, image processor,
    generation configuration, the modules of sentence-transformers, fidelity report and a model card, and is complete
    for `hf upload`. Where sas_hf is imported, the installed classes are used and nothing of that code is run. The
    folder is written aside and renamed when it is complete.

    Args:
        source: a SAS checkpoint folder or Hub id, with safetensors weights; code in it is neither run nor copied. Of
            peft adapters, the model that they and their base are together is exported.
        output: the new folder; must not exist, or be empty.
        revision: branch, tag or commit of a Hub source.
        progress: called with a line of text at each stage.

    Raises:
        FileExistsError: if `output` holds something.
        BlockingIOError: while another process writes it.
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the source is no SAS model, or its weights, report or card are damaged or incomplete.
        OSError: if it has no safetensors weights, or the disk is full. Nothing is left behind in any of these cases.
    """
    output = Path(output)
    refuse_existing(output)
    adapter = read_adapter(source, revision)
    base, base_revision = adapter or (source, revision)
    find_class(base, base_revision)
    card, report = read_card(source, revision), read_report(source, revision)
    embeds = bool(find_sentence_modules(base, base_revision))

    with new_folder(output) as folder:
        progress(f"Loading {source}")
        model = load_whole(source, revision)
        tokenizer, processor = load_preparation(source, revision)

        progress(f"Saving {output}")
        has_settings = optional_file(source, GENERATION_CONFIG_NAME, revision) is not None  # as adapters of a run
        save_model(model, folder, *((source, revision) if has_settings else (base, base_revision)))
        add_code(folder, model, auto_classes(type(model.config)))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
            if _is_ours(type(processor)):  # one of Transformers' own needs no code
                add_code(folder, processor, {"AutoImageProcessor": type(processor)}, IMAGE_PROCESSOR_NAME)
        copy_sentence_modules(base, base_revision, folder)
        if report is not None:
            shutil.copyfile(required_file(source, REPORT_NAME, revision), folder / REPORT_NAME)
        name = Path(source).resolve().name if Path(source).is_dir() else str(source).rpartition("/")[2]
        if adapter and card is not None and card.data.get("base_model_relation"):
            card.data["base_model_relation"] = "finetune"  # no longer an adapter
        export_card(model, name, card, report, embeds).save(folder / CARD_NAME)


def load_whole(source: str | Path, revision: str | None, **options) -> PreTrainedModel:
    """The SAS model of a checkpoint, or the one that adapters and their base are together.

    Args:
        options: of `from_pretrained`; by default the checkpoint's own dtype.

    Raises:
        FileNotFoundError, ValueError, OSError: as [`export_model`].
    """
    adapter = read_adapter(source, revision)
    base, base_revision = adapter or (source, revision)
    model_class = find_class(base, base_revision)
    model, unknown = load_model(model_class, base, base_revision, **options)
    if unknown:
        raise ValueError(f"{base} holds weights unknown to {model_class.__name__}: {', '.join(unknown[:5])}.")
    return merge(model, source, revision) if adapter else model


def _is_ours(some_class: type) -> bool:
    return some_class.__module__.startswith(modeling.__name__ + ".")


def find_class(source: str | Path, revision: str | None) -> type[PreTrainedModel]:
    """The class named in the configuration, one that is registered with an Auto class; no weights are read."""
    settings = read_settings(source, revision)
    model_type, named = settings.get("model_type", ""), (settings.get("architectures") or [None])[0]
    known = model_type in CONFIG_MAPPING
    if not known or not _is_ours(CONFIG_MAPPING[model_type]):
        raise ValueError(
            f"{source} has `model_type` {model_type!r}; only SAS models are exported. Convert it first, with sas-hf "
            "convert."
        )
    config_class = CONFIG_MAPPING[model_type]
    classes = {made.__name__: made for name, made in auto_classes(config_class).items() if name != "AutoConfig"}
    if named not in classes:
        raise ValueError(f"`architectures` of {source} names {named}; it must be one of {', '.join(classes)}.")
    return classes[named]
