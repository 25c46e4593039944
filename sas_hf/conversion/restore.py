"""The way back: a SAS checkpoint whose simulation still changes nothing becomes a checkpoint of its source's kind."""

import copy
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..hub.card import restoration_card
from ..hub.checkpoints import CARD_NAME, REPORT_NAME, new_folder, read_report
from ..report.files import one_at_a_time
from .checkpoint import check_output, comparison_report
from .convert import FAMILIES
from .family import ConversionError, SourceFamily
from .live import pooler_arguments
from .sas_checkpoint import find_sas_class, open_sas_checkpoint
from .sources import check_space, files_left_out, load_whole_model, read_stored_weights
from .start import output_of_all_groups
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
    sas_class = find_sas_class(checkpoint, revision)
    record = _read_record(checkpoint, revision)
    opened = open_sas_checkpoint(checkpoint, revision, sas_class, text, images, windows, window_length)

    progress(f"Loading {checkpoint}")
    stored = read_stored_weights(checkpoint, revision)
    dtype = stored.widest_dtype(opened.config)
    check_space(nearest, stored.numbers, dtype)
    model, _, _ = load_whole_model(sas_class, checkpoint, revision, opened.config, stored)

    progress("Removing the simulation")
    restored = restore_model(model, record["source_config"], record["source_architecture"])
    source_class = type(restored)

    with new_folder(output) as folder:
        progress(f"Saving {output}")
        write_checkpoint(restored, folder, dtype, opened.processor, checkpoint, revision)
        del restored

        progress("Comparing both models")
        verification = verify_written(folder, source_class, model, opened.samples, dtype)
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
            checkpoint, revision, model, source_class, verification, opened.verified_on, dtype, started
        ) | {
            "files_left_out": files_left_out(checkpoint, revision, folder),
            "sentence_modules": opened.sentence_modules,
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        restoration_card(report, opened.card).save(folder / CARD_NAME)
    return report


def _read_record(checkpoint: str | Path, revision: str | None) -> dict:
    """The report of a SAS checkpoint's conversion; a [`ConversionError`] if it was not converted."""
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
    family = FAMILIES.get(config.get("model_type", "")) if isinstance(config, dict) else None
    if family is None or architecture not in family.architectures:
        raise ConversionError(
            f"The {REPORT_NAME} of {checkpoint} does not say what was converted (`source_config`, "
            "`source_architecture`); convert the source again, with this version."
        )
    return record


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
        architecture = architecture_of(family, type(model))
    kept = {name: getattr(model.config, name) for name in LABELS}
    config = AutoConfig.for_model(**source_config | family.source_fields(model.config) | kept)
    weights = {name: weight for name, weight in model.state_dict().items() if "_simulation." not in name}
    weights |= output_of_all_groups(model)
    return model_of_family(family, architecture, config, weights, model)


def architecture_of(family: SourceFamily, sas_class: type[PreTrainedModel]) -> str:
    """The name of the family's class with the same head as a SAS class; a [`ConversionError`] if it has none."""
    fitting = [name for name, known in family.architectures.items() if known is sas_class]
    if not fitting:
        raise ConversionError(f"No {family.model_type} class has the head of {sas_class.__name__}.")
    return fitting[0]


def model_of_family(
    family: SourceFamily,
    architecture: str,
    config: PreTrainedConfig,
    weights: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
) -> PreTrainedModel:
    """A model of a source family, in evaluation.

    Args:
        architecture: its class.
        config: its configuration.
        weights: by the names of a SAS model without simulation; shared where they are the same on both sides.
        model: the SAS model that they come from: its device, whether it has a pooler, how it generates.

    Raises:
        ConversionError: if a weight has no place in it.
    """
    with init.no_init_weights():
        source_class = getattr(transformers, architecture)
        without_pooler = getattr(model.config, "pooler_act", ...) is None
        made = source_class(config, **pooler_arguments(source_class, without_pooler))
    names = made.state_dict().keys()
    weights = family.source_weights(weights, names, made.base_model_prefix, config)
    for name, weight in made.state_dict().items():
        if weight.shape != weights[name].shape:
            raise ConversionError(
                f"{name} has the shape {list(weights[name].shape)}, but {architecture} asks for {list(weight.shape)}."
            )
    if not getattr(config, "tie_word_embeddings", False):  # weights that are one here are two there
        first = {id(weight): name for name, weight in reversed(weights.items())}
        weights = {name: weight if first[id(weight)] == name else weight.clone() for name, weight in weights.items()}
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    made.to(device=torch.device(model.device))  # buffers; in float32, whatever the weights are in
    if made.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()
