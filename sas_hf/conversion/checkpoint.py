"""From folder or Hub id to folder: checks before anything long, conversion, verification, and an atomic save."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..data.text import python_reference
from ..hub.card import conversion_card, read_card
from ..hub.checkpoints import (
    CARD_NAME,
    REPORT_NAME,
    check_vocabulary,
    find_commit,
    load_config,
    load_processor,
    new_folder,
    read_settings,
    refuse_existing,
)
from ..hub.dtypes import parse_dtype
from ..hub.sentence_modules import find_sentence_modules
from ..report.files import check_writable, one_at_a_time
from ..version import versions
from .convert import NO_SIMULATION, ConversionError, ConversionOptions, convert, find_family, sas_config
from .family import SourceFamily
from .samples import check_samples, text_samples, verification_samples
from .sources import (
    DTYPES,
    check_space,
    check_weights,
    files_left_out,
    load_whole_model,
    named_architectures,
    read_stored_weights,
    source_class,
    unknown_fields,
)
from .written import Verification, check_rounding, verify_written, write_checkpoint


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
TOKENS_PER_FEATURE = 32  # of the hidden states, that a lossy conversion is fitted on
SIMULATION_FIELDS = (
    "num_simulated_heads",
    "simulated_head_dim",
    "simulate_value_features",
    "simulation_kernel_size",
    "head_aggregation",
    "simulation_act",
    "query_pre_attn_scalar",
)


def check_output(output: Path) -> Path:
    """The folder that exists and in which `output`, which must not, will be made; a `FileExistsError` or a
    `PermissionError` if it cannot."""
    refuse_existing(output)
    return check_writable(output.absolute().parent, f"The new checkpoint is to be {output}")


@one_at_a_time("output", check=check_output)
def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    options: ConversionOptions | None = None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    text: str | None = None,
    images: str | Path | None = None,
    calibration: str | None = None,
    windows: int = 8,
    window_length: int = 256,
    progress: Callable[[str], None] = lambda message: None,
) -> dict:
    """Convert a checkpoint and verify, in float32 and on text or images, that what was written, loaded again, computes
    what its whole source computes.

    A weight of the source's files that would be left out is an error. If `dtype` rounds the weights, the result is
    compared with the source rounded to it, and the report says how far that is from the source as it is.

    The source is held in memory once, in its own dtype; a module's weights are widened to float32 while it runs. What
    was written is read from its files as it is used.

    Tokenizer, chat template, generation configuration, image processor, the modules of sentence-transformers and
    licence files are carried along; the folder also gets a fidelity report (`fidelity.json`), which names what is left
    out, and a model card. It is written aside and renamed when it is complete. A lossy conversion (`options.lossy`) is
    measured in the same way, but need not be exact.

    Args:
        source: a local folder or Hub id of a supported architecture, with safetensors weights.
        output: the new checkpoint folder; must not exist, or be empty.
        options: of the simulation.
        revision: branch, tag or commit of a Hub source.
        dtype: of the saved weights: "float32", "bfloat16", "float16" or "float64"; by default the source's own, or of
            several (norms in float32, say) the one that holds them all.
        text: to verify on; the Python reference by default, random tokens if the source has no tokenizer.
        images: folder of images to verify on; smooth random ones by default.
        calibration: text that a lossy conversion is fitted on; by default the first nine tenths of `text`, of which
            then only the last tenth is measured on.
        windows, window_length: how many stretches of the text are compared, and their length in tokens; or how many
            batches of four images.
        progress: called with a line of text at each stage.

    Returns:
        the fidelity report.

    Raises:
        FileExistsError: if `output` holds something.
        BlockingIOError: while another process writes it.
        FileNotFoundError: if `source` has no configuration or no weights.
        ConversionError: if the source is unsupported, damaged or incomplete, holds something that would be lost, or if
            the result is not exact.
        ValueError: if the options do not fit the source.
        OSError: if the disk is too small or full. Nothing is left behind in any of these cases.
    """
    started = time.monotonic()
    options, output = options or ConversionOptions(), Path(output)
    if calibration is not None and options.lossy is None:
        raise ValueError("`calibration` is what a lossy conversion is fitted on; give `lossy` in the options too.")
    measured = python_reference() if text is None else text
    if calibration is not None and measured.strip() and measured.strip() in calibration:
        raise ValueError(
            "`text`, or the Python reference where none is given, is in `calibration`, which the conversion is fitted "
            "on: what is measured on it would be too good; verify on another text."
        )
    nearest = check_output(output)
    if dtype is not None and parse_dtype(dtype) not in DTYPES.values():
        raise ValueError(f"`dtype` is {dtype!r}; a checkpoint is saved in float32, bfloat16, float16 or float64.")
    config, family = find_source(source, revision)
    architecture = named_architectures(config, family)[0]
    aimed_at = sas_config(config, family, options, architecture)
    check_samples(family.architectures[architecture], text, images, windows, window_length)
    check_weights(source, revision)
    sentence_modules = find_sentence_modules(source, revision, ConversionError)
    source_card = read_card(source, revision)
    processor = load_processor(family.architectures[architecture], source, revision)
    tokenizer = cast(PreTrainedTokenizerBase, processor)  # in what concerns models of text
    if hasattr(config, "vocab_size") and processor is not None:
        check_vocabulary(tokenizer, config.vocab_size, source)

    fitted_on = calibration_windows = None
    if options.lossy is not None:
        if processor is None:
            raise ConversionError("A lossy conversion is fitted on text, but the source has no tokenizer.")
        fitted_on = "the calibration text given"
        if calibration is None:
            fitted_on = "the first nine tenths of the text verified on"
            text = python_reference() if text is None else text
            calibration, text = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
        wanted = TOKENS_PER_FEATURE * config.hidden_size
        length = min(window_length, config.max_position_embeddings)
        calibration_windows, _ = text_samples(
            tokenizer, calibration, config.vocab_size, length, -(-wanted // length), options.seed
        )
    samples, verified_on = verification_samples(
        family.architectures[architecture], aimed_at, processor, text, images, windows, window_length, options.seed
    )

    progress(f"Loading {source}")
    stored = read_stored_weights(source, revision)
    saved_dtype = stored.widest_dtype(config) if dtype is None else parse_dtype(dtype)
    check_space(nearest, stored.numbers, saved_dtype)
    model, recomputed, left_out = load_whole_model(
        source_class(source, config, family, stored), source, revision, config, stored, family.unread
    )
    check_rounding(model, saved_dtype)

    progress("Converting")
    converted = convert(model, options, share=True, calibration=calibration_windows)
    sas_class, simulation = type(converted), {name: getattr(converted.config, name) for name in SIMULATION_FIELDS}
    if options.lossy is not None:
        check_rounding(converted, saved_dtype)

    with new_folder(output) as folder:
        progress(f"Saving {output}")
        write_checkpoint(converted, folder, saved_dtype, processor, source, revision)
        del converted  # what it does not share with `model` is freed

        progress("Comparing source and saved SAS model")
        verification = verify_written(folder, sas_class, model, samples, saved_dtype, exact=options.lossy is None)
        fidelity = verification.fidelity
        if options.lossy is None and not fidelity.is_exact:
            raise ConversionError(
                f"The conversion is not exact: max |difference| is {fidelity.max_abs_difference:.3g}, but at most "
                f"{fidelity.tolerance:.3g} is allowed (source eager against SDPA: "
                f"{fidelity.source_eager_sdpa_difference:.3g}). No checkpoint was written."
            )
        report = comparison_report(
            source, revision, model, sas_class, verification, verified_on, saved_dtype, started
        ) | {
            "options": asdict(options),
            "lossy": options.lossy,
            "fitted_on": fitted_on,
            "simulation": simulation,
            "source_config": _recorded(config),
            "dtypes_source": stored.count_dtypes(),
            "weights_recomputed": recomputed,
            "weights_left_out": left_out,
            "fields_unknown": unknown_fields(source, revision, config),
            "files_left_out": files_left_out(source, revision, folder),
            "sentence_modules": sentence_modules,
        }
        if options.lossy is not None:
            report["fidelity"]["exact"] = False  # not even by chance
            report["exact_to"] = None
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        conversion_card(report, source_card).save(folder / CARD_NAME)
    return report


def comparison_report(
    source: str | Path,
    revision: str | None,
    before: PreTrainedModel,
    made: type[PreTrainedModel],
    verification: Verification,
    verified_on: str,
    dtype: torch.dtype,
    started: float,
) -> dict:
    """What the reports of both directions say: what was made of what, and how far the two are apart.

    Args:
        source: folder or Hub id that `before` was loaded from.
        made: class of the written checkpoint.
        verified_on: where the samples came from that were compared.
        dtype: of the saved weights.
        started: `time.monotonic()` of the beginning.
    """
    saved, unrounded = str(dtype).removeprefix("torch."), verification.unrounded
    return {
        "source": str(source),
        "revision": revision,
        "commit": find_commit(source, revision),
        "source_architecture": type(before).__name__,
        "architecture": made.__name__,
        "dtype_saved": saved,
        "dtype_verified": "float32",
        "exact_to": "the source" if unrounded is None else f"the source's weights rounded to {saved}",
        "verified_on": verified_on,
        "fidelity": verification.fidelity.to_dict(),
        "fidelity_unrounded": None if unrounded is None else unrounded.to_dict(),
        "in_saved_dtype": verification.in_saved_dtype,
        "parameters_source": before.num_parameters(),
        "parameters": verification.parameters,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
    }


def _recorded(config: PreTrainedConfig) -> dict:
    """The source's configuration as JSON, from which `restore_checkpoint` makes it again; without names of code."""
    settings = json.loads(config.to_json_string())
    settings.pop("auto_map", None)
    return settings


