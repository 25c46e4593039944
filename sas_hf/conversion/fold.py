"""Folding: a linear simulation is a product of matrices, so it fits into the projections of a plain attention.

What comes out is a Llama, which every engine knows, or a GPT-2 or GPT-NeoX where heads are no wider than there. It is
verified as a conversion is.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..hub.card import folding_card
from ..hub.checkpoints import CARD_NAME, REPORT_NAME, new_folder
from ..hub.dtypes import parse_dtype
from ..hub.info import cache_numbers_per_token
from ..modeling import SASGPTConfig
from ..modeling.attention import SASAttention
from ..modeling.positions import SASRotaryEmbedding
from ..modeling.sharing import config_class_of
from ..modeling.simulation import is_linear
from ..report.files import one_at_a_time
from .checkpoint import check_output, comparison_report
from .convert import NO_SIMULATION, sas_config
from .family import ConversionError, SourceFamily
from .fidelity import Fidelity, compare_models
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .llama import LLAMA
from .restore import LABELS, architecture_of, model_of_family
from .sas_checkpoint import find_sas_class, open_sas_checkpoint
from .sources import DTYPES, check_space, files_left_out, load_whole_model, read_stored_weights
from .written import check_rounding, verify_written, write_checkpoint


LINEAR_KINDS = ("mha", "mqa", "gqa", "optimised", "efficient")
NOT_LINEAR = {
    "mla": "its latents are normed",
    "tpa": "its queries, keys and values are products of two factors of the input",
    "super": "its values are mixed along the tokens",
}
# Of a model without simulation, what no output in evaluation depends on.
UNSEEN = {
    "attention_dropout",
    "hidden_dropout",
    "initializer_range",
    "simulation_act",
    "simulation_cache",
    "simulation_init",
    "simulation_kernel_size",
    "recompute_simulation",
    "compile_simulation",
    "token_mixing_init",
    "q_rank",
    "k_rank",
    "v_rank",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "transformers_version",
    "use_cache",
}
STILL = 1e20  # what divides the frequency of a pair that is not to turn: no position reaches an angle that counts
TOKENS_AT_ONCE = 512  # that go through a layer
FREQUENCY_TOLERANCE = 1e-5  # relative; float32's own rounding of them is 1e-6


@dataclass(frozen=True)
class Target:
    """
    An architecture to fold into.

    Args:
        family: says what it can express.
        activations: of the feed-forward block, that its engines compute; some look at no field for it.
        own_fields: of its configuration, from the folded SAS configuration.
        turns_all: RoPE turns all features of a head there.
        divides: `num_attention_heads` must divide `hidden_size`, whatever `head_dim` is.
    """

    family: SourceFamily
    activations: tuple[str, ...]
    own_fields: Callable[[SASGPTConfig], dict]
    turns_all: bool = False
    divides: bool = False


def llama_fields(config: SASGPTConfig) -> dict:
    fields = {"head_dim": config.head_dim}
    if config.rope_parameters is not None and config.rope_parameters["rope_type"] == "llama3":
        # llama.cpp looks for it outside `rope_parameters`.
        fields["original_max_position_embeddings"] = config.rope_parameters["original_max_position_embeddings"]
    return fields


TARGETS = (
    Target(LLAMA, ("silu",), llama_fields, turns_all=True, divides=True),
    Target(GPT2, ("gelu_new", "gelu_pytorch_tanh"), lambda config: {"n_inner": config.intermediate_size}),
    Target(GPT_NEOX, ("gelu",), lambda config: {}),
)


@dataclass(frozen=True)
class Folding:
    """
    Where a SAS model is folded to.

    Args:
        family, architecture: of the result.
        plain: the SAS configuration without simulation that computes the same.
        config: the result's.
        places: where each feature of a simulated query or key stands among the folded ones.
    """

    family: SourceFamily
    architecture: str
    plain: SASGPTConfig
    config: PreTrainedConfig
    places: list[int]


@one_at_a_time("output", check=check_output)
def fold_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    text: str | None = None,
    windows: int = 8,
    window_length: int = 256,
    progress: Callable[[str], None] = lambda message: None,
) -> dict:
    """Write a SAS decoder whose simulation is linear as a plain one of Ĥ heads, in an architecture of Transformers.

    The maps are multiplied in float64. What was written is loaded again and compared with the whole checkpoint in
    float32, to the tolerance of a conversion. A `dtype` of less than float32 rounds the products: then they are
    compared before they are rounded, what was written is compared with them rounded, and the report says how far that
    is from the checkpoint as it is.

    Args:
        checkpoint: a local folder or Hub id of a SAS decoder: without simulation, or with `simulation_act="identity"`.
        output: the new checkpoint folder; must not exist, or be empty.
        revision: branch, tag or commit of a Hub repository.
        dtype: of the saved weights: "float32", "bfloat16", "float16" or "float64"; by default the checkpoint's own.
        text, windows, window_length: to verify on, as in `convert_checkpoint`.
        progress: called with a line of text at each stage.

    Returns:
        the report, also written to `fidelity.json`.

    Raises:
        FileExistsError: if `output` holds something.
        BlockingIOError: while another process writes it.
        FileNotFoundError: if `checkpoint` has no configuration or no weights.
        ConversionError: if it is no SAS decoder, its attention is not linear before the scores, no known architecture
            has the rest of it, it is damaged, or the result is not exact. Nothing is left behind.
        ValueError: for options that do not fit.
        OSError: if the disk is too small or full.
    """
    started, output = time.monotonic(), Path(output)
    nearest = check_output(output)
    if dtype is not None and parse_dtype(dtype) not in DTYPES.values():
        raise ValueError(f"`dtype` is {dtype!r}; a checkpoint is saved in float32, bfloat16, float16 or float64.")
    sas_class = find_sas_class(checkpoint, revision)
    config = config_class_of(sas_class).from_pretrained(checkpoint, revision=revision or "main")
    folding = find_folding(sas_class, config)
    opened = open_sas_checkpoint(checkpoint, revision, sas_class, text, None, windows, window_length)

    progress(f"Loading {checkpoint}")
    stored = read_stored_weights(checkpoint, revision)
    saved_dtype = stored.widest_dtype(opened.config) if dtype is None else parse_dtype(dtype)
    check_space(nearest, _parameters(folding, sas_class), saved_dtype)
    model, _, _ = load_whole_model(sas_class, checkpoint, revision, opened.config, stored)

    progress(f"Folding into {folding.architecture}")
    folded = fold_model(model, folding, torch.float64 if saved_dtype == torch.float64 else torch.float32)
    target_class = type(folded)
    check_rounding(folded, saved_dtype)
    rounds = saved_dtype.itemsize < 4
    before_rounding = None
    if rounds:
        progress("Comparing both models before they are rounded")
        before_rounding = compare_models(model, folded, opened.samples)
        _require_exact(before_rounding)

    with new_folder(output) as folder:
        progress(f"Saving {output}")
        write_checkpoint(folded, folder, saved_dtype, opened.processor, checkpoint, revision)
        rounded = folded if rounds else None
        del folded

        progress("Comparing both models")
        verification = verify_written(folder, target_class, model, opened.samples, saved_dtype, rounded=rounded)
        _require_exact(verification.fidelity)
        plain = folding.plain
        report = comparison_report(
            checkpoint, revision, model, target_class, verification, opened.verified_on, saved_dtype, started
        ) | {
            "folded": {
                "num_attention_heads": plain.num_attention_heads,
                "num_key_value_heads": plain.num_key_value_heads,
                "head_dim": plain.head_dim,
                "rope_parameters": plain.rope_parameters,
            },
            "before_rounding": None if before_rounding is None else before_rounding.to_dict(),
            "cached_numbers_source": cache_numbers_per_token(cast(SASGPTConfig, opened.config)),
            "cached_numbers": cache_numbers_per_token(plain),
            "files_left_out": files_left_out(checkpoint, revision, folder),
            "sentence_modules": opened.sentence_modules,
        }
        if rounds:
            saved = report["dtype_saved"]
            report["exact_to"] = f"the source's weights, folded and rounded to {saved}"
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        folding_card(report, opened.card).save(folder / CARD_NAME)
    return report


def _require_exact(fidelity: Fidelity) -> None:
    if not fidelity.is_exact:
        raise ConversionError(
            f"The folded model is not exact: max |difference| is {fidelity.max_abs_difference:.3g}, but at most "
            f"{fidelity.tolerance:.3g} is allowed (source eager against SDPA: "
            f"{fidelity.source_eager_sdpa_difference:.3g}). Nothing was written."
        )


def find_folding(sas_class: type[PreTrainedModel], config: PreTrainedConfig) -> Folding:
    """Where a SAS model of this class and configuration is folded to; no weights are looked at.

    Raises:
        ConversionError: if it cannot be; the message says why, for each architecture.
    """
    check_linear(sas_class, config)
    reasons = []
    for target in TARGETS:
        try:
            return _folding_to(target, sas_class, cast(SASGPTConfig, config))
        except ConversionError as error:
            reasons.append(f"{target.family.model_type}: {error}")
    raise ConversionError(
        "No architecture that engines know has the heads and the rest of this model. "
        + " ".join(reasons)
        + " Serve it by its own code: `sas-hf serve`, vLLM with sas_hf, `sas-hf export`."
    )


def check_linear(sas_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Raise a [`ConversionError`] unless queries, keys and values are affine maps of a decoder layer's input."""
    if not isinstance(config, SASGPTConfig):
        raise ConversionError(
            f"Decoders are folded, but this is a {sas_class.__name__}: native encoders, encoder-decoders and ViTs "
            "have heads of `hidden_size` / `num_attention_heads` features, which simulated ones do not fit into."
        )
    kind, act = config.attention_type, config.simulation_act
    if kind not in LINEAR_KINDS:
        raise ConversionError(f"`attention_type` is {kind!r}: {NOT_LINEAR[kind]}, which is not linear.")
    if config.qk_norm is not None:
        raise ConversionError(
            f"`qk_norm` is {config.qk_norm!r}: queries and keys are normed before they are simulated, which is not "
            "linear."
        )
    if config.simulates and not is_linear(act):
        raise ConversionError(
            f"`simulation_act` is {act!r}, so the simulation is not linear and no product of matrices computes it. "
            "Serve the model by its own code (`sas-hf serve`, vLLM with sas_hf, `sas-hf export`); only one trained "
            "with `simulation_act` 'identity' can be folded."
        )
    if config.no_rope_layers is not None and not all(config.no_rope_layers):
        raise ConversionError(
            f"`no_rope_layers` is {config.no_rope_layers}: some layers turn nothing, which no architecture has that "
            "all engines know."
        )


