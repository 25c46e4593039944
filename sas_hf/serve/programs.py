"""A SAS checkpoint in, a program for another runtime out, run there and compared with the model before it is kept.

Transformers' exporters write and run the programs (`transformers.exporters`). Here is what they are told: which graphs
an architecture is taken apart into, what may vary in their inputs, and what is compared.
"""

import copy
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.export import Dim
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..hub.checkpoints import load_preparation, new_folder, refuse_existing
from ..hub.export import load_whole
from ..modeling.cache_name import CACHE_NAME
from ..report.files import one_at_a_time


class Format(NamedTuple):
    """What Transformers calls an export format, what it and the runtime are told, and what must be installed."""

    name: str
    packages: tuple[str, ...] = ()
    options: dict = {}
    runtime: dict = {}
    # Memory is set aside for the largest input, so inputs have bounds: rows, and tokens of a text or a cache.
    rows: int | None = None
    tokens: int | None = None


FORMATS = {
    "onnx": Format("onnx", ("onnx", "onnxscript", "onnxruntime")),
    # Its cache comes in and goes out, as in the other formats. By itself it computes in bfloat16 on CPUs that can.
    "openvino": Format(
        "openvino", ("openvino",), {"stateful": False}, {"config": {"INFERENCE_PRECISION_HINT": "f32"}}
    ),
    "executorch": Format("executorch", ("executorch",), rows=4, tokens=512),
    "torch": Format("dynamo"),
}
TOLERANCE = 1e-4  # of the largest number in each output
TRACED = (2, 7)  # rows and tokens a program is made with; it is compared at others
COMPARED = ((1, 1), (3, 11))
STEPS = (1, 1, 3)  # tokens that follow, one step after the other


@one_at_a_time("output")
def export_program(
    source: str | Path,
    output: str | Path,
    export_format: str,
    *,
    revision: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, float]:
    """
    Write a model as a program that runs without its code, of any number of rows and tokens, in float32.

    The folder is one of Transformers' `ExportedModel.from_pretrained`, with tokenizer or image processor beside the
    program. What is written is loaded in its runtime and compared with the model on other numbers of rows and tokens
    than it was made with, with padding, and on several steps through the cache; only then is the folder renamed from
    its temporary name. A causal language model is one program, which takes and gives back the cache (an empty one,
    [`empty_cache`], begins a text); an encoder–decoder is three (`encoder`, `prefill`, `decode`); all others are one.

    Args:
        source: a SAS checkpoint folder or Hub id, or adapters of one.
        output: the new folder; must not exist, or be empty.
        export_format: one of `FORMATS`.
        revision: branch, tag or commit of a Hub source.
        progress: called with a line of text at each stage.

    Returns:
        The largest difference of each output, divided by its largest number.

    Raises:
        FileExistsError: if `output` holds something.
        FileNotFoundError: if there is no such checkpoint.
        ImportError: if the format's packages are missing; names what to install.
        ValueError: for an unknown format; if the source is no SAS model, or damaged; if the model cannot be written in
            this format, or what was written computes something else. Nothing is left behind in any of these cases.
    """
    if export_format not in FORMATS:
        raise ValueError(f"`format` is {export_format!r}; it must be one of {', '.join(FORMATS)}.")
    output, chosen = Path(output), FORMATS[export_format]
    refuse_existing(output)
    exporters, exporter = _exporter(export_format)

    with new_folder(output) as folder:
        progress(f"Loading {source}")
        model = load_whole(source, revision, dtype=torch.float32).eval()
        with torch.no_grad():
            parts = graphs_of(model)
        components = {}
        for name, graph in parts.graphs.items():
            progress(f"Writing {name} for {export_format}")
            config = exporter.config_class(**chosen.options, dynamic_shapes=_sizes(graph.inputs, chosen))
            with _refusing(f"{type(model).__name__} cannot be written for {export_format}"):
                components[name] = exporter.export(graph.module, dict(graph.inputs), config).components["model"]
            if isinstance(components[name].program, torch.export.ExportedProgram):
                _unbind(components[name].program)
        settings = model.generation_config if model.can_generate() else None
        exporters.ExportedModel(components, exporter.export_format, model.config, settings).save_pretrained(folder)
        for prepares in load_preparation(source, revision):
            if prepares is not None:
                prepares.save_pretrained(folder)

        progress("Comparing")
        with _refusing(f"The program of {type(model).__name__} for {export_format} does not run"):
            program = exporters.ExportedModel.from_pretrained(
                folder,
                trust_remote_code=True,  # of our own making
                **chosen.runtime,
            )
            differences = compare(parts, program.runners)
        worst = max(differences, key=differences.__getitem__)
        if not differences[worst] <= TOLERANCE:
            raise ValueError(
                f"The program of {type(model).__name__} for {export_format} computes something else: {worst} differs "
                f"by {differences[worst]:.1e} of its largest number, more than {TOLERANCE:.0e}. It is not kept."
            )
    return differences


