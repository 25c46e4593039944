"""From folder or Hub id to folder: checks before anything long, conversion, verification, and an atomic save."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    cached_file,
    extract_commit_hash,
    has_file,
)

from ..card import conversion_card, read_card
from ..checkpoints import (
    CARD_NAME,
    REPORT_NAME,
    load_model,
    load_processor,
    new_folder,
    read_settings,
    refuse_existing,
    save_model,
)
from ..dtypes import parse_dtype
from ..files import check_writable, one_at_a_time
from ..text import python_reference
from ..version import versions
from .convert import ConversionError, ConversionOptions, convert, find_family, sas_config
from .family import SourceFamily
from .fidelity import Fidelity, compare_models, text_windows
from .samples import verification_samples


TOKENS_PER_FEATURE = 32  # of the hidden states, that a lossy conversion is fitted on
SIMULATION_FIELDS = ("num_simulated_heads", "simulated_head_dim", "simulation_kernel_size", "query_pre_attn_scalar")


@one_at_a_time("output")
def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    options: ConversionOptions | None = None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    text: str | None = None,
    images: Path | None = None,
    calibration: str | None = None,
    windows: int = 8,
    window_length: int = 256,
    progress: Callable[[str], None] = lambda message: None,
) -> dict:
    """Convert a checkpoint and verify, in float32 and on text or images, that it computes what its source computes.

    The source is held in memory once, in its own dtype; a module's weights are widened to float32 while it runs.

    Tokenizer, chat template, generation configuration and image processor are carried along; the folder also gets a
    fidelity report (`fidelity.json`) and a model card. It is written aside and renamed when it is complete.
    A lossy conversion (`options.lossy`) is measured in the same way, but need not be exact.

    Args:
        source: a local folder or Hub id of a supported architecture, with safetensors weights.
        output: the new checkpoint folder; must not exist, or be empty.
        options: of the simulation.
        revision: branch, tag or commit of a Hub source.
        dtype: of the saved weights, such as "bfloat16"; the source's own by default.
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
        ConversionError: if the source is unsupported, damaged or incomplete, or the result is not exact.
        ValueError: if the options do not fit the source.
        OSError: if the disk is too small or full. Nothing is left behind in any of these cases.
    """
    started = time.monotonic()
    options, output = options or ConversionOptions(), Path(output)
    if calibration is not None and options.lossy is None:
        raise ValueError("`calibration` is what a lossy conversion is fitted on; give `lossy` in the options too.")
    config, family = _check_before_loading(source, output, options, revision, dtype)
    source_card = read_card(source, revision)

    progress(f"Loading {source}")
    model, _ = load_model(_source_class(config, family), source, revision, ConversionError)
    processor = load_processor(model, source, revision)

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
        calibration_windows = text_windows(calibration, processor, length, -(-wanted // length))

    progress("Converting")
    converted = convert(model, options, share=True, calibration=calibration_windows)

    progress("Comparing source and SAS model")
    samples, verified_on = verification_samples(
        converted, processor, text, images, windows, window_length, options.seed
    )
    fidelity = compare_models(model, converted, samples)
    dtype = dtype or str(model.dtype).removeprefix("torch.")
    report = comparison_report(source, revision, model, converted, fidelity, verified_on, dtype, started) | {
        "options": asdict(options),
        "lossy": options.lossy,
        "fitted_on": fitted_on,
        "simulation": {name: getattr(converted.config, name) for name in SIMULATION_FIELDS},
        "source_config": _recorded(config),
    }
    if options.lossy is not None:
        report["fidelity"]["exact"] = False  # not even by chance
    if options.lossy is None and not fidelity.is_exact:
        raise ConversionError(
            f"The conversion is not exact: max |difference| is {fidelity.max_abs_difference:.3g}, but at most "
            f"{fidelity.tolerance:.3g} is allowed (source eager against SDPA: "
            f"{fidelity.source_eager_sdpa_difference:.3g}). No checkpoint was written."
        )

    progress(f"Saving {output}")
    del model  # what it does not share with `converted` is freed
    with new_folder(output) as folder:
        save_model(own_weights(converted, parse_dtype(dtype)), folder, source, revision)
        if processor is not None:
            processor.save_pretrained(folder)
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        conversion_card(report, source_card).save(folder / CARD_NAME)
    return report


def find_commit(source: str | Path, revision: str | None) -> str | None:
    """The commit that a revision of a Hub repository stands for; `None` for other folders."""
    return extract_commit_hash(cached_file(source, CONFIG_NAME, revision=revision), None)


def comparison_report(
    source: str | Path,
    revision: str | None,
    before: PreTrainedModel,
    after: PreTrainedModel,
    fidelity: Fidelity,
    verified_on: str,
    dtype: str,
    started: float,
) -> dict:
    """What the reports of both directions say: what was made of what, and how far the two are apart.

    Args:
        source: folder or Hub id that `before` was loaded from.
        verified_on: where the samples came from that `fidelity` was measured on.
        dtype: of the saved weights.
        started: `time.monotonic()` of the beginning.
    """
    return {
        "source": str(source),
        "revision": revision,
        "commit": find_commit(source, revision),
        "source_architecture": type(before).__name__,
        "architecture": type(after).__name__,
        "dtype_saved": dtype,
        "dtype_verified": "float32",
        "verified_on": verified_on,
        "fidelity": fidelity.to_dict(),
        "parameters_source": before.num_parameters(),
        "parameters": after.num_parameters(),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
    }


def _recorded(config: PreTrainedConfig) -> dict:
    """The source's configuration as JSON, from which `restore_checkpoint` makes it again; without names of code."""
    settings = json.loads(config.to_json_string())
    settings.pop("auto_map", None)
    return settings