def _folding_to(target: Target, sas_class: type[PreTrainedModel], config: SASGPTConfig) -> Folding:
    """As [`find_folding`], to one architecture."""
    family = target.family
    architecture = architecture_of(family, sas_class)
    if config.hidden_act not in target.activations:
        raise ConversionError(
            f"`hidden_act` is {config.hidden_act!r}, but engines compute {' or '.join(target.activations)} there."
        )
    plain, places = _without_simulation(config, target)
    kept = {name: getattr(config, name) for name in LABELS}
    try:
        folded = AutoConfig.for_model(
            family.model_type, **family.source_fields(plain) | target.own_fields(plain) | kept
        )
    except StrictDataclassError as error:
        raise ConversionError(f"{error.__cause__ or error}") from error
    unused = "layer_norm_eps" if plain.norm_type == "rms_norm" else "rms_norm_eps"
    wanted, found = plain.to_dict(), sas_config(folded, family, NO_SIMULATION, architecture).to_dict()
    differing = sorted(
        name
        for name in wanted.keys() & found.keys() - UNSEEN - {unused}
        if not name.startswith("_") and wanted[name] != found[name]
    )
    if differing:
        told = "; ".join(f"`{name}` can only be {found[name]!r}, not {wanted[name]!r}" for name in differing)
        raise ConversionError(f"{told}.")
    return Folding(family, architecture, plain, folded, places)


