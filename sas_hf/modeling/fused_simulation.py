"""One side of attention, simulated and rotated: by the definition, or the same numbers in fewer passes over memory.

The definition is one line of `simulate`. It is what counts, and what runs where a part was replaced; tests compare the
two. What the other buys: docs/cost.md.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS

from .compilation import Compiled
from .positions import rotate_leading_features, turn
from .recomputation import RecomputedSimulation
from .simulation import (
    FeatureExpansion,
    FeatureResidual,
    FeatureSimulation,
    HeadExpansion,
    HeadResidual,
    HeadSimulation,
    Simulation,
)
from .transforms import are_ordinary, is_transformed, want_gradient


BLOCK = 128  # tokens that are simulated at a time where no gradients are wanted
# What each simulation is made of. Its activation is one of Transformers', which act on each number by itself and draw
# none; what else may stand there might not.
PARTS = {
    "heads": {"": HeadSimulation, "expansion": HeadExpansion, "residual": HeadResidual},
    "features": {"": FeatureSimulation, "expansion": FeatureExpansion, "residual": FeatureResidual},
}
Weight = Any  # a tensor, or `None` where its simulation is off, as all four of it are: `simulation_weights`
ACTIVATIONS = {nn.Identity, *(made[0] if isinstance(made, tuple) else made for made in ACT2CLS.values())}


def simulate(
    simulation: Simulation,
    heads: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Simulate heads `[B, T, H, D]` and turn them by cos and sin `[B, T, R]`, to what attention reads: `[B, Ĥ, T, D̂]`.

    With `eager` attention this is the definition and nothing else. Otherwise operations are fused where they may be,
    by `torch.compile` where `config.compile_simulation` says so, and in training run again in the backward pass where
    `config.recompute_simulation` does.
    """
    angles = position_embeddings or (None, None)
    if not is_plain(simulation) or not are_ordinary((heads, *angles)) or want_gradient(angles):
        return rotate_leading_features(simulation(heads), position_embeddings).transpose(1, 2)
    compiles = simulation.config.compile_simulation and not heads.is_meta
    function = simulate_compiled if compiles else simulate_fused
    fused = partial(function, [maps.act for maps in simulation])
    tensors = (heads, *angles, *simulation_weights(simulation))
    if torch.is_grad_enabled() and want_gradient(tensors) and _recomputes(simulation.config):
        return RecomputedSimulation.apply(fused, *tensors)
    return fused(*tensors)


def _recomputes(config: PreTrainedConfig) -> bool:
    """What is compiled as a whole keeps what it needs by its own rules."""
    return config.recompute_simulation and not torch.compiler.is_compiling()


def is_plain(simulation: nn.Module) -> bool:
    """Whether there is something to simulate, by weights that say all that calling `simulation` would do.

    Not with `eager` attention, nor if a part was replaced (peft's LoRA) or added, holds other tensors (quantisers'),
    is watched by hooks or had its `forward` exchanged (weights that Accelerate keeps elsewhere), nor where operations
    are turned into something else, but for `torch.compile`, which takes what is fused.
    """
    if is_transformed(but_for_compilation=True) or torch.nn.modules.module._has_any_global_hook():
        return False
    if not isinstance(simulation, Simulation) or not _is_as_made(simulation, Simulation) or not simulation._modules:
        return False
    if simulation.config._attn_implementation in ("eager", "paged|eager", None):
        return False
    for name, maps in simulation._modules.items():
        parts = PARTS.get(name)
        if parts is None or maps is None or not _is_as_made(maps, parts[""]):
            return False
        act, expansion, residual = (getattr(maps, part) for part in ("act", "expansion", "residual"))
        if not _is_as_made(expansion, parts["expansion"]) or not _is_as_made(residual, parts["residual"]):
            return False
        if act._parameters or type(act) not in ACTIVATIONS or not _is_as_made(act, type(act)):
            return False
    return True


