"""An existing checkpoint in, a SAS checkpoint that computes the same and a fidelity report out."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..modeling import SASGPTConfig
from ..text import python_reference
from ..version import __version__
from .family import SourceFamily
from .fidelity import compare_models, text_windows
from .llama import LLAMA
from .start import start_as_source


FAMILIES = {family.model_type: family for family in (LLAMA,)}
REPORT_NAME = "fidelity.json"


class ConversionError(ValueError):
    """A source that cannot be converted, or a conversion that is not exact; the message says why and what to do."""


@dataclass(frozen=True)
class ConversionOptions:
    """How large the simulation is and how it starts.

    Args:
        num_simulated_heads: Ĥ; `None`: three times the source's heads, 0: no head simulation.
        simulated_head_dim: D̂; `None`: one and a half times the source's head size, 0: no feature simulation.
        simulation_kernel_size: κ, odd.
        perturbation: size of the simulated value heads' deviations, relative to their base head. They cancel in the
            output whatever their size; the larger, the sooner the copies of a head part in training.
        seed: of those deviations.
    """

    num_simulated_heads: int | None = None
    simulated_head_dim: int | None = None
    simulation_kernel_size: int = 1
    perturbation: float = 1.0
    seed: int = 0

    def fields(self, config: PreTrainedConfig, head_dim: int) -> dict:
        """The simulation fields of the SAS configuration for a source with this configuration."""
        heads, features = self.num_simulated_heads, self.simulated_head_dim
        return {
            "num_simulated_heads": 3 * config.num_attention_heads if heads is None else heads or None,
            "simulated_head_dim": head_dim * 3 // 2 if features is None else features or None,
            "simulation_kernel_size": self.simulation_kernel_size,
            "query_pre_attn_scalar": head_dim,
        }


def convert_model(source: PreTrainedModel, options: ConversionOptions | None = None) -> PreTrainedModel:
    """Make a SAS model that computes the function of a loaded `source`, in its dtype and on its device.

    The weights are copied; `source` is left as it is.

    Raises:
        ConversionError: if the architecture is not supported.
        ValueError: if the options do not fit the source.
    """
    return _convert(source, options or ConversionOptions(), share=False)


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

    progress(f"Loading {source}")
    model_class = _source_class(config, family)
    model, loading = _load(model_class, source, revision)
    absent = sorted(loading["missing_keys"])
    if absent:
        raise ConversionError(f"{source} lacks weights of {model_class.__name__}: {', '.join(absent[:5])}.")
    tokenizer = _load_tokenizer(source, revision)

    progress("Converting")
    converted = _convert(model, options, share=True)

    progress(f"Comparing source and SAS model on {windows} x {window_length} tokens")
    length = min(window_length, config.max_position_embeddings)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(options.seed)
        samples = [torch.randint(config.vocab_size, (1, length), generator=generator) for _ in range(windows)]
        verified_on = "random tokens (the source has no tokenizer)"
    else:
        samples = text_windows(text or python_reference(), tokenizer, length, windows)
        verified_on = "the text given" if text else "the Python language reference"
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
        "versions": {"sas_hf": __version__, "transformers": transformers_version, "torch": torch.__version__},
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
        _save_model(converted.to(getattr(torch, report["dtype_saved"])), folder, source, revision)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        _model_card(report, Path(source).is_dir()).save(folder / "README.md")
    return report


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


def _convert(source: PreTrainedModel, options: ConversionOptions, share: bool) -> PreTrainedModel:
    family = _find_family(source.config)
    if type(source).__name__ not in family.architectures:
        raise ConversionError(
            f"{type(source).__name__} has no SAS counterpart; convertible are {', '.join(family.architectures)}."
        )
    config = _sas_config(source.config, family, options)
    with torch.device("meta"):
        model = family.architectures[type(source).__name__](config)
    weights = {family.rename(name): weight for name, weight in source.state_dict().items()}
    if not share:
        weights = {name: weight.clone() for name, weight in weights.items()}
    absent, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if unexpected or any("_simulation." not in name for name in absent):
        raise ConversionError(f"Weights do not match: missing {absent[:5]}, unexpected {unexpected[:5]}.")
    _materialise(model, source)
    start_as_source(model, options.perturbation, options.seed)
    model.tie_weights()
    if model.can_generate():
        model.generation_config = source.generation_config
    return model.eval()


def _materialise(model: PreTrainedModel, like: PreTrainedModel) -> None:
    """Give what is still on the meta device memory: simulation weights, to be set, and rotary buffers, computed."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=like.device, dtype=like.dtype)
                module.register_parameter(name, torch.nn.Parameter(empty))
    if getattr(model.base_model, "rotary_emb", None) is not None:
        rotary = type(model.base_model.rotary_emb)
        model.base_model.rotary_emb = rotary(model.config).to(like.device)


