"""From folder or Hub id to folder: checks before anything long, conversion, verification, and an atomic save."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..card import conversion_card, read_card
from ..checkpoints import (
    CARD_NAME,
    REPORT_NAME,
    load_tokenizer,
    new_folder,
    read_config,
    refuse_existing,
    save_model,
)
from ..dtypes import parse_dtype
from ..text import python_reference
from ..version import __version__
from .convert import ConversionError, ConversionOptions, convert, find_family, sas_config
from .family import SourceFamily
from .fidelity import compare_models, text_windows


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    options: ConversionOptions | None = None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    text: str | None = None,
    windows: int = 8,
    window_length: int = 256,
    progress: Callable[[str], None] = lambda message: None,
) -> dict:
    """Convert a checkpoint and verify, in float32 and on text, that it computes what its source computes.

    Tokenizer, chat template and generation configuration are carried along; the folder also gets a fidelity report
    (`fidelity.json`) and a model card. It is written aside and renamed when it is complete.

    Args:
        source: a local folder or Hub id of a supported architecture, with safetensors weights.
        output: the new checkpoint folder; must not exist, or be empty.
        options: of the simulation.
        revision: branch, tag or commit of a Hub source.
        dtype: of the saved weights, such as "bfloat16"; the source's own by default.
        text: to verify on; the Python reference by default, random tokens if the source has no tokenizer.
        windows, window_length: how many stretches of the text are compared, and their length in tokens.
        progress: called with a line of text at each stage.

    Returns:
        the fidelity report.

    Raises:
        FileExistsError: if `output` holds something.
        FileNotFoundError: if `source` has no configuration or no weights.
        ConversionError: if the source is unsupported, damaged or incomplete, or the result is not exact.
        ValueError: if the options do not fit the source.
        OSError: if the disk is too small or full. Nothing is left behind in any of these cases.
    """
    started = time.monotonic()
    options, output = options or ConversionOptions(), Path(output)
    config, family = _check_before_loading(source, output, options, revision, dtype)
    source_card = read_card(source, revision)

    progress(f"Loading {source}")
    model_class = _source_class(config, family)
    model, loading = _load(model_class, source, revision)
    absent = sorted(loading["missing_keys"])
    if absent:
        raise ConversionError(f"{source} lacks weights of {model_class.__name__}: {', '.join(absent[:5])}.")
    tokenizer = load_tokenizer(source, revision)

    progress("Converting")
    converted = convert(model, options, share=True)

    progress(f"Comparing source and SAS model on {windows} x {window_length} tokens")
    length = min(window_length, config.max_position_embeddings)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(options.seed)
        samples = [torch.randint(config.vocab_size, (1, length), generator=generator) for _ in range(windows)]
        verified_on = "random tokens (the source has no tokenizer)"
    else:
        samples = text_windows(python_reference() if text is None else text, tokenizer, length, windows)
        verified_on = "the Python language reference" if text is None else "the text given"
    fidelity = compare_models(model, converted, samples)

    report = {
        "source": str(source),
        "revision": revision,
        "source_architecture": model_class.__name__,
        "architecture": type(converted).__name__,
        "options": asdict(options),
        "simulation": options.fields(config, converted.config.head_dim),
        "dtype_saved": dtype or str(config.dtype or torch.float32).removeprefix("torch."),
        "dtype_verified": "float32",
        "verified_on": verified_on,
        "fidelity": fidelity.to_dict(),
        "parameters_source": model.num_parameters(),
        "parameters": converted.num_parameters(),
        "versions": {"sas_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "seconds": round(time.monotonic() - started, 1),
    }
    if not fidelity.is_exact:
        raise ConversionError(
            f"The conversion is not exact: max |difference| is {fidelity.max_abs_difference:.3g}, but at most "
            f"{report['fidelity']['tolerance']:.3g} is allowed (source eager against SDPA: "
            f"{fidelity.source_eager_sdpa_difference:.3g}). No checkpoint was written."
        )

    progress(f"Saving {output}")
    with new_folder(output) as folder:
        save_model(converted.to(parse_dtype(report["dtype_saved"])), folder, source, revision)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        conversion_card(report, source_card).save(folder / CARD_NAME)
    return report


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
    config = read_config(source, revision)
    family = find_family(config)
    _source_class(config, family)
    return config, family


def _check_before_loading(
    source: str | Path, output: Path, options: ConversionOptions, revision: str | None, dtype: str | None
) -> tuple[PreTrainedConfig, SourceFamily]:
    """Everything that can be refused before weights are read."""
    refuse_existing(output)
    if dtype is not None:
        parse_dtype(dtype)
    if options.perturbation < 0:
        raise ValueError(f"`perturbation` is {options.perturbation}; it must not be negative.")

    config, family = find_source(source, revision)
    sas_config(config, family, options)
    nearest = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise PermissionError(
            f"{output} cannot be written: {nearest} refuses new files ({error.strerror})."
        ) from error
    if Path(source).is_dir():
        size = _check_weight_files(Path(source))
        free = shutil.disk_usage(nearest).free
        if free < 1.02 * size:
            raise OSError(f"The result needs about {size / 1e6:.0f} MB, but {nearest} has {free / 1e6:.0f} MB free.")
    return config, family


def _check_weight_files(folder: Path) -> int:
    """Total size in bytes of the safetensors files of `folder`; each must be there and as long as its header says."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [folder / SAFE_WEIGHTS_NAME]
    for file in files:
        if not file.is_file():
            pickled = " (only a pickle, which could run code when loaded)" if any(folder.glob("*.bin")) else ""
            raise FileNotFoundError(f"{folder} has no {file.name}{pickled}; safetensors weights are needed.")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ConversionError(f"{file} is damaged or truncated ({error}); download or save it again.") from error
    return sum(file.stat().st_size for file in files)


def _load(model_class: type[PreTrainedModel], source: str | Path, revision: str | None):
    return model_class.from_pretrained(
        source,
        revision=revision,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
