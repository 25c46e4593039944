"""Adapters and their base in, one plain checkpoint out; and which class a checkpoint of any architecture is of."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, FEATURE_EXTRACTOR_NAME, GENERATION_CONFIG_NAME, PROCESSOR_NAME

from ..report.files import one_at_a_time
from .belongings import find_licences
from .card import TERMS, read_card
from .checkpoints import (
    CARD_NAME,
    classes_made_by,
    load_adapter,
    load_model,
    load_preparation,
    load_tokenizer,
    new_folder,
    optional_file,
    read_adapter,
    read_object,
    read_settings,
    refuse_existing,
    required_file,
    save_model,
)
from .sentence_modules import copy_sentence_modules, find_sentence_modules


# By peft's `task_type`, what the adapters were trained as; other types are of the base's own class.
CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
LAST_OF_HEADS = ("classifier.weight", "score.weight", "out_proj.weight", "qa_outputs.weight")


@one_at_a_time("output")
def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Write the checkpoint that a peft adapter and its base model are together: of any architecture that Transformers
    has, SAS models among them, in the base's dtype.

    Tokenizer, image processor and generation configuration come along: the adapter's own where it has them, else the
    base's. The folder is written aside and renamed when it is complete. No code of either is run.

    Args:
        adapter: folder or Hub id of the adapter, which names its base.
        output: the new folder; must not exist, or be empty.
        revision: branch, tag or commit of an adapter on the Hub.
        progress: called with a line of text at each stage.

    Raises:
        FileExistsError: if `output` holds something.
        BlockingIOError: while another process writes it.
        FileNotFoundError: if there is no such adapter, or no base.
        ValueError: if there is no adapter, one that cannot be merged, or weights that are damaged or do not fit.
        OSError: if the base has no safetensors weights, or the disk is full. Nothing is left behind in any of these
            cases.
    """
    output = Path(output)
    refuse_existing(output)
    named = read_adapter(adapter, revision)
    if named is None:
        read_settings(adapter, revision)  # says what is missing
        raise ValueError(f"{adapter} holds a model and no adapter ({ADAPTER_CONFIG_NAME}) that could be merged.")
    base, base_revision = named
    settings = read_settings(base, base_revision)
    if settings.get("quantization_config"):
        raise ValueError(f"{base} is quantised; name the model that it was made from as the adapter's base.")
    trained = read_object(required_file(adapter, ADAPTER_CONFIG_NAME, revision))
    model_class = _class_of(trained, base, base_revision)
    find_sentence_modules(base, base_revision)  # says what is wrong with them before anything is loaded
    card = _card(model_class, str(adapter), str(base), read_card(base, base_revision))

    with new_folder(output) as folder:
        progress(f"Loading {adapter} and {base}")
        # A head that the base lacks, or has for other labels, comes with the adapter, or not at all.
        head = trained.get("modules_to_save") or ()
        labels: dict[str, Any] = _num_labels(adapter, revision) if head else {}
        model, _ = load_model(model_class, base, base_revision, new_head=head, **labels)
        merged = merge(model, adapter, revision)
        progress(f"Saving {output}")
        own = optional_file(adapter, GENERATION_CONFIG_NAME, revision) is not None
        save_model(merged, folder, *((adapter, revision) if own else (base, base_revision)))
        for preparation in _preparations(merged, adapter, revision):
            if preparation is not None:
                preparation.save_pretrained(folder)
        for name in (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME):  # of images and sound, as they are
            if not (folder / name).exists() and (file := optional_file(base, name, base_revision)) is not None:
                shutil.copyfile(file, folder / name)
        copy_sentence_modules(base, base_revision, folder)
        for file in find_licences(base, base_revision):
            shutil.copyfile(file, folder / file.name)
        card.save(folder / CARD_NAME)


def _class_of(trained: dict, base: str, revision: str | None) -> type:
    """What the adapters were trained as, by peft's settings, else what the base was saved as."""
    saved = saved_class(base, revision)
    auto_class = CLASSES.get(str(trained.get("task_type")))
    config_class = CONFIG_MAPPING[read_settings(base, revision)["model_type"]]
    if auto_class is not None and config_class in classes_made_by(auto_class):
        return auto_class
    named = (trained.get("auto_mapping") or {}).get("base_model_class")
    return getattr(transformers, str(named), saved)