def find_source(source: str | Path, revision: str | None = None) -> tuple[PreTrainedConfig, SourceFamily]:
    """The configuration and family of a checkpoint that can be converted; no weights are read.

    Raises:
        FileNotFoundError: if there is no such folder or checkpoint, or no configuration in it.
        ConversionError: if the architecture is not supported.
        ValueError: for a size that is 0 or less.
    """
    settings = read_settings(source, revision)
    if "model_type" in settings:  # before Transformers asks whether it may run an unknown type's code
        find_family(str(settings["model_type"]))
        _check_sizes(settings)
    config = load_config(source, revision)
    family = find_family(config.model_type)
    named_architectures(config, family)
    return config, family


def _check_sizes(settings: dict) -> None:
    """Raise a `ValueError` for sizes that none can be, by which Transformers would divide."""
    own_names = CONFIG_MAPPING[settings["model_type"]].attribute_map
    for name in (*SIZES, *(own_names[size] for size in SIZES if size in own_names)):
        if isinstance(value := settings.get(name), int) and value < 1:
            raise ValueError(f"`{name}` is {value}; it must be a positive integer. Mend the source's {CONFIG_NAME}.")


def before_and_after(source: str | Path) -> dict[str, PreTrainedConfig]:
    """SAS configurations that say what a source costs as it is, and converted by default; no weights are read.

    Raises:
        FileNotFoundError, ConversionError: as [`find_source`].
    """
    config, family = find_source(source)
    architecture = named_architectures(config, family)[0]
    found = {
        "as it is": sas_config(config, family, NO_SIMULATION, architecture),
        "converted by default": sas_config(config, family, ConversionOptions(), architecture),
    }
    for made in found.values():
        made.architectures = [family.architectures[architecture].__name__]  # whose parameters count
    return found