def _sas_config(config: PreTrainedConfig, family: SourceFamily, options: ConversionOptions) -> SASGPTConfig:
    fields = family.fields(config)
    shared = ("id2label", "label2id", "problem_type", "dtype")
    fields |= {name: getattr(config, name) for name in shared if getattr(config, name) is not None}
    return SASGPTConfig(**fields, **options.fields(config, fields["head_dim"]))


def _find_family(config: PreTrainedConfig) -> SourceFamily:
    if config.model_type == SASGPTConfig.model_type:
        raise ConversionError("The source is a SAS model already; convert its original source with other options.")
    if config.model_type not in FAMILIES:
        raise ConversionError(
            f"`model_type` {config.model_type!r} is not supported; convertible are: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[config.model_type]


def _source_class(config: PreTrainedConfig, family: SourceFamily) -> type[PreTrainedModel]:
    """The Transformers class named in the checkpoint, never code from it."""
    import transformers

    name = (config.architectures or [next(iter(family.architectures))])[0]
    if name not in family.architectures:
        raise ConversionError(
            f"`architectures` names {name}, which has no SAS counterpart; convertible are "
            f"{', '.join(family.architectures)}."
        )
    return getattr(transformers, name)


def _check_before_loading(
    source: str | Path, output: Path, options: ConversionOptions, revision: str | None, dtype: str | None
) -> tuple[PreTrainedConfig, SourceFamily]:
    """Everything that can be refused before weights are read."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; choose another output.")
    if dtype is not None and not (
        isinstance(getattr(torch, dtype, None), torch.dtype) and getattr(torch, dtype).is_floating_point
    ):
        raise ValueError(f"`dtype` is {dtype!r}; it must be a floating-point type such as float32 or bfloat16.")
    if options.perturbation < 0:
        raise ValueError(f"`perturbation` is {options.perturbation}; it must not be negative.")

    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; it is not a checkpoint folder.")
    if not folder.is_dir() and (folder.is_absolute() or str(source).startswith(".")):
        raise FileNotFoundError(f"{folder} does not exist.")
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    family = _find_family(config)
    _source_class(config, family)
    _sas_config(config, family, options)
    if folder.is_dir():
        size = _check_weight_files(folder)
        nearest = next(parent for parent in output.absolute().parents if parent.exists())
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


def _save_model(model: PreTrainedModel, folder: Path, source: str | Path, revision: str | None) -> None:
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


def _load_tokenizer(source: str | Path, revision: str | None) -> PreTrainedTokenizerBase | None:
    if Path(source).is_dir() and not any(Path(source).glob("*token*")):
        return None
    return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


def _model_card(report: dict, local: bool) -> ModelCard:
    fidelity, simulation = report["fidelity"], report["simulation"]
    rows = {
        "max abs difference of the outputs": f"{fidelity['max_abs_difference']:.3g}",
        "max abs output": f"{fidelity['max_abs_output']:.4g}",
        "mean KL divergence": "-" if fidelity["mean_kl"] is None else f"{fidelity['mean_kl']:.3g}",
        "arg-max agreement": f"{fidelity['argmax_agreement']:.2%}",
        "source, eager against SDPA attention": f"{fidelity['source_eager_sdpa_difference']:.3g}",
        "parameters": f"{report['parameters']:,} (source: {report['parameters_source']:,})",
    }
    auto_class = "AutoModel" + report["architecture"].removeprefix("SASGPT").removeprefix("Model")
    data = ModelCardData(
        library_name="transformers",
        tags=["sas", "sas_hf"],
        base_model=None if local else report["source"],
        base_model_relation=None if local else "finetune",
    )
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {Path(report['source']).name} with Simulated Attention Score\n",
        f"Converted by `sas_hf` {report['versions']['sas_hf']} from `{report['source']}` "
        f"({report['source_architecture']}): {simulation['num_simulated_heads'] or 'no'} simulated heads, "
        f"{simulation['simulated_head_dim'] or 'no'} simulated features per head, kernel "
        f"{simulation['simulation_kernel_size']}. It computes what its source computes, ready for fine-tuning.\n",
        f"```python\nimport sas_hf  # registers the architecture\nfrom transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("PATH")\n```\n',
        f"## Fidelity\n\nMeasured in float32 on {fidelity['tokens']} tokens of {report['verified_on']}.\n",
        "| measure | value |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    return ModelCard("\n".join(lines) + "\n")
