"""The conversion itself: a loaded source model in, a SAS model that computes the same (or near it, if lossy) out."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.positions import SASRotaryEmbedding
from ..modeling.simulation import FeatureSimulation, HeadSimulation, is_linear, simulation_activation
from .bart import BART, MBART
from .bert import BERT
from .deit import DEIT
from .distilbert import DISTILBERT
from .family import ConversionError, SourceFamily
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .helium import HELIUM
from .live import check_live_source, lacks_pooler
from .llama import LLAMA
from .lossy import LOSSY, fit_attention, lossy_fields
from .marian import MARIAN
from .mistral import MISTRAL
from .olmo2 import OLMO2
from .phi import PHI
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from .smollm3 import SMOLLM3
from .start import largest_perturbation, outputs_of_groups, start_as_source
from .vit import VIT


TEXT_FAMILIES = (GPT2, GPT_NEOX, HELIUM, LLAMA, MISTRAL, OLMO2, PHI, QWEN2, QWEN3, SMOLLM3)
ENCODER_FAMILIES = (BERT, CAMEMBERT, DISTILBERT, ROBERTA, XLM_ROBERTA)
SEQ2SEQ_FAMILIES = (BART, MARIAN, MBART)
FAMILIES = {family.model_type: family for family in (*TEXT_FAMILIES, *ENCODER_FAMILIES, *SEQ2SEQ_FAMILIES, DEIT, VIT)}

# Why some that are asked for often cannot be.
RELATIVE = (
    "its scores have a bias that depends on the distance of two tokens, for which the SAS attention has no place"
)
REFUSED = dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers", "mpnet"), RELATIVE) | {
    "deberta": "its scores have terms of relative positions, for which the SAS attention has no place",
    "deberta-v2": "its scores have terms of relative positions, for which the SAS attention has no place",
    "albert": "its layers share their weights, but the SAS model's are each one's own",
    "encoder-decoder": "it is two models in one folder, whose decoder is an encoder's architecture with "
    "cross-attention added; only encoder-decoders that are one model are converted",
    "speech-encoder-decoder": "its source is sound, but the SAS model's is text",
    "vision-encoder-decoder": "its source is images, but the SAS model's is text",
    "whisper": "its source is sound, but the SAS model's is text",
}


@dataclass(frozen=True)
class ConversionOptions:
    """How large the simulation is and how it starts.

    Args:
        num_simulated_heads: Ĥ; `None`: three times the source's heads, 0: no head simulation.
        simulated_head_dim: D̂; `None`: one and a half times the source's head size, 0: no feature simulation.
        simulation_kernel_size: κ, odd.
        perturbation: size of the simulated value heads' deviations, relative to their base head. They cancel in the
            output whatever their size; the larger, the sooner the copies of a head part in training. At most
            3·√(kv heads·κ): single deviations are kept below 3, to be exact in bfloat16.
        seed: of those deviations and the extra key features.
        lossy: name of a lossy conversion, which computes something near its source: "optimised" or "efficient"
            attention, "gqa" (key/value heads merged) or "mla"; it has no simulation unless sizes are given. `None`:
            exact.
        num_key_value_heads: of "gqa".
        kv_lora_rank: of "mla"; by default a third of the hidden size.
        simulate_value_features: features of values, too, are simulated.
        head_aggregation: "mean" (PEAA), or "concat": the output projection once for each group of simulated heads.
        simulation_act: activation within the simulation: "relu" (the paper's), "identity" (linear, which
            `fold_checkpoint` takes back to a plain model after training), or one of Transformers'.
    """

    num_simulated_heads: int | None = None
    simulated_head_dim: int | None = None
    simulation_kernel_size: int = 1
    perturbation: float = 1.0
    seed: int = 0
    lossy: str | None = None
    num_key_value_heads: int | None = None
    kv_lora_rank: int | None = None
    simulate_value_features: bool = False
    head_aggregation: str = "mean"
    simulation_act: str = "relu"

    def fields(self, num_heads: int, head_dim: int) -> dict:
        """The simulation fields of the SAS configuration for a source with heads of this number and size."""
        heads, features = self.num_simulated_heads, self.simulated_head_dim
        if self.lossy is not None:
            heads, features = heads or 0, features or 0
        return {
            "num_simulated_heads": 3 * num_heads if heads is None else heads or None,
            "simulated_head_dim": head_dim * 3 // 2 if features is None else features or None,
            "simulate_value_features": self.simulate_value_features,
            "simulation_kernel_size": self.simulation_kernel_size,
            "head_aggregation": self.head_aggregation,
            "simulation_act": self.simulation_act,
        }


NO_SIMULATION = ConversionOptions(num_simulated_heads=0, simulated_head_dim=0)


def convert_model(
    source: PreTrainedModel,
    options: ConversionOptions | None = None,
    calibration: Sequence[torch.Tensor] | None = None,
) -> PreTrainedModel:
    """Make a SAS model that computes the function of a loaded `source`, in its dtype and on its device.

    The weights are copied; `source` is left as it is. It must be what its class makes of its configuration: what was
    put into it besides (hooks, adapters, other modules, more or fewer layers) has no place in the result.

    Args:
        calibration: for a lossy conversion, token ids `[1, T]` of the texts that it is fitted on; some ten times as
            many tokens as the source has hidden features.

    Raises:
        ConversionError: if the architecture is not supported, or if `source` is not what its configuration says.
        ValueError: if the options do not fit the source; if `calibration` is missing, or given for nothing.
    """
    return convert(source, options or ConversionOptions(), share=False, calibration=calibration)


def convert(
    source: PreTrainedModel,
    options: ConversionOptions,
    share: bool,
    calibration: Sequence[torch.Tensor] | None = None,
) -> PreTrainedModel:
    """As [`convert_model`]; with `share`, source weights are shared with the result, not copied."""
    family = find_family(source.config.model_type)
    if type(source).__name__ not in family.architectures:
        merge = " Merge the adapter first: `merge_and_unload()`." if hasattr(source, "merge_and_unload") else ""
        raise ConversionError(
            f"{type(source).__name__} has no SAS counterpart; convertible are {', '.join(family.architectures)}."
            f"{merge}"
        )
    check_live_source(source)
    config = sas_config(source.config, family, options, type(source).__name__, lacks_pooler(source))
    if (options.lossy is None) != (not calibration):
        wrong = "is fitted on `calibration`, which is missing" if options.lossy else "has nothing to do with it"
        raise ValueError(f"`calibration`: a conversion with `lossy={options.lossy!r}` {wrong}.")
    tokens = sum(ids.numel() for ids in calibration or ())
    if options.lossy is not None and tokens < config.hidden_size:
        raise ValueError(
            f"`calibration` has {tokens} tokens; to fit maps of {config.hidden_size} features takes at least as many, "
            "better thirty times as many."
        )
    with torch.device("meta"):
        model = family.architectures[type(source).__name__](config)
    weights = family.sas_weights(source)
    if options.lossy is not None:
        weights = {name: weight for name, weight in weights.items() if ".self_attn." not in name}
    weights |= outputs_of_groups(model, weights)
    if not share:
        weights = {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}
    absent, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    made = ".self_attn." if options.lossy is not None else "_simulation."
    absent = [name for name in absent if made not in name]
    if unexpected or absent:
        raise ConversionError(f"Weights do not match: missing {absent[:5]}, unexpected {unexpected[:5]}.")
    _materialise(model, source)
    start_as_source(model, options.perturbation, options.seed)
    model.tie_weights()
    if options.lossy is not None and calibration is not None:
        fit_attention(convert(source, NO_SIMULATION, share=True), model, LOSSY[options.lossy], calibration)
    if model.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


def _materialise(model: PreTrainedModel, like: PreTrainedModel) -> None:
    """Give what is still on the meta device memory: simulation weights, to be set, its activations, which may have
    numbers of their own, and rotary buffers, computed."""
    for module in model.modules():
        if isinstance(module, (HeadSimulation, FeatureSimulation)):
            module.act = simulation_activation(model.config.simulation_act).to(like.device, like.dtype)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=like.device, dtype=like.dtype)
                module.register_parameter(name, torch.nn.Parameter(empty))
    if getattr(model.base_model, "rotary_emb", None) is not None:
        rotary = SASRotaryEmbedding(model.config).to(like.device)
        model.base_model.rotary_emb = rotary
        given = cast(SASRotaryEmbedding, like.base_model.rotary_emb).inv_freq
        if rotary.inv_freq.dtype != given.dtype and torch.equal(rotary.inv_freq.to(given.dtype), given):
            rotary.inv_freq = given.clone()  # of a model that was cast with its buffers: `model.bfloat16()`
        elif rotary.rope_type not in ("dynamic", "longrope") and not torch.equal(rotary.inv_freq, given):
            raise ConversionError(
                "The source's rotary frequencies (`rotary_emb.inv_freq`) are not those of its `rope_parameters` "
                f"({like.config.rope_parameters}); set what was meant there."
            )


def sas_config(
    config: PreTrainedConfig,
    family: SourceFamily,
    options: ConversionOptions,
    architecture: str,
    without_pooler: bool = False,
) -> PreTrainedConfig:
    """The configuration of the model converted from a source of this class.

    Args:
        without_pooler: the source lacks the pooler that its class may have.

    Raises:
        ConversionError: if the source has something that no field expresses.
        ValueError: if the options do not fit.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError("The source is quantised (`quantization_config`); convert the model it was made from.")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    config_class = family.config_class
    shared = ["id2label", "label2id", "problem_type", "dtype"]
    if not config.is_encoder_decoder:  # which have no classifier here
        shared.append("classifier_dropout")
    kept = {name: getattr(config, name) for name in shared if getattr(config, name, None) is not None}
    fields = {"head_dim": head_dim, "query_pre_attn_scalar": head_dim} | kept | family.sas_fields(config, architecture)
    if without_pooler:
        if family.without_pooler is None:
            raise ConversionError(f"The source has no pooler (`add_pooling_layer=False`), but a {architecture} has.")
        fields |= family.without_pooler
    fields |= lossy_fields(config_class(**fields), options)
    converted = config_class(**fields, **options.fields(heads, head_dim))
    check_options(options, converted)
    return converted


