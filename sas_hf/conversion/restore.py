"""The way back: a SAS checkpoint whose simulation still changes nothing becomes a checkpoint of its source's kind."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers import initialization as init

from .. import modeling
from ..hub.card import read_card, restoration_card
from ..hub.checkpoints import (
    CARD_NAME,
    REPORT_NAME,
    check_vocabulary,
    load_processor,
    new_folder,
    read_report,
    read_settings,
)
from ..hub.sentence_modules import find_sentence_modules
from ..report.files import one_at_a_time
from .checkpoint import check_output, comparison_report
from .convert import FAMILIES
from .family import ConversionError
from .live import pooler_arguments
from .samples import check_samples, verification_samples
from .sources import check_space, check_weights, files_left_out, load_whole_model, read_stored_weights
from .written import verify_written, write_checkpoint


LABELS = ("id2label", "label2id", "problem_type")  # fine-tuning may have given other ones


@one_at_a_time("output", check=check_output)
def restore_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    text: str | None = None,
    images: str | Path | None = None,
    windows: int = 8,
    window_length: int = 256,
    progress: Callable[[str], None] = lambda message: None,
) -> dict:
    """Write a converted checkpoint in its source's architecture, without its simulation.

    What the simulation was trained to do has no place there: it must still be function-preserving, as a conversion
    makes it, whatever else was trained. What was written is loaded again and its outputs are compared in float32 to
    the tolerance of a conversion.

    Args:
        checkpoint: a local folder or Hub id that `convert_checkpoint` wrote, or one fine-tuned from it that still has
            its `fidelity.json`.
        output: the new checkpoint folder; must not exist, or be empty.
        revision: branch, tag or commit of a Hub repository.
        text, images, windows, window_length: to verify on, as in `convert_checkpoint`.
        progress: called with a line of text at each stage.

    Returns:
        the report, also written to `fidelity.json`.

    Raises:
        FileExistsError: if `output` holds something.
        BlockingIOError: while another process writes it.
        FileNotFoundError: if `checkpoint` has no configuration or no weights.
        ConversionError: if it is no conversion, a lossy one, damaged, or its simulation changes the outputs.
    """
    started, output = time.monotonic(), Path(output)
    nearest = check_output(output)
    sas_class, record = _read_record(checkpoint, revision)
    check_samples(sas_class, text, images, windows, window_length)
    check_weights(checkpoint, revision)
    sentence_modules = find_sentence_modules(checkpoint, revision, ConversionError)
    sas_card = read_card(checkpoint, revision)
    config = sas_class.config_class.from_pretrained(checkpoint, revision=revision)
    processor = load_processor(sas_class, checkpoint, revision)
    if hasattr(config, "vocab_size") and processor is not None:
        check_vocabulary(processor, config.vocab_size, checkpoint)
    samples, verified_on = verification_samples(
        sas_class, config, processor, text, images, windows, window_length, seed=0
    )

    progress(f"Loading {checkpoint}")
    stored = read_stored_weights(checkpoint, revision)
    dtype = stored.widest_dtype(config)
    check_space(nearest, stored.numbers, dtype)
    model, _, _ = load_whole_model(sas_class, checkpoint, revision, config, stored)

    progress("Removing the simulation")
    restored = restore_model(model, record["source_config"], record["source_architecture"])
    source_class = type(restored)

    with new_folder(output) as folder:
        progress(f"Saving {output}")
        write_checkpoint(restored, folder, dtype, processor, checkpoint, revision)
        del restored

        progress("Comparing both models")
        verification = verify_written(folder, source_class, model, samples, dtype)
        fidelity = verification.fidelity
        if not fidelity.is_exact:
            apart = f"{fidelity.max_abs_difference:.3g} (allowed: {fidelity.tolerance:.3g}"
            if fidelity.mean_kl is not None:
                apart += f", mean KL {fidelity.mean_kl:.3g}, arg-max agreement {fidelity.argmax_agreement:.2%}"
            raise ConversionError(
                f"The simulation of {checkpoint} has been trained: without it the outputs differ by up to {apart}). "
                f"{source_class.__name__} has no place for it. Nothing was written."
            )
        report = comparison_report(
            checkpoint, revision, model, source_class, verification, verified_on, dtype, started
        ) | {
            "files_left_out": files_left_out(checkpoint, revision, folder),
            "sentence_modules": sentence_modules,
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        restoration_card(report, sas_card).save(folder / CARD_NAME)
    return report


def _read_record(checkpoint: str | Path, revision: str | None) -> tuple[type[PreTrainedModel], dict]:
    """The SAS class of a checkpoint and the report of its conversion; a [`ConversionError`] if it is none."""
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
    try:
        record = read_report(checkpoint, revision)
    except ValueError as error:
        raise ConversionError(f"{REPORT_NAME} is damaged: {error}") from error
    if record is None:
        raise ConversionError(
            f"{checkpoint} has no {REPORT_NAME}, so it was not converted from another model and has no source to go "
            "back to. (If it was fine-tuned from a conversion, copy that one's here.)"
        )
    lossy, config, architecture = (record.get(name) for name in ("lossy", "source_config", "source_architecture"))
    if lossy is not None:
        raise ConversionError(
            f"{checkpoint} comes from a lossy conversion ({lossy!r}): the source's attention is no longer in it."
        )
    family = FAMILIES.get(config.get("model_type")) if isinstance(config, dict) else None
    if family is None or architecture not in family.architectures:
        raise ConversionError(
            f"The {REPORT_NAME} of {checkpoint} does not say what was converted (`source_config`, "
            "`source_architecture`); convert the source again, with this version."
        )
    return sas_class, record


def restore_model(model: PreTrainedModel, source_config: dict, architecture: str) -> PreTrainedModel:
    """A model of the source's kind with the weights of a loaded SAS `model`, but for its simulation.

    Weights are shared where they are the same on both sides. Whether the two compute the same is not checked.

    Args:
        source_config: the source's configuration, as the report of a conversion holds it; what the SAS configuration
            says otherwise (a resized vocabulary, other labels) goes before.
        architecture: the source's class; another of its family if `model` has another head by now.

    Raises:
        ConversionError: if no class of the family has this head, or a weight has no place in it.
    """
    family = FAMILIES[source_config["model_type"]]
    if family.architectures[architecture] is not type(model):
        fitting = [name for name, sas_class in family.architectures.items() if sas_class is type(model)]
        if not fitting:
            raise ConversionError(f"No {family.model_type} class has the head of {type(model).__name__}.")
        architecture = fitting[0]
    kept = {name: getattr(model.config, name) for name in LABELS}
    config = AutoConfig.for_model(**source_config | family.source_fields(model.config) | kept)
    with init.no_init_weights():
        source_class = getattr(transformers, architecture)
        without_pooler = getattr(model.config, "pooler_act", ...) is None
        restored = source_class(config, **pooler_arguments(source_class, without_pooler))
    weights = {name: weight for name, weight in model.state_dict().items() if "_simulation." not in name}
    names = restored.state_dict().keys()
    weights = family.source_weights(weights, names, restored.base_model_prefix, config)
    for name, weight in restored.state_dict().items():
        if weight.shape != weights[name].shape:
            raise ConversionError(
                f"{name} has the shape {list(weights[name].shape)}, but {architecture} asks for {list(weight.shape)}."
            )
    if not getattr(config, "tie_word_embeddings", False):  # weights that are one here are two there
        first = {id(weight): name for name, weight in reversed(weights.items())}
        weights = {name: weight if first[id(weight)] == name else weight.clone() for name, weight in weights.items()}
    restored.load_state_dict(weights, assign=True)
    restored.tie_weights()
    restored.to(device=torch.device(model.device))  # buffers; in float32, whatever the weights are in
    if restored.can_generate():
        restored.generation_config = copy.deepcopy(model.generation_config)
    return restored.eval()
