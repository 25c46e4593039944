"""From folder or Hub id to folder: checks before anything long, conversion, verification, and an atomic save."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    cached_file,
    extract_commit_hash,
    has_file,
)

from ..dtypes import parse_dtype
from ..text import python_reference
from ..version import __version__
from .card import model_card
from .convert import ConversionError, ConversionOptions, convert, find_family, sas_config
from .family import SourceFamily
from .fidelity import compare_models, text_windows
from .samples import image_samples, text_samples


REPORT_NAME = "fidelity.json"
TOKENS_PER_FEATURE = 32  # of the hidden states, that a lossy conversion is fitted on
SIMULATION_FIELDS = ("num_simulated_heads", "simulated_head_dim", "simulation_kernel_size", "query_pre_attn_scalar")


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

    progress(f"Loading {source}")
    model = load_model(_source_class(config, family), source, revision)
    of_images = "image" in model.input_modalities
    processor = (load_image_processor if of_images else load_tokenizer)(source, revision)

    length = min(window_length, getattr(config, "max_position_embeddings", window_length))
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
        calibration_windows = text_windows(calibration, processor, length, -(-wanted // length))

    progress("Converting")
    converted = convert(model, options, share=True, calibration=calibration_windows)

    progress("Comparing source and SAS model")
    if of_images:
        samples, verified_on = image_samples(processor, images, converted.config, windows, options.seed)
    else:
        samples, verified_on = text_samples(processor, text, config.vocab_size, length, windows, options.seed)
    fidelity = compare_models(model, converted, samples)
    measured = fidelity.to_dict()
    if options.lossy is not None:
        measured["exact"] = False  # not even by chance

    report = {
        "source": str(source),
        "revision": revision,
        "commit": find_commit(source, revision),
        "source_architecture": type(model).__name__,
        "architecture": type(converted).__name__,
        "options": asdict(options),
        "lossy": options.lossy,
        "fitted_on": fitted_on,
        "simulation": {name: getattr(converted.config, name) for name in SIMULATION_FIELDS},
        "dtype_saved": dtype or str(model.dtype).removeprefix("torch."),
        "dtype_verified": "float32",
        "verified_on": verified_on,
        "fidelity": measured,
        "parameters_source": model.num_parameters(),
        "parameters": converted.num_parameters(),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
        "source_config": _recorded(config),
    }
    if options.lossy is None and not fidelity.is_exact:
        raise ConversionError(
            f"The conversion is not exact: max |difference| is {fidelity.max_abs_difference:.3g}, but at most "
            f"{report['fidelity']['tolerance']:.3g} is allowed (source eager against SDPA: "
            f"{fidelity.source_eager_sdpa_difference:.3g}). No checkpoint was written."
        )

    progress(f"Saving {output}")
    del model  # what it does not share with `converted` is freed
    with new_folder(output) as folder:
        save_model(own_weights(converted, parse_dtype(report["dtype_saved"])), folder, source, revision)
        if processor is not None:
            save_processor(processor, folder)
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        model_card(report, Path(source).is_dir()).save(folder / "README.md")
    return report


def find_commit(source: str | Path, revision: str | None) -> str | None:
    """The commit that a revision of a Hub repository stands for; `None` for other folders."""
    return extract_commit_hash(cached_file(source, CONFIG_NAME, revision=revision), None)


def versions() -> dict[str, str]:
    """Of what made a report."""
    return {"sas_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__}


def _recorded(config: PreTrainedConfig) -> dict:
    """The source's configuration as JSON, from which `restore_checkpoint` makes it again; without names of code."""
    settings = json.loads(config.to_json_string())
    settings.pop("auto_map", None)
    return settings


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well and vanishes when it does not."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep others from reading a shared checkpoint
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def read_settings(source: str | Path, revision: str | None) -> dict:
    """The config.json of a folder or Hub repository; a `FileNotFoundError` says what is missing."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; it is not a checkpoint folder.")
    # What cannot be a Hub id ("name" or "owner/name") is a path.
    is_path = folder.is_absolute() or str(source).startswith(".") or len(folder.parts) > 2
    if not folder.is_dir() and (folder.exists() or is_path):
        raise FileNotFoundError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}.")
    try:
        return PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"{source} is no folder here, nor a checkpoint that the Hub gives: {str(error).splitlines()[0]}"
        ) from error


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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; choose another output.")
    nearest = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise PermissionError(
            f"{output} cannot be written: {nearest} refuses new files ({error.strerror})."
        ) from error
    return nearest


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


def load_model(model_class: type[PreTrainedModel], source: str | Path, revision: str | None) -> PreTrainedModel:
    """The source model in its own dtype; a `ConversionError` if weights are missing, misshapen or not finite."""
    try:
        model, loading = model_class.from_pretrained(
            source,
            revision=revision,
            dtype="auto",
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, not as a RuntimeError
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ConversionError(
            f"The weights of {source} are damaged ({error}); download or save them again."
        ) from error
    if loading["missing_keys"]:
        absent = ", ".join(sorted(loading["missing_keys"])[:5])
        raise ConversionError(f"{source} lacks weights of {model_class.__name__}: {absent}.")
    if loading["mismatched_keys"]:
        name, found, expected = min(loading["mismatched_keys"])
        raise ConversionError(
            f"{source} holds {name} as {list(found)}, but its config.json asks for {list(expected)}; they do not "
            "belong together."
        )
    for name, weight in model.named_parameters():
        if not all(torch.isfinite(extreme) for extreme in weight.detach().aminmax()):
            raise ConversionError(f"{source} is damaged: {name} holds NaN or infinite numbers.")
    return model


def own_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give each weight that is a part or a transposed view of another tensor memory of its own, one after the other:
    saving would copy them all at once."""
    for parameter in model.parameters():
        weight = parameter.data.to(dtype)
        parts = weight.untyped_storage().nbytes() != weight.nbytes
        parameter.data = weight.clone(memory_format=torch.contiguous_format) if parts else weight.contiguous()
    model.config.dtype = dtype
    return model


def save_model(model: PreTrainedModel, folder: Path, source: str | Path, revision: str | None) -> None:
    """Save, with the source's generation configuration to the letter.

    Transformers loads generation configurations with contradictions, of which the Hub has many, but refuses to save
    them; what the source says is none of the conversion's business.
    """
    file = cached_file(source, GENERATION_CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if model.can_generate() and file is not None:
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    if file is not None:
        shutil.copyfile(file, folder / GENERATION_CONFIG_NAME)


def save_processor(processor: PreTrainedTokenizerBase | BaseImageProcessor, folder: Path) -> None:
    """Save it; its `auto_map`, which names code of the source's own, is not carried along."""
    for attributes in (vars(processor), getattr(processor, "init_kwargs", {})):
        attributes.pop("auto_map", None)
    processor.save_pretrained(folder)


def load_tokenizer(source: str | Path, revision: str | None) -> PreTrainedTokenizerBase | None:
    if Path(source).is_dir() and not any(Path(source).glob("*token*")):
        return None
    return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


def load_image_processor(source: str | Path, revision: str | None) -> BaseImageProcessor | None:
    if Path(source).is_dir() and not any(Path(source).glob("*processor_config.json")):
        return None
    return AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