def _is_as_made(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `part`, its own parts aside, is of this kind with nothing added or taken away."""
    return (
        type(part) is kind
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
        and "forward" not in vars(part)
        and are_ordinary(part._parameters.values())
        and all(parameter is not None for parameter in part._parameters.values())
    )


def simulation_weights(simulation: Simulation) -> list[torch.Tensor | None]:
    """Weight and bias of the four maps in the order they act, `None` where a simulation is off."""
    weights: list[torch.Tensor | None] = []
    for name in ("heads", "features"):
        if name not in simulation._modules:
            weights += [None] * 4
            continue
        maps: HeadSimulation | FeatureSimulation = getattr(simulation, name)
        weights += [maps.expansion.weight, maps.expansion.bias, maps.residual.weight, maps.residual.bias]
    return weights


def simulate_fused(
    acts: Sequence[nn.Module],
    heads: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *weights: torch.Tensor | None,
) -> torch.Tensor:
    """`[B, T, H, D]` to `[B, Ĥ, T, D̂]`, by `simulation_weights` and the activations of the simulations that are on.

    With κ = 1 heads stand first, so that each head map is one product of matrices and the result lies in memory as
    attention reads it; residuals, biases and rotation are added in place. (κ > 1 stays a convolution.) Without
    gradients, many tokens on a CPU are taken a block at a time, which saves a tenth.
    """
    size, axis = max(1, BLOCK // heads.shape[0]), 2 if is_heads_first(weights) else 1
    if heads.shape[1] <= size or heads.device.type != "cpu" or torch.is_grad_enabled():
        return simulate_at_once(acts, heads, cos, sin, *weights)
    parts = []
    for start in range(0, heads.shape[1], size):
        block = slice(start, start + size)
        turns = [table if table is None else table[:, block] for table in (cos, sin)]
        parts.append(_simulate(acts, heads[:, block], *turns, *weights))
    return _heads_before_tokens(torch.cat(parts, dim=axis), weights)


def simulate_at_once(acts, heads, cos, sin, *weights) -> torch.Tensor:
    """The same of all tokens together."""
    return _heads_before_tokens(_simulate(acts, heads, cos, sin, *weights), weights)


simulate_compiled = Compiled(simulate_at_once)


def _heads_before_tokens(hidden: torch.Tensor, weights: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return hidden.permute(1, 0, 2, 3) if is_heads_first(weights) else hidden.transpose(1, 2)


def _simulate(acts, heads, cos, sin, *weights) -> torch.Tensor:
    """The same as it lies in memory: `[Ĥ, B, T, D̂]` if `is_heads_first(weights)`, otherwise `[B, T, Ĥ, D̂]`."""
    heads_first = is_heads_first(weights)
    hidden = heads.flatten(0, 1)
    if heads_first:
        hidden = hidden.transpose(0, 1).contiguous()
    hidden = maps(acts, hidden, *weights)
    width = heads.shape[-1] if weights[4] is None else weights[4].shape[0]
    shape = (-1, *heads.shape[:2], width) if heads_first else (*heads.shape[:2], -1, width)
    if cos is not None:
        if not heads_first:
            cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        if torch.compiler.is_compiling():  # which fuses what follows by itself
            return turn(hidden.view(shape), cos, sin)
        hidden = Rotation.apply(hidden, shape, cos, sin)
    return hidden.view(shape)


def is_heads_first(weights: Sequence[Weight]) -> bool:
    """Whether the head maps have κ = 1 and are products of matrices."""
    return weights[0] is not None and weights[0].shape[2] == weights[2].shape[2] == 1


def maps(acts: Sequence[nn.Module], heads: torch.Tensor, *weights: Weight) -> torch.Tensor:
    """
    The maps over heads and over features, on `[H, N, D]` if `is_heads_first(weights)`, otherwise `[N, H, D]`.

    The result's numbers lie in that order, in the shape they were computed in: what is done in place to a view costs
    copies of the whole in the backward pass.
    """
    expand, expand_bias, residual, residual_bias, *features = weights
    hidden = heads
    if is_heads_first(weights):
        hidden = torch.addmm(expand_bias[:, None], expand[..., 0], heads.flatten(1))
        hidden = torch.addmm(hidden, residual[..., 0], acts[0](hidden)).add_(residual_bias[:, None])
    elif expand is not None:
        hidden = F.conv1d(heads, expand, expand_bias, padding=expand.shape[2] // 2)
        hidden = F.conv1d(acts[0](hidden), residual, residual_bias, padding=residual.shape[2] // 2).add_(hidden)
    expand, expand_bias, residual, residual_bias = features
    if expand is not None:
        hidden = torch.addmm(expand_bias, hidden.reshape(-1, heads.shape[-1]), expand.T)
        hidden = torch.addmm(residual_bias, acts[-1](hidden), residual.T).add_(hidden)
    return hidden


class Rotation(torch.autograd.Function):
    """`rotate_leading_features` in place, which keeps nothing for the backward pass but the angles.

    Seen as `shape`, `x` has the features last, and axes that `cos` and `sin` fit before; these get no
    gradient.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, shape: tuple[int, ...], cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.shape = shape
        (cos_1, cos_2), (sin_1, sin_2) = cos.to(x.dtype).chunk(2, dim=-1), sin.to(x.dtype).chunk(2, dim=-1)
        _turn(x.view(shape), cos_1, -sin_1, cos_2, sin_2)
        return x

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        cos, sin = (table.to(grad.dtype) for table in ctx.saved_tensors)
        (cos_1, cos_2), (sin_1, sin_2) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        turned = grad.clone(memory_format=torch.contiguous_format)
        if torch.is_grad_enabled():  # a part of the graph: the transposed rotation is a rotation, too
            turned = Rotation.apply(turned, ctx.shape, cos, -torch.cat((sin_2, sin_1), dim=-1))
        else:
            _turn(turned.view(ctx.shape), cos_1, sin_2, cos_2, -sin_1)
        return turned, None, None, None


def _turn(x, first_by_first, first_by_second, second_by_second, second_by_first) -> None:
    half = first_by_first.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = (first * first_by_first).addcmul_(second, first_by_second)
    second.mul_(second_by_second).addcmul_(first, second_by_first)
    first.copy_(turned)
