"""Adapters and their base in, one plain checkpoint out; and which class a checkpoint of any architecture is of."""

from collections.abc import Callable
from pathlib import Path

import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, GENERATION_CONFIG_NAME

from ..report.files import one_at_a_time
from .checkpoints import (
    CARD_NAME,
    load_adapter,
    load_model,
    load_preparation,
    new_folder,
    optional_file,
    read_adapter,
    read_object,
    read_settings,
    refuse_existing,
    required_file,
    save_model,
)


# By peft's `task_type`, what the adapters were trained as; other types are of the base's own class.
CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}


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
    model_class = CLASSES.get(trained.get("task_type") or "") or saved_class(base, base_revision)

    with new_folder(output) as folder:
        progress(f"Loading {adapter} and {base}")
        # A head that the base lacks comes with the adapter, or not at all.
        model, _ = load_model(model_class, base, base_revision, new_head=trained.get("modules_to_save") or ())
        merged = merge(model, adapter, revision)
        progress(f"Saving {output}")
        own = optional_file(adapter, GENERATION_CONFIG_NAME, revision) is not None
        save_model(merged, folder, *((adapter, revision) if own else (base, base_revision)))
        for preparation in load_preparation(adapter, revision):
            if preparation is not None:
                preparation.save_pretrained(folder)
        _card(merged, str(adapter), str(base)).save(folder / CARD_NAME)


def merge(model: PreTrainedModel, adapter: str | Path, revision: str | None) -> PreTrainedModel:
    """The model with the adapters in its weights."""
    adapted = load_adapter(model, str(adapter), revision)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type
        raise ValueError(f"{adapter} holds adapters of the kind {kind}, which cannot be merged into weights.")
    return adapted.merge_and_unload(safe_merge=True)


def saved_class(source: str | Path, revision: str | None = None) -> type:
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


def _card(model: PreTrainedModel, adapter: str, base: str) -> ModelCard:
    of = base if not Path(base).is_dir() else None
    data = ModelCardData(library_name="transformers", base_model=of, base_model_relation="finetune" if of else None)
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {Path(adapter).name}, merged\n\n"
        f"A {type(model).__name__}: the adapter `{Path(adapter).name}` in the weights of `{Path(base).name}`, made by "
        f"`sas-hf merge`.\n"
    )