def _source_class(config: PreTrainedConfig, family: SourceFamily) -> type[PreTrainedModel]:
    """The Transformers class named in the checkpoint, never code from it."""
    name = (config.architectures or [next(iter(family.architectures))])[0]
    if name not in family.architectures:
        raise ConversionError(
            f"`architectures` names {name}, which has no SAS counterpart; convertible are "
            f"{', '.join(family.architectures)}."
        )
    return getattr(transformers, name)


def find_source(source: str | Path, revision: str | None = None) -> tuple[PreTrainedConfig, SourceFamily]:
    """The configuration and family of a checkpoint that can be converted; no weights are read.

    Raises:
        FileNotFoundError: if there is no such folder or checkpoint, or no configuration in it.
        ConversionError: if the architecture is not supported.
    """
    settings = read_settings(source, revision)
    if "model_type" in settings:  # before Transformers asks whether it may run an unknown type's code
        find_family(str(settings["model_type"]))
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    family = find_family(config.model_type)
    _source_class(config, family)
    return config, family


def _check_before_loading(
    source: str | Path, output: Path, options: ConversionOptions, revision: str | None, dtype: str | None
) -> tuple[PreTrainedConfig, SourceFamily]:
    """Everything that can be refused before weights are read."""
    nearest = check_output(output)
    if dtype is not None:
        parse_dtype(dtype)
    if options.perturbation < 0:
        raise ValueError(f"`perturbation` is {options.perturbation}; it must not be negative.")

    config, family = find_source(source, revision)
    sas_config(config, family, options, _source_class(config, family).__name__)
    check_weights(source, revision, nearest)
    return config, family


def check_output(output: Path) -> Path:
    """The folder that exists and in which `output`, which must not, will be made; a `FileExistsError` or a
    `PermissionError` if it cannot."""
    refuse_existing(output)
    return check_writable(output.absolute().parent, f"The new checkpoint is to be {output}")


def check_weights(source: str | Path, revision: str | None, nearest: Path) -> None:
    """Raise an error if the weights are missing, damaged or pickles, or if `nearest` has no room for as many."""
    if Path(source).is_dir():
        size = _check_weight_files(Path(source))
        free = shutil.disk_usage(nearest).free
        if free < 1.02 * size:
            raise OSError(f"The result needs about {size / 1e6:.0f} MB, but {nearest} has {free / 1e6:.0f} MB free.")
    elif not any(has_file(source, name, revision) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise _no_weights(source, SAFE_WEIGHTS_NAME, has_file(source, WEIGHTS_NAME, revision))


def _no_weights(source: str | Path, file: str, pickled: bool) -> FileNotFoundError:
    reason = " (only a pickle, which could run code when loaded)" if pickled else ""
    return FileNotFoundError(f"{source} has no {file}{reason}; safetensors weights are needed.")


def _check_weight_files(folder: Path) -> int:
    """Total size in bytes of the safetensors files of `folder`; each must be there and as long as its header says."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConversionError(
                f"{index} is damaged: it has no readable `weight_map` ({error}); download or save it again."
            ) from error
    else:
        files = [folder / SAFE_WEIGHTS_NAME]
    for file in files:
        if not file.is_file():
            raise _no_weights(folder, file.name, pickled=any(folder.glob("*.bin")))
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ConversionError(f"{file} is damaged or truncated ({error}); download or save it again.") from error
    return sum(file.stat().st_size for file in files)


def own_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give each weight that is a part or a transposed view of another tensor memory of its own, one after the other:
    saving would copy them all at once."""
    for parameter in model.parameters():
        weight = parameter.data.to(dtype)
        parts = weight.untyped_storage().nbytes() != weight.nbytes
        parameter.data = weight.clone(memory_format=torch.contiguous_format) if parts else weight.contiguous()
    model.config.dtype = dtype
    return model
