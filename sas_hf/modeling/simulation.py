"""Simulated Attention Score: head simulation, feature simulation and the aggregation of simulated heads (PEAA).

"SAS: Simulated Attention Score", §3.3-3.5 and Appendix L. Nothing here knows where q, k and v come from: any base
projection that yields heads can be simulated.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN


def simulation_activation(name: str) -> nn.Module:
    """The non-linearity between the two maps of a simulation; "identity" is the linear ablation of §4.3."""
    return nn.Identity() if name == "identity" else ACT2FN[name]


def is_linear(name: str) -> bool:
    """Whether a simulation with this activation is one linear map; Transformers calls the identity "linear"."""
    return name in ("identity", "linear")


# The layers keep the constructors of `nn.Conv1d` and `nn.Linear`, by which peft and quantisers make others like them.


class HeadExpansion(nn.Conv1d):
    """The convolution from H to Ĥ heads, heads being the channels (equation 5).

    Attributes:
        num_query_heads: H; simulated head j belongs to query head j mod H and to the input head that serves it.
        balanced: start the groups of H heads so that their deviations from the base heads cancel in the groups' mean
            (for values, whose groups are averaged).
    """

    num_query_heads: int
    balanced: bool

    def tiled_identity(self) -> torch.Tensor:
        """Weights `[Ĥ, H, κ]` that copy to each simulated head the head it belongs to."""
        simulated = torch.arange(self.out_channels)
        base = simulated % self.num_query_heads * self.in_channels // self.num_query_heads
        weight = torch.zeros(self.out_channels, self.in_channels, self.kernel_size[0])
        weight[simulated, base, self.kernel_size[0] // 2] = 1.0
        return weight

    def near_identity(self) -> torch.Tensor:
        """The tiled identity plus noise of half the scale that would keep a signal's variance."""
        weight = self.tiled_identity()
        noise = torch.randn_like(weight) * (0.5 / math.sqrt(weight[0].numel()))
        if self.balanced:
            groups = noise.unflatten(0, (-1, self.num_query_heads))
            noise = (groups - groups.mean(dim=0)).flatten(0, 1)
        return weight + noise


class HeadResidual(nn.Conv1d):
    """The convolution among the Ĥ simulated heads (equation 7)."""