def _num_labels(adapter: str | Path, revision: str | None) -> dict[str, int]:
    """How many classes the head has that comes with the adapter, for `from_pretrained`; none where it does not say."""
    from peft.utils import load_peft_weights

    weights = load_peft_weights(str(adapter), device="cpu", revision=revision)
    last = [weight for name, weight in weights.items() if name.endswith(LAST_OF_HEADS)]
    rows = {len(weight) for weight in last if weight.ndim == 2}
    return {"num_labels": rows.pop()} if len(rows) == 1 else {}


def _preparations(model: PreTrainedModel, adapter: str | Path, revision: str | None) -> tuple:
    if model.main_input_name in ("input_ids", "pixel_values"):
        return load_preparation(adapter, revision)
    return (load_tokenizer(adapter, revision),)


def merge(model: PreTrainedModel, adapter: str | Path, revision: str | None) -> PreTrainedModel:
    """The model with the adapters in its weights.

    Raises:
        ValueError: if peft cannot load or merge them, or if the merged model computes something else.
    """
    try:
        adapted = load_adapter(model, str(adapter), revision).eval()
        if not hasattr(adapted.base_model, "merge_and_unload"):
            kind = adapted.active_peft_config.peft_type
            raise ValueError(f"{adapter} holds adapters of the kind {kind}, which cannot be merged into weights.")
        inputs = _any_inputs(model)
        expected = None if inputs is None else _first_output(adapted, inputs)
        merged = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError, IndexError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"peft cannot merge {adapter}: {type(error).__name__}: {reason}") from error
    found = None if inputs is None else _first_output(merged, inputs)
    if found is None or expected is None:
        warnings.warn(f"{adapter}: what was merged could not be run for comparison.", stacklevel=2)
        return merged
    difference, most = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= max(1e-3, 10 * torch.finfo(merged.dtype).eps) * most:
        raise ValueError(
            f"{adapter} and its base give other numbers once they are merged (off by {difference:.3g} of {most:.3g}): "
            "adapters of one side of weights that are tied (`tie_word_embeddings`) cannot be merged, for instance."
        )
    return merged


def _any_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """What the model can be run on; `None` where it reads neither text nor images."""
    draw = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (1, 12), generator=draw).to(model.device)
        return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else {})
    size = getattr(model.config, "image_size", None)
    if model.main_input_name != "pixel_values" or size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.rand(1, getattr(model.config, "num_channels", 3), height, width, generator=draw)
    return {"pixel_values": pixels.to(model.device, model.dtype)}


@torch.no_grad()
def _first_output(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """`None` where the model takes other inputs."""
    try:
        output = model(**inputs)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return None
    return next((value.float() for value in output.values() if isinstance(value, torch.Tensor)), None)


def saved_class(source: str | Path, revision: str | None = None) -> Any:
    """The class that a checkpoint was saved with (AutoModel, where it names none); no weights are read.

    Raises:
        ValueError: if Transformers does not know it; code of the checkpoint is not run.
    """
    settings = read_settings(source, revision)
    model_type, saved = settings.get("model_type"), settings.get("architectures") or []
    model_class = getattr(transformers, saved[0], None) if saved else AutoModel
    if model_type in CONFIG_MAPPING and model_class is not None:
        return model_class
    what = f"`model_type` {model_type!r}" if model_type not in CONFIG_MAPPING else f"a {saved[0]}"
    remedy = "is there a newer one?"
    if "auto_map" in settings:
        remedy = (
            "the code that it brings along is not run. Load it yourself, with trust_remote_code=True if you do "
            "trust it, and go on with the live model."
        )
    raise ValueError(f"{source} has {what}, which Transformers {transformers.__version__} does not know; {remedy}")


def _card(model_class: type, adapter: str, base: str, base_card: ModelCard | None) -> ModelCard:
    of = base if not Path(base).is_dir() else None
    carried = {} if base_card is None else {name: getattr(base_card.data, name, None) for name in TERMS}
    data = ModelCardData(
        library_name="transformers",
        base_model=of,
        base_model_relation="finetune" if of else None,
        **{name: value for name, value in carried.items() if value is not None},
    )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {Path(adapter).name}, merged\n\n"
        f"The adapter `{Path(adapter).name}` in the weights of `{Path(base).name}`, made by `sas-hf merge`; it loads "
        f"by `{model_class.__name__}`.\n"
    )