def _without_simulation(config: SASGPTConfig, target: Target) -> tuple[SASGPTConfig, list[int]]:
    """The SAS configuration of the folded model, and the places of the simulated features."""
    head_dim, turned, rope = cast(int, config.head_dim), config.rotary_dim, cast(dict | None, config.rope_parameters)
    width = config.simulated_head_dim or head_dim
    simulated, places = width, list(range(width))
    if rope is not None and target.turns_all:
        width += width % 2
        rope = rope_of_all(config, width)
        places = places_beside(turned, width)[:simulated]
    elif rope is not None:
        rope = rope | {"partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) * head_dim / width}
    heads = config.num_simulated_heads or config.num_attention_heads
    group = 1 if config.num_simulated_heads else heads // cast(int, config.num_key_value_heads)
    if target.divides:
        heads = _heads_that_divide(config.hidden_size, heads, group)
    bias = target.family.constants.get(
        "attention_bias", config.simulates or config.attention_bias or config.attention_output_bias
    )
    plain = SASGPTConfig.from_dict(
        config.to_dict()
        | {
            "attention_type": "mha",
            "num_attention_heads": heads,
            "num_key_value_heads": heads // group,
            "head_dim": width,
            "num_simulated_heads": None,
            "simulated_head_dim": None,
            "simulate_value_features": False,
            "head_aggregation": "mean",
            "simulation_kernel_size": 1,
            "query_pre_attn_scalar": width,
            "attention_bias": bool(bias),
            "attention_output_bias": bool(bias),
            "no_rope_layers": None,
            "rope_parameters": rope,
        }
    )
    return plain, places


def _heads_that_divide(hidden_size: int, heads: int, group: int) -> int:
    """The least number of heads, in groups that share a key/value head, that divides the hidden size; those more than
    there are will be zero."""
    fitting = [count for count in range(heads, hidden_size + 1) if hidden_size % count == 0 == count % group]
    if not fitting:
        raise ConversionError(
            f"no number of heads from {heads} on, in groups of {group}, divides `hidden_size` ({hidden_size})."
        )
    return fitting[0]


def rope_of_all(config: SASGPTConfig, width: int) -> dict:
    """RoPE parameters that turn the pairs of `width` features as `config` turns its leading features, and leave the
    others where they are.

    Llama 3's scaling divides the frequencies of long waves, and leaves those of short ones: with the base raised so
    that the leading pairs keep theirs, and a boundary behind the last of them, all others stand still. Every engine
    has it.

    Raises:
        ConversionError: if there is no such RoPE.
    """
    turned, rope, head_dim = config.rotary_dim, cast(dict, config.rope_parameters), cast(int, config.head_dim)
    if turned == width:
        return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}
    if rope["rope_type"] != "default":
        raise ConversionError(
            f"`rope_parameters` scale RoPE ({rope['rope_type']!r}) and turn {turned} of {width} features: a Llama "
            "turns all, and holds some still by a scaling of its own, of which it has one."
        )
    if turned == 0 or int(head_dim * rope.get("partial_rotary_factor", 1.0)) % 2:
        raise ConversionError(
            f"`rope_parameters` turn `head_dim` ({head_dim}) x `partial_rotary_factor` "
            f"({rope.get('partial_rotary_factor', 1.0)}) features, which must be an even number above 0."
        )
    last, first_still = (
        2 * math.pi * rope["rope_theta"] ** (pair * 2 / turned) for pair in (turned // 2 - 1, turned // 2)
    )
    context = max(1, min(8192, config.max_position_embeddings - 1))
    found = {
        "rope_type": "llama3",
        "rope_theta": float(rope["rope_theta"] ** (width / turned)),
        "factor": STILL,
        "low_freq_factor": context / (last ** (1 / 3) * first_still ** (2 / 3)),
        "high_freq_factor": context / (last ** (2 / 3) * first_still ** (1 / 3)),
        "original_max_position_embeddings": context,
    }
    _check_frequencies(config, width, found)
    return found


def _check_frequencies(config: SASGPTConfig, width: int, rope: dict) -> None:
    """Texts to verify on are short: at distant positions, frequencies that are a little off would show."""
    wanted = SASRotaryEmbedding(config).inv_freq
    as_llama = AutoConfig.for_model(
        "llama",
        head_dim=width,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=rope,
    )
    found, factor = ROPE_INIT_FUNCTIONS["llama3"](as_llama, "cpu")
    pairs = len(wanted)
    turns_alike = torch.allclose(found[:pairs], wanted, rtol=FREQUENCY_TOLERANCE, atol=0)
    if factor != 1 or not turns_alike or found[pairs:].max() > 1 / STILL:
        rope_theta = cast(dict, config.rope_parameters)["rope_theta"]
        raise ConversionError(
            f"`rope_theta` {rope_theta} leaves no boundary between {config.rotary_dim} "
            f"turned features and the {width - config.rotary_dim} others."
        )


def places_beside(turned: int, width: int) -> list[int]:
    """Places of features, the leading `turned` of which RoPE turns in pairs (i, i + turned/2), among `width` features
    that it would turn in pairs (i, i + width/2)."""
    rotating = [*range(turned // 2), *range(width // 2, width // 2 + turned // 2)]
    return rotating + [place for place in range(width) if place not in set(rotating)]


def _parameters(folding: Folding, sas_class: type[PreTrainedModel]) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in sas_class(folding.plain).parameters())


def fold_model(model: PreTrainedModel, folding: Folding, dtype: torch.dtype) -> PreTrainedModel:
    """The folded model, whose attention is in this dtype; all other weights are shared with the loaded `model`."""
    weights = {name: weight for name, weight in model.state_dict().items() if ".self_attn." not in name}
    for name, module in model.named_modules():
        if isinstance(module, SASAttention):
            folded = fold_attention(module, folding.plain, folding.places)
            weights |= {f"{name}.{part}": weight.to(dtype) for part, weight in folded.items()}
    return model_of_family(folding.family, folding.architecture, folding.config, weights, model)


@torch.no_grad()
def fold_attention(layer: SASAttention, plain: SASGPTConfig, places: list[int]) -> Mapping[str, torch.Tensor]:
    """The weights of a plain layer that computes what `layer` does, in float64.

    What the layer makes of zeros is a bias, and what it makes of the unit vectors, less that, are the columns of a
    matrix: its own code says what is folded, whatever it is.
    """
    layer = copy.deepcopy(layer).to(torch.float64)
    heads, kv_heads = plain.num_attention_heads, cast(int, plain.num_key_value_heads)
    width = cast(int, plain.head_dim)
    scale = math.sqrt(width / layer.scaling**-2)
    sides = {
        "q": (lambda x: layer.q_simulation(layer.project_queries(x)), places, scale),
        "k": (lambda x: layer.k_simulation(layer.expand(*layer.project_state(x))[0]), places, 1.0),
        "v": (
            lambda x: layer.v_simulation(layer.expand(*layer.project_state(x))[1]),
            list(range(layer.value_head_dim)),
            1.0,
        ),
    }
    weights = {}
    for side, (heads_of, at, factor) in sides.items():
        matrix, bias = _affine(heads_of, plain.hidden_size, layer.o_proj.weight.device)
        count = heads if side == "q" else kv_heads
        weights[f"{side}_proj.weight"] = _placed(matrix * factor, count, at, width).flatten(0, 1)
        weights[f"{side}_proj.bias"] = _placed(bias * factor, count, at, width).flatten()
    # The groups' mean is W^O beside itself, divided by their number; columns of padded values and heads are zero.
    output = layer.o_proj.weight.T.unflatten(0, (-1, layer.value_head_dim))
    if not layer.concatenates:
        output = output.repeat(layer.num_simulated_groups, 1, 1)
    output = output / layer.num_simulated_groups
    output = _placed(output, heads, list(range(layer.value_head_dim)), width)
    weights["o_proj.weight"] = output.flatten(0, 1).T
    bias = layer.o_proj.bias
    weights["o_proj.bias"] = torch.zeros(plain.hidden_size).to(output) if bias is None else bias
    if plain.attention_bias:
        return weights
    return {name: weight for name, weight in weights.items() if not name.endswith(".bias")}


def _affine(
    heads_of: Callable[[torch.Tensor], torch.Tensor], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix `[heads, features, C]` and bias `[heads, features]` of an affine map `[1, T, C]` to heads
    `[1, T, heads, features]`."""
    bias = heads_of(torch.zeros(1, 1, width, dtype=torch.float64, device=device))[0, 0]
    units = torch.eye(width, dtype=torch.float64, device=device)
    columns = torch.cat([heads_of(part[None])[0] - bias for part in units.split(TOKENS_AT_ONCE)])
    return columns.permute(1, 2, 0), bias


def _placed(heads: torch.Tensor, count: int, places: list[int], width: int) -> torch.Tensor:
    """Features `[heads, features, ...]` at their places among `width` in the first of `count` heads; all else zero."""
    placed = heads.new_zeros(count, width, *heads.shape[2:])
    placed[: len(heads), places] = heads
    return placed