class HeadSimulation(nn.Module):
    """Makes Ĥ heads of H: `h = Conv_{H→Ĥ,κ}(x)`, then `h + Conv_{Ĥ→Ĥ,κ}(act(h))` (equations 5-7).

    Args:
        num_heads: input heads: H for queries, H_kv for keys and values.
        balanced: see [`HeadExpansion`].
    """

    def __init__(self, config: PreTrainedConfig, num_heads: int, balanced: bool):
        super().__init__()
        simulated, kernel_size = config.num_simulated_heads, config.simulation_kernel_size
        self.expansion = HeadExpansion(num_heads, simulated, kernel_size, padding=kernel_size // 2)
        self.expansion.num_query_heads = config.num_attention_heads
        self.expansion.balanced = balanced
        self.residual = HeadResidual(simulated, simulated, kernel_size, padding=kernel_size // 2)
        self.act = simulation_activation(config.simulation_act)
        self.gap = kernel_size // 2

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """`[B, T, H, D]` to `[B, T, Ĥ, D]`."""
        if self.expansion._forward_pre_hooks or self.residual._forward_pre_hooks:
            return self.forward_by_rows(heads)
        hidden = self.expansion(heads.flatten(0, 1))
        hidden = hidden + self.residual(self.act(hidden))
        return hidden.unflatten(0, heads.shape[:2])

    def forward_by_rows(self, heads: torch.Tensor) -> torch.Tensor:
        """The same, but the layers see rows `[B, heads, T·(D + κ//2)]`, the tokens one after the other with zeros
        between: for hooks, by which peft tells a layer the adapter of each row of a batch."""
        length, width = heads.shape[1], heads.shape[3]

        def convolve(layer: nn.Module, heads: torch.Tensor) -> torch.Tensor:
            rows = layer(nn.functional.pad(heads, (0, self.gap)).flatten(2))
            return rows.unflatten(2, (length, width + self.gap))[..., :width]

        hidden = convolve(self.expansion, heads.transpose(1, 2))
        hidden = hidden + convolve(self.residual, self.act(hidden))
        return hidden.transpose(1, 2)


class FeatureExpansion(nn.Linear):
    """The map from D to D̂ features of one head (equation 9)."""

    def padded_identity(self) -> torch.Tensor:
        """Weights `[D̂, D]` that keep the D features in front and leave the extra ones zero."""
        return torch.eye(self.out_features, self.in_features)

    def near_identity(self) -> torch.Tensor:
        """The padded identity plus noise of half the scale that would keep a signal's variance."""
        weight = self.padded_identity()
        return weight + torch.randn_like(weight) * (0.5 / math.sqrt(self.in_features))


class FeatureResidual(nn.Linear):
    """The map among the D̂ simulated features (equation 11)."""


class FeatureSimulation(nn.Module):
    """Makes D̂ features of D: `f = Linear_{D→D̂}(x)`, then `f + Linear_{D̂→D̂}(act(f))` (equations 9-11)."""

    def __init__(self, head_dim: int, simulated_head_dim: int, act: str):
        super().__init__()
        self.expansion = FeatureExpansion(head_dim, simulated_head_dim)
        self.residual = FeatureResidual(simulated_head_dim, simulated_head_dim)
        self.act = simulation_activation(act)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., D̂]`."""
        hidden = self.expansion(heads)
        return hidden + self.residual(self.act(hidden))


class Simulation(nn.Sequential):
    """
    The simulation of one side of attention as `config` asks for it: heads, then features, or nothing.

    A module from `[B, T, num_heads, head_dim]` to `[B, T, Ĥ, D̂]`; its children are named `heads` and `features`.

    Args:
        num_heads, head_dim: of the base projection's heads on that side.
        side: "query", "key" or "value"; values are simulated along features only where `config` says so, which is not
            the paper's (§3.4), and stay as wide as they are: the output projection reads them.
    """

    config: PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, num_heads: int, head_dim: int, side: str):
        super().__init__()
        self.config = config
        if config.num_simulated_heads is not None:
            self.add_module("heads", HeadSimulation(config, num_heads, balanced=side == "value"))
        width = config.simulated_head_dim
        if side == "value":
            width = head_dim if config.simulate_value_features else None
        if width is not None:
            self.add_module("features", FeatureSimulation(head_dim, width, config.simulation_act))

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[HeadSimulation | FeatureSimulation]: ...


# Layers, not the simulations that hold them: for classes outside Transformers, the base class offers a module to
# `_init_weights` only when it owns parameters itself.
SIMULATION_LAYERS = (HeadExpansion, HeadResidual, FeatureExpansion, FeatureResidual)


def initialize_simulation(layer: nn.Conv1d | nn.Linear, method: str) -> None:
    """Start one of `SIMULATION_LAYERS` as `config.simulation_init` says; parameters that were loaded are left alone.

    "near_identity" sets the expansions; residual maps and biases keep what the base class gave them,
    N(0, `initializer_range`) and zero. "pytorch" is the default of `nn.Conv1d` and `nn.Linear`, which the paper's
    Appendix L gets, and which the base class would otherwise replace by values so small that attention is uniform.
    """
    if method == "pytorch":
        init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(layer.weight[0].numel())
        assert layer.bias is not None  # all of `SIMULATION_LAYERS` have one
        init.uniform_(layer.bias, -bound, bound)
    elif isinstance(layer, (HeadExpansion, FeatureExpansion)):
        init.copy_(layer.weight, layer.near_identity())


def aggregate_heads(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """Parameter-efficient attention aggregation (equation 12) up to W^O: `[B, T, Ĥ, D_v]` to `[B, T, H·D_v]`.

    Group i of Ĥ/H holds heads iH ... iH+H-1. W^O is linear, so the mean over the groups is taken before it: the same
    result for a share H/Ĥ of the work.
    """
    if groups == 1:  # the mean over one group would be a copy, kept for the backward pass
        return heads.flatten(2)
    return heads.unflatten(2, (groups, -1)).mean(dim=2).flatten(2)


def concatenate_heads(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """Aggregation with parameters of its own for each group, up to W^O: `[B, T, Ĥ, D_v]` to `[B, T, Ĥ·D_v]`.

    Divided by the number of groups, so that PEAA is the case in which W^O has the same part for each group.
    """
    return heads.flatten(2) / groups
