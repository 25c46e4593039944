"""Lossy conversions, by name only: a plain attention of another kind that comes near its source's.

Each starts from the exact conversion without simulation and goes through the layers with a calibration text: what
stands for queries, keys and values is made by the kind's own module, then W^O is fitted by least squares.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import SASGPTConfig, SASViTConfig
from ..modeling.attention import SASAttention
from ..modeling.positions import SASRotaryEmbedding
from ..report.progress import bar
from .family import ConversionError
from .fidelity import computing_in_float32
from .latents import fit_latents
from .least_squares import NormalEquations
from .pooling import pool_heads
from .slices import fit_queries, keep_queries_and_keys


@dataclass(frozen=True)
class LossyConversion:
    """
    Args:
        fields: configuration of the exact conversion, options → the fields that differ; raises a [`ConversionError`]
            for a source that the conversion makes no sense for, a `ValueError` for options that do not fit.
        fit: sets all of a layer but W^O: the source's layer, the new one, pairs of their inputs on the calibration
            text, and the rotation of the layer (hidden states → cos and sin, or `None`).
        keeps_output: W^O is fitted as a correction of the source's; otherwise anew.
    """

    fields: Callable[[PreTrainedConfig, object], dict]
    fit: Callable[[SASAttention, Any, list, Callable], None]
    keeps_output: bool


def slicing_fields(config: PreTrainedConfig, options) -> dict:
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ConversionError(
            f"`lossy={options.lossy!r}` slices a layer's input into heads, so `head_dim` ({config.head_dim}) x "
            f"`num_attention_heads` ({config.num_attention_heads}) must be `hidden_size` ({config.hidden_size})."
        )
    _refuse_qk_norm(config, options)
    return {
        "attention_type": options.lossy,
        "num_key_value_heads": config.num_attention_heads,
        "attention_output_bias": config.attention_output_bias or config.attention_bias,  # values have none any more
    }


def pooling_fields(config: PreTrainedConfig, options) -> dict:
    before, after = config.num_key_value_heads, options.num_key_value_heads
    if after is None or not 1 <= after < before or before % after:
        possible = [count for count in range(1, before) if before % count == 0]
        if not possible:
            raise ConversionError("`lossy='gqa'` merges key/value heads, but the source has one only.")
        raise ValueError(
            f"`num_key_value_heads` is {after}; with `lossy='gqa'` it must be a divisor of the source's {before} that "
            f"is smaller: {', '.join(map(str, possible))}."
        )
    return {"num_key_value_heads": after}


def latent_fields(config: PreTrainedConfig, options) -> dict:
    if config.position_embedding_type != "rope":
        raise ConversionError(
            "`lossy='mla'` gives rotary positions a key of their own, but the source's positions are learned."
        )
    _refuse_qk_norm(config, options)
    hidden_size, width = config.hidden_size, config.head_dim
    full = min(hidden_size, 2 * config.num_key_value_heads * width + 1, 2 * config.num_attention_heads * width)
    rank = min(hidden_size // 3, full) if options.kv_lora_rank is None else options.kv_lora_rank
    if not 2 <= rank <= full:
        raise ValueError(
            f"`kv_lora_rank` is {rank}; with `lossy='mla'` it must be from 2 to {full}, at which keys and values are "
            "kept whole."
        )
    fields = {
        "attention_type": "mla",
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": min(hidden_size, config.num_attention_heads * width + 1),  # not cached: as large as it goes
        "kv_lora_rank": rank,
        "qk_rope_head_dim": config.rotary_dim,
        "qk_nope_head_dim": width,
        "v_head_dim": width,
        "attention_bias": True,
        "attention_output_bias": config.attention_output_bias,
        "rope_parameters": config.rope_parameters | {"partial_rotary_factor": 1.0},
    }
    rotaries = [SASRotaryEmbedding(SASGPTConfig(**fields)) for fields in (config.to_dict(), config.to_dict() | fields)]
    as_it_is, of_key = (rotary.inv_freq for rotary in rotaries)
    if not torch.allclose(as_it_is, of_key):
        raise ConversionError(
            f"`rope_parameters` ({config.rope_parameters}) give {config.rotary_dim} rotated features of "
            f"{width} other frequencies than a RoPE key of {config.rotary_dim} features would have."
        )
    return fields


def _refuse_qk_norm(config: PreTrainedConfig, options) -> None:
    if config.qk_norm is not None:
        raise ConversionError(
            f"`lossy={options.lossy!r}` makes queries and keys that are not normed, but the source norms its own "
            f"(`qk_norm` {config.qk_norm!r})."
        )


LOSSY = {
    "optimised": LossyConversion(slicing_fields, keep_queries_and_keys, keeps_output=False),
    "efficient": LossyConversion(slicing_fields, fit_queries, keeps_output=False),
    "gqa": LossyConversion(pooling_fields, pool_heads, keeps_output=True),
    "mla": LossyConversion(latent_fields, fit_latents, keeps_output=True),
}


def lossy_fields(config: PreTrainedConfig, options) -> dict:
    """The fields in which the lossy conversion differs from the exact one, whose configuration is given.

    Raises:
        ValueError: if there is no such lossy conversion, or an option does not belong to it.
        ConversionError: if it makes no sense for this source.
    """
    for name, owner in (("num_key_value_heads", "gqa"), ("kv_lora_rank", "mla")):
        if getattr(options, name) is not None and options.lossy != owner:
            raise ValueError(f"`{name}` ({getattr(options, name)}) belongs to `lossy={owner!r}`; leave it out.")
    if options.lossy is None:
        return {}
    if options.lossy not in LOSSY:
        raise ValueError(f"`lossy` is {options.lossy!r}; it must be one of {', '.join(map(repr, LOSSY))}.")
    if isinstance(config, SASViTConfig):
        raise ConversionError("Lossy conversions are calibrated on text; the source is a model of images.")
    if not isinstance(config, SASGPTConfig):
        raise ConversionError(
            f"`lossy` ({options.lossy!r}) is for decoders; the source is "
            f"{'an encoder-decoder' if config.is_encoder_decoder else 'an encoder'}, which is converted exactly."
        )
    return LOSSY[options.lossy].fields(config, options)


class Stream:
    """A model's hidden states of the calibration texts, on their way through its layers.

    Args:
        texts: token ids `[1, T]`, without padding.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[torch.Tensor]):
        self.body: Any = model.base_model  # a SASGPTModel, whose list of layers has no type
        self.hidden_states = [self._embed(ids.to(model.device)) for ids in texts]

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        embedded = self.body.embed_tokens(ids)
        if self.body.embed_positions is None:
            return embedded
        return embedded + self.body.embed_positions(torch.arange(ids.shape[1], device=ids.device)[None])

    def rotation(self, index: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.body.config.rotates(index):
            return None
        return self.body.rotary_emb(states, torch.arange(states.shape[1], device=states.device)[None])

    def inputs(self, index: int) -> Iterator[torch.Tensor]:
        """What attention of this layer reads."""
        layer = self.body.layers[index]
        return (states if layer.post_norm else layer.input_layernorm(states) for states in self.hidden_states)

    def attend(self, index: int, states: torch.Tensor) -> torch.Tensor:
        return self.body.layers[index].self_attn(states, **self._positions(index, states))[0]

    def advance(self, index: int) -> None:
        """Through the layer."""
        for place, states in enumerate(self.hidden_states):
            self.hidden_states[place] = self.body.layers[index](states, **self._positions(index, states))

    def _positions(self, index: int, states: torch.Tensor) -> dict:
        tables = self.rotation(index, states)
        return {"position_embeddings": tables, "key_position_embeddings": tables}


@torch.no_grad()
def fit_attention(
    source: PreTrainedModel,
    model: PreTrainedModel,
    conversion: LossyConversion,
    texts: Sequence[torch.Tensor],
) -> None:
    """Set the attention layers of `model` one after the other so that they do on `texts` what `source`'s do.

    A layer of `model` is fitted on what the layers before it really give, and to what `source`'s own layer gives for
    the same text, so that it also mends what they changed.

    Args:
        source: an exact conversion without simulation.
        model: of the configuration that `conversion` asks for, with all other weights set.
        texts: token ids `[1, T]`.
    """
    with computing_in_float32(source), computing_in_float32(model):
        given, own = Stream(source, texts), Stream(model, texts)
        layers = list(zip(given.body.layers, own.body.layers, strict=True))
        for index, (old_layer, new_layer) in enumerate(bar(layers, "Fitting layers")):
            old, new = old_layer.self_attn, new_layer.self_attn
            inputs = list(given.inputs(index))
            outputs = [given.attend(index, states) for states in inputs]
            pairs = list(zip(inputs, own.inputs(index), strict=True))
            conversion.fit(old, new, pairs, lambda states, index=index: given.rotation(index, states))
            fit_output(old, new, conversion, own, index, [x for _, x in pairs], outputs)
            given.advance(index)
            own.advance(index)


def fit_output(
    old: SASAttention,
    new: SASAttention,
    conversion: LossyConversion,
    stream: Stream,
    index: int,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> None:
    """Fit W^O of `new` so that it gives `outputs` for `inputs`; as a correction of the source's, or anew."""
    for name, parameter in new.o_proj.named_parameters():
        if conversion.keeps_output:
            parameter.copy_(old.o_proj.get_parameter(name))
        else:
            parameter.zero_()
    aggregated = []
    hook = new.o_proj.register_forward_pre_hook(lambda module, arguments: aggregated.append(arguments[0]))
    equations = NormalEquations(bias=new.o_proj.bias is not None)
    for states, expected in zip(inputs, outputs, strict=True):
        found = stream.attend(index, states)
        equations.add(aggregated.pop(), expected - found)
    hook.remove()
    weight, bias = equations.solve()
    new.o_proj.weight.add_(weight)
    if bias is not None:
        new.o_proj.bias.add_(bias)