def check_options(options: ConversionOptions, config: PreTrainedConfig) -> None:
    """Raise a `ValueError` for options of the start that are out of range, or that a model of this configuration would
    do nothing with."""
    heads, kernel = config.num_simulated_heads, config.simulation_kernel_size
    most = largest_perturbation(config.num_key_value_heads, kernel)
    if not (math.isfinite(options.perturbation) and 0 <= options.perturbation <= most):
        raise ValueError(
            f"`perturbation` is {options.perturbation}; it must be from 0 to {most:.3g}, where {kernel} x "
            f"{config.num_key_value_heads} weights to a simulated value head are at their bound of 3."
        )
    if heads is None and kernel != ConversionOptions.simulation_kernel_size:
        raise ValueError(
            f"`simulation_kernel_size` ({kernel}) is of simulated heads, but there are none; leave it out."
        )
    if options.perturbation not in (0, ConversionOptions.perturbation):
        if heads is None:
            raise ValueError(
                f"`perturbation` ({options.perturbation}) is of simulated heads, but there are none; leave it out."
            )
        if heads == config.num_attention_heads:
            raise ValueError(
                f"`perturbation` ({options.perturbation}) makes copies of a head differ, but `num_simulated_heads` "
                f"({heads}) gives each one copy; leave it out, or take a multiple such as {2 * heads}."
            )
    if options.lossy is not None and options.head_aggregation != ConversionOptions.head_aggregation:
        raise ValueError(
            f"`head_aggregation` is {options.head_aggregation!r}, but a lossy conversion fits one output projection "
            "for all groups; leave it out."
        )
    if options.simulation_act != ConversionOptions.simulation_act and not config.simulates:
        raise ValueError(
            f"`simulation_act` is {options.simulation_act!r}, of the simulation, but there is none; leave it out."
        )
    copies = heads not in (None, config.num_attention_heads) and options.perturbation != 0
    if copies and is_linear(config.simulation_act) and kernel == config.num_key_value_heads == 1:
        raise ValueError(
            f"`simulation_act` is {options.simulation_act!r}, and there is one key/value head: the copies of a head "
            "would differ by a number alone, have parallel gradients and stay copies. Use "
            "`simulation_kernel_size=3`, or another activation."
        )
    if options.seed != ConversionOptions.seed and not config.simulates:
        raise ValueError(f"`seed` ({options.seed}) is of the simulation's start, but there is none; leave it out.")


def find_family(model_type: str) -> SourceFamily:
    """The source's family; a `ConversionError` if there is none."""
    if model_type.startswith("sas_"):
        raise ConversionError("The source is a SAS model already; convert its original source with other options.")
    if model_type in REFUSED:
        raise ConversionError(
            f"`model_type` {model_type!r} cannot be converted: {REFUSED[model_type]}. Convertible are: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    if model_type not in FAMILIES:
        raise ConversionError(
            f"`model_type` {model_type!r} is not supported; convertible are: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