def _unbind(program: torch.export.ExportedProgram) -> None:
    """Let a program forget what it was traced with: inputs, which are random and would be unpickled by whoever loads
    it, and what no size may fall below.

    torch.export takes each for 2 or more, so that a mask, of new tokens and those held, had to have 4.
    """
    program.example_inputs = None
    for size, bounds in program.range_constraints.items():
        program.range_constraints[size] = type(bounds)(0, bounds.upper)


class Graph(NamedTuple):
    """A module, and what it is traced with."""

    module: nn.Module
    inputs: dict[str, Any]


class Parts:
    """The graphs that a model is taken apart into, and a use of them, which the model's own modules and the written
    programs go through alike.

    Attributes:
        graphs: by the names of the programs.
    """

    graphs: dict[str, Graph]

    def use(self, run: dict[str, Callable[..., ModelOutput]], rows: int, length: int) -> Iterator[Mapping]:
        """What counts of the outputs of the graphs, called one after the other on random inputs, the same ones at
        each use."""
        raise NotImplementedError


class WholeModel(Parts):
    """One graph, from the inputs to what the model says of them."""

    def __init__(self, model: PreTrainedModel):
        self.config, kind = model.config, type(model).__name__
        self.sees, self.hides = "image" in model.input_modalities, kind.endswith("ForMaskedImageModeling")
        self.chooses = kind.endswith("ForMultipleChoice")
        if hasattr(self.config, "use_cache"):
            self.config.use_cache = False
        self.graphs = {"model": Graph(model, self.inputs(*TRACED))}

    def inputs(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        if self.sees:
            draw, (height, width) = _generator(), self.config.image_shape
            inputs = {"pixel_values": torch.randn(rows, self.config.num_channels, height, width, generator=draw)}
            if self.hides:
                inputs["bool_masked_pos"] = torch.rand(rows, math.prod(self.config.grid_shape), generator=draw) < 0.5
            return inputs
        inputs = texts(self.config.vocab_size, rows * 2 if self.chooses else rows, length)
        if getattr(self.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = (torch.arange(length) > length // 2).long() * inputs["attention_mask"]
        return {name: part.unflatten(0, (rows, 2)) for name, part in inputs.items()} if self.chooses else inputs

    def use(self, run, rows, length):
        yield run["model"](**self.inputs(rows, length))


class Decoder(Parts):
    """One graph, from tokens and the cache of all before to logits and the grown cache."""

    def __init__(self, model: PreTrainedModel):
        self.config = model.config
        rows, length = TRACED
        tokens = texts(self.config.vocab_size, rows, length + 3, left=True)
        new = {"input_ids": tokens["input_ids"][:, length:], "attention_mask": tokens["attention_mask"]}
        cache = model(**{name: part[:, :length] for name, part in tokens.items()}).get(CACHE_NAME)
        positions = positions_of(tokens["attention_mask"])[:, length:]
        self.graphs = {"model": Graph(model, {**new, "position_ids": positions, CACHE_NAME: cache})}

    def use(self, run, rows, length):
        tokens = texts(self.config.vocab_size, rows, length + sum(STEPS), left=True)
        positions, cache, seen = positions_of(tokens["attention_mask"]), empty_cache(self.config, rows), 0
        for step in (length, *STEPS):
            now = slice(seen, seen := seen + step)
            output = run["model"](
                input_ids=tokens["input_ids"][:, now],
                attention_mask=tokens["attention_mask"][:, :seen],
                position_ids=positions[:, now],
                **{CACHE_NAME: cache},
            )
            cache, real = output.get(CACHE_NAME), tokens["attention_mask"][:, :seen].bool()
            # Padding on the left sees nothing, where each runtime has another way to say so; nobody sees what comes.
            held = [[part.transpose(1, 2)[real] for part in (layer.keys, layer.values)] for layer in cache.layers]
            positions_held = [getattr(layer, "key_positions", real)[real] for layer in cache.layers]
            yield {"logits": output.logits[real[:, now]], CACHE_NAME: [held, positions_held]}


class EncoderDecoder(Parts):
    """Three graphs: the encoder; the decoder's first step, which reads the source; and those that follow, which find
    it in the cache."""

    def __init__(self, model: PreTrainedModel):
        self.config = model.config
        rows, length = TRACED
        source = texts(self.config.vocab_size, rows, length + 2)
        target = texts(self.config.decoder_vocab_size, rows, length + 3)["input_ids"]
        encoder = model.get_encoder()
        read = {"encoder_outputs": encoder(**source), "attention_mask": source["attention_mask"]}
        first = read | {"decoder_input_ids": target[:, :length]}
        cache = model(**first).get(CACHE_NAME)
        later = read | {"decoder_input_ids": target[:, length:], CACHE_NAME: cache}
        self.graphs = {
            "encoder": Graph(encoder, source),
            "prefill": Graph(model, first),
            "decode": Graph(model, later),
        }

    def use(self, run, rows, length):
        source = texts(self.config.vocab_size, rows, length + 4)
        target = texts(self.config.decoder_vocab_size, rows, length + sum(STEPS))["input_ids"]
        encoded = run["encoder"](**source)
        yield encoded
        read = {"encoder_outputs": encoded, "attention_mask": source["attention_mask"]}
        output, seen = run["prefill"](**read, decoder_input_ids=target[:, :length]), length
        yield output
        for step in STEPS:
            now = slice(seen, seen := seen + step)
            cache = {CACHE_NAME: output.get(CACHE_NAME)}
            output = run["decode"](**read, decoder_input_ids=target[:, now], **cache)
            yield output


def graphs_of(model: PreTrainedModel) -> Parts:
    if model.config.is_encoder_decoder:
        if not model.can_generate():
            raise ValueError(
                f"{type(model).__name__} has no head, and its decoder writes nothing; export one that has."
            )
        return EncoderDecoder(model)
    return Decoder(model) if model.can_generate() and model.config.is_causal else WholeModel(model)


def texts(vocab_size: int, rows: int, length: int, left: bool = False) -> dict[str, torch.Tensor]:
    """Random tokens, each row with two more tokens of padding than the one before, on one side."""
    tokens = torch.randint(vocab_size, (rows, length), generator=_generator())
    padding = (2 * torch.arange(rows)).clamp(max=length - 2)[:, None]
    place = torch.arange(length).expand(rows, -1)
    return {"input_ids": tokens, "attention_mask": (place >= padding if left else place < length - padding).long()}


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Of tokens padded on the left, as `generate` counts them."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def empty_cache(config: PreTrainedConfig, rows: int = 1) -> DynamicCache:
    """The cache with which the program of a causal language model begins `rows` texts."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
        filled = model(input_ids=torch.zeros(rows, 1, dtype=torch.long), use_cache=True).get(CACHE_NAME)
    cache = DynamicCache(config=config)
    for index, layer in enumerate(filled.layers):
        keys, values = (torch.zeros(*part.shape[:2], 0, part.shape[3]) for part in (layer.keys, layer.values))
        cache.update(keys, values, index)
        empty: Any = cache.layers[index]
        if hasattr(layer, "key_positions"):
            empty.__class__ = type(layer)
            empty.key_positions = torch.zeros(rows, 0, dtype=torch.long)
    return cache


@torch.no_grad()
def compare(parts: Parts, programs: dict[str, Callable[..., ModelOutput]]) -> dict[str, float]:
    """The largest difference of each output of the programs from the modules', divided by its largest number;
    infinite for another shape, other whole numbers or an output that is missing."""
    leaves = importlib.import_module("transformers.exporters.utils").get_leaf_tensors
    differences: dict[str, float] = {}
    for case in COMPARED:
        modules: dict[str, Callable[..., ModelOutput]] = {name: graph.module for name, graph in parts.graphs.items()}
        # Caches grow as they are used: what they hold at each step is taken before the next.
        expected, found = ([leaves(output) for output in parts.use(run, *case)] for run in (modules, programs))
        for truth, answer in zip(expected, found, strict=True):
            for name in truth | answer:
                output = name.partition(".")[0]
                differences[output] = max(differences.get(output, 0.0), _difference(truth.get(name), answer.get(name)))
    return differences


def _difference(truth: torch.Tensor | None, answer: torch.Tensor | None) -> float:
    if truth is None or answer is None or truth.shape != answer.shape:
        return math.inf
    if not truth.is_floating_point():
        return 0.0 if torch.equal(truth, answer) else math.inf
    if not truth.numel():
        return 0.0
    difference = ((truth - answer).abs().max() / truth.abs().max().clamp(min=1e-12)).item()
    return math.inf if math.isnan(difference) else difference


def _sizes(inputs: dict[str, Any], chosen: Format) -> dict[str, Any]:
    """What may vary in the inputs: rows and tokens."""
    find = importlib.import_module("transformers.exporters.exporter_dynamo").get_auto_dynamic_shapes
    rows = Dim.AUTO if chosen.rows is None else Dim.AUTO(max=chosen.rows)
    tokens = Dim.AUTO if chosen.tokens is None else Dim.AUTO(max=chosen.tokens)
    both = Dim.AUTO if chosen.tokens is None else Dim.AUTO(max=2 * chosen.tokens)

    def varying(name: str, shape):
        if not isinstance(shape, dict):
            return shape if shape is None else type(shape)(varying(name, part) for part in shape)
        if name in ("pixel_values", "bool_masked_pos"):
            return {0: rows}
        if name == "attention_mask":
            return {axis: both if axis else rows for axis in shape}
        if len(shape) == 4:  # of a cache
            return {0: rows, 2: tokens}
        if name == "encoder_outputs":
            return {0: rows, 1: tokens}
        return {axis: tokens if axis else rows for axis in shape}

    return {name: varying(name, find(value)) for name, value in inputs.items()}


def _exporter(export_format: str):
    """Transformers' exporters, and the one of this format."""
    try:
        exporters = importlib.import_module("transformers.exporters")
        auto = importlib.import_module("transformers.exporters.auto")
        exporters.ExportedModel, auto.get_exporter_class  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"Programs are written by the exporters of Transformers 5.23 or newer, but {transformers.__version__} is "
            "installed: pip install -U transformers."
        ) from error
    missing = [name for name in FORMATS[export_format].packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"`format` {export_format!r} needs {', '.join(missing)}: pip install 'sas_hf[{export_format}]'."
        )
    return exporters, auto.get_exporter_class(FORMATS[export_format].name)()


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Say in one line what an exporter or a runtime could not do, whatever it raises."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        reason = next((line.strip() for line in str(first).splitlines() if line.strip()), "no reason given")
        raise ValueError(f"{what}: {type(first).__name__}: {reason}") from first
