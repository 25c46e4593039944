"""The way back: a SAS checkpoint whose simulation still changes nothing becomes a checkpoint of its source's kind."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import cached_file

from .. import modeling
from ..checkpoints import (
    REPORT_NAME,
    load_model,
    load_processor,
    new_folder,
    read_settings,
    save_model,
)
from ..files import one_at_a_time
from .checkpoint import check_output, check_weights, comparison_report, own_weights
from .convert import FAMILIES
from .family import ConversionError
from .fidelity import compare_models
from .samples import verification_samples


LABELS = ("id2label", "label2id", "problem_type")  # fine-tuning may have given other ones


@one_at_a_time("output")
def restore_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    text: str | None = None,
    images: Path | None = None,
    windows: int = 8,
    window_length: int = 256,
    progress: Callable[[str], None] = lambda message: None,
) -> dict:
    """Write a converted checkpoint in its source's architecture, without its simulation.

    What the simulation was trained to do has no place there: it must still be function-preserving, as a conversion
    makes it, whatever else was trained. The outputs of both models are compared in float32 to the tolerance of a
    conversion before anything is written.

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
    check_weights(checkpoint, revision, nearest)

    progress(f"Loading {checkpoint}")
    model, _ = load_model(sas_class, checkpoint, revision, ConversionError)
    processor = load_processor(model, checkpoint, revision)

    progress("Removing the simulation")
    restored = restore_model(model, record["source_config"], record["source_architecture"])

    progress("Comparing both models")
    samples, verified_on = verification_samples(model, processor, text, images, windows, window_length, seed=0)
    fidelity = compare_models(model, restored, samples)
    if not fidelity.is_exact:
        divergence = "" if fidelity.mean_kl is None else f", mean KL {fidelity.mean_kl:.3g}"
        raise ConversionError(
            f"The simulation of {checkpoint} has been trained: without it the outputs differ by up to "
            f"{fidelity.max_abs_difference:.3g} (allowed: {fidelity.tolerance:.3g}{divergence}, arg-max agreement "
            f"{fidelity.argmax_agreement:.2%}). {type(restored).__name__} has no place for it. Nothing was written."
        )
    dtype = str(model.dtype).removeprefix("torch.")
    report = comparison_report(checkpoint, revision, model, restored, fidelity, verified_on, dtype, started)
    progress(f"Saving {output}")
    with new_folder(output) as folder:
        save_model(own_weights(restored, model.dtype), folder, checkpoint, revision)
        if processor is not None:
            processor.save_pretrained(folder)
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
    return report


def _read_record(checkpoint: str | Path, revision: str | None) -> tuple[type[PreTrainedModel], dict]:
    """The SAS class of a checkpoint and the report of its conversion; a [`ConversionError`] if it is none."""
    settings = read_settings(checkpoint, revision)
    names = settings.get("architectures") or ["none"]
    if not str(settings.get("model_type")).startswith("sas_") or not hasattr(modeling, names[0]):
        raise ConversionError(
            f"{checkpoint} is no SAS checkpoint: its `model_type` is {settings.get('model_type')!r}, its class "
            f"{names[0]}."
        )
    file = cached_file(checkpoint, REPORT_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise ConversionError(
            f"{checkpoint} has no {REPORT_NAME}, so it was not converted from another model and has no source to go "
            "back to. (If it was fine-tuned from a conversion, copy that one's here.)"
        )
    try:
        record = json.loads(Path(file).read_text())
        lossy, config, architecture = (record.get(name) for name in ("lossy", "source_config", "source_architecture"))
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{file} is damaged: {error}.") from error
    if lossy is not None:
        raise ConversionError(
            f"{checkpoint} comes from a lossy conversion ({lossy!r}): the source's attention is no longer in it."
        )
    family = FAMILIES.get(config.get("model_type")) if isinstance(config, dict) else None
    if family is None or architecture not in family.architectures:
        raise ConversionError(
            f"{file} does not say what was converted (`source_config`, `source_architecture`); convert the source "
            "again, with this version."
        )
    return getattr(modeling, names[0]), record


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
        restored = getattr(transformers, architecture)(config)
    weights = {name: weight for name, weight in model.state_dict().items() if "_simulation." not in name}
    names = restored.state_dict().keys()
    weights = family.source_weights(weights, names, restored.base_model_prefix, config)
    for name, weight in restored.state_dict().items():
        if weight.shape != weights[name].shape:
            raise ConversionError(
                f"{name} has the shape {list(weights[name].shape)}, but {architecture} asks for {list(weight.shape)}."
            )
    restored.load_state_dict(weights, assign=True)
    restored.tie_weights()
    restored.to(device=torch.device(model.device))  # buffers; in float32, whatever the weights are in
    if restored.can_generate():
        restored.generation_config = model.generation_config
    return restored.eval()
