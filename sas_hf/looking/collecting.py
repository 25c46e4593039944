"""Attention weights of one forward pass, and beside those of simulated heads what their base heads would look at."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.attention import SASAttention
from ..modeling.attention_functions import eager_attention_forward
from ..modeling.positions import rotate_leading_features


# Where attention is in a model: the field of its output, and the sides that queries and keys are of, where it has an
# encoder and a decoder and where it has not.
APART = {
    "encoder": ("encoder_attentions", "source", "source"),
    "decoder": ("decoder_attentions", "target", "target"),
    "cross": ("cross_attentions", "target", "source"),
}
ALONE = {"self": ("attentions", "source", "source")}


@dataclass
class Place:
    """
    Attention in one place of a model: its own, or that of an encoder, of a decoder, or across from it to the encoder.

    Attributes:
        name: "self", "encoder", "decoder" or "cross".
        rows, columns: the sides, "source" or "target", that queries and keys are of.
        weights: what the model computed with, float32 `[layers, heads, T, S]`; the heads are the Ĥ simulated ones
            where there are any, of which head j is a copy of base head j mod H.
        base: what the H base heads would look at `[layers, H, T, S]` ([`base_weights`]); `None` without simulation.
        maps: of each layer, by side ("query", "key", "value") and name ("heads: expansion", "heads: residual",
            "features: expansion", "features: residual"), the matrix `[rows, columns, κ]` (κ = 1 for features).
    """

    name: str
    rows: str
    columns: str
    weights: torch.Tensor
    base: torch.Tensor | None = None
    maps: list[dict[tuple[str, str], torch.Tensor]] = field(default_factory=list)

    @property
    def num_heads(self) -> int:
        """H, of base heads."""
        return (self.weights if self.base is None else self.base).shape[1]

    @property
    def num_copies(self) -> int:
        """Ĥ/H; 0 without simulation."""
        return 0 if self.base is None else self.weights.shape[1] // self.num_heads

    @property
    def parted(self) -> torch.Tensor | None:
        """
        How far the copies of each base head have parted, `[layers, H]`, from 0 to 1: the total variation distance
        between the attention rows of two copies, ½·Σ|p − q|, which is the share of attention that one would have to
        move to look as the other does; averaged over all pairs of copies and all rows that see more than one token.
        0: all copies look alike; 1: they never look at the same token. NaN where no row sees more than one; `None`
        where a head has fewer than two copies.
        """
        if self.num_copies < 2:
            return None
        copies = self.weights.unflatten(1, (self.num_copies, self.num_heads))
        pairs = combinations(range(self.num_copies), 2)
        return torch.stack([self._distance(copies[:, one], copies[:, other]) for one, other in pairs]).mean(0)

    @property
    def moved(self) -> torch.Tensor | None:
        """How far each simulated head has moved from its base head, `[layers, Ĥ]`, by the same distance; `None`
        without simulation."""
        if self.base is None:
            return None
        return self._distance(self.weights, self.base.repeat(1, self.num_copies, 1, 1))

    def _distance(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """`[layers, heads]`."""
        choosing = (self.weights > 0).flatten(0, 1).any(0).sum(-1) > 1  # rows that could look elsewhere
        return (one - other).abs().sum(-1)[..., choosing].mean(-1) / 2


@torch.no_grad()
def collect(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[Place]:
    """
    What a model looks at in one forward pass.

    Args:
        model: of Transformers or of this package; it is left as it was found.
        inputs: of its `forward`, one row each.

    Raises:
        ValueError: if it gives no attention weights, or such as are not `[1, heads, T, S]` with as many heads in each
            layer.
    """
    simulated = {}

    def keep(layer: SASAttention, arguments: tuple, keywords: dict, output: tuple) -> None:
        if output[1] is not None:
            simulated[id(output[1])] = layer, base_weights(layer, *arguments, **keywords)

    layers = [layer for layer in model.modules() if isinstance(layer, SASAttention) and layer.config.simulates]
    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    names = APART if model.config.is_encoder_decoder else ALONE
    try:
        with weighing(model):
            outputs = model(**inputs, output_attentions=True, return_dict=True)
            return [
                _make_place(model, name, sides, outputs.get(attentions), simulated)
                for name, (attentions, *sides) in names.items()
            ]
    finally:
        for hook in hooks:
            hook.remove()


def _make_place(model, name: str, sides: Sequence[str], attentions, simulated) -> Place:
    kind = type(model).__name__
    if not attentions or any(not isinstance(weights, torch.Tensor) for weights in attentions):
        raise ValueError(
            f"`model` is a {kind}, whose layers do not all give attention weights; it cannot be looked at."
        )
    shapes = {tuple(weights.shape) for weights in attentions}
    if len(shapes) > 1 or any(len(shape) != 4 or shape[0] != 1 for shape in shapes):
        raise ValueError(
            f"`model` is a {kind}, whose attention weights are {' and '.join(map(str, sorted(shapes)))}; a page shows "
            "layers that are alike, [1, heads, queries, keys]."
        )
    weights = torch.cat([layer.float().cpu() for layer in attentions])
    if not weights.isfinite().all():
        raise ValueError("Attention weights are not numbers (NaN or infinite): the weights are broken or overflow.")
    if id(attentions[0]) not in simulated:
        return Place(name, sides[0], sides[1], weights)
    found = [simulated[id(layer)] for layer in attentions]
    base = torch.cat([weights for _, weights in found])
    return Place(name, sides[0], sides[1], weights, base, [simulation_maps(layer) for layer, _ in found])


@contextmanager
def weighing(model: PreTrainedModel) -> Iterator[None]:
    """A model in evaluation that computes attention weights, which fast kernels do not."""
    training = [module for module in model.modules() if module.training]
    implementation = model.config._attn_implementation
    try:
        model.eval().set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module in training:
            module.training = True


def base_weights(
    layer: SASAttention,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    key_value_states: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """
    What the base heads of a layer would look at `[1, H, T, S]`, float32: its attention with a simulation that changes
    nothing, of the same inputs, mask and score scale. Arguments as of [`SASAttention.forward`].
    """
    source = hidden_states if key_value_states is None else key_value_states
    if key_value_states is None and key_position_embeddings is None:
        key_position_embeddings = position_embeddings
    query, key = layer.project_queries(hidden_states), layer.expand(*layer.project_state(source))[0]
    heads: Any = SimpleNamespace(num_key_value_groups=query.shape[2] // key.shape[2], training=False)
    query, key = _turned(query, position_embeddings), _turned(key, key_position_embeddings)
    weights = eager_attention_forward(heads, query, key, key, attention_mask, scaling=layer.scaling)[1]
    return weights.float().cpu()


def _turned(heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """`[B, T, H, D]` to `[B, H, T, D]`; where RoPE turns simulated features too, these are zero."""
    missing = 0 if angles is None else max(0, angles[0].shape[-1] - heads.shape[-1])
    return rotate_leading_features(nn.functional.pad(heads, (0, missing)), angles).transpose(1, 2)


def simulation_maps(layer: SASAttention) -> dict[tuple[str, str], torch.Tensor]:
    """The matrices of a layer's simulations, as [`Place`] has them; adapters on them count."""
    found = {}
    for side in ("query", "key", "value"):
        for what, maps in getattr(layer, f"{side[0]}_simulation").named_children():
            for part in ("expansion", "residual"):
                read = _head_map if what == "heads" else _feature_map
                found[side, f"{what}: {part}"] = read(getattr(maps, part)).float().cpu()
    return found


# By what they do, not by their weights: adapters and quantisers keep these elsewhere.


def _head_map(layer: nn.Module) -> torch.Tensor:
    """Of a convolution, `[heads out, heads in, κ]`."""
    own = cast(nn.Conv1d, getattr(layer, "base_layer", layer))
    (width,), places = own.kernel_size, torch.arange(own.in_channels)
    impulses = own.weight.new_zeros(own.in_channels, own.in_channels, width)
    impulses[places, places, width // 2] = 1.0
    return (layer(impulses) - layer(torch.zeros_like(impulses))).transpose(0, 1).flip(-1)


def _feature_map(layer: nn.Module) -> torch.Tensor:
    """Of a linear map, `[features out, features in, 1]`."""
    own = cast(nn.Linear, getattr(layer, "base_layer", layer))
    impulses = torch.eye(own.in_features, dtype=own.bias.dtype, device=own.bias.device)
    return (layer(impulses) - layer(torch.zeros_like(impulses))).T[..., None]
