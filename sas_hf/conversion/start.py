"""The start of a converted model's simulation: it computes what its source computes, and every copy can learn.

All groups of simulated heads are copies of the base heads, so they share one attention map, and any deviation of the
values that cancels in the groups' mean leaves the output as it was. The deviations here differ in direction, not only
in size: an optimiser that normalises gradients, as Adam does, would give copies with parallel gradients the same steps
for ever.
"""

from collections.abc import Mapping

import torch
from torch import nn

from ..modeling.attention import SASAttention
from ..modeling.simulation import HeadSimulation


GRID = 2.0**-6  # deviations are multiples of it, and below 3: exact in bfloat16


def largest_perturbation(num_key_value_heads: int, kernel_size: int) -> float:
    """The scale at which the standard deviation of a value head's weights is the largest that one of them may be."""
    return 3 * (num_key_value_heads * kernel_size) ** 0.5


def balanced_deviations(shape: torch.Size, num_heads: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Random weights `shape` = `[Ĥ, in, κ]` that sum to exactly zero over the groups of `num_heads` outputs.

    Their standard deviation is `scale / sqrt(in·κ)`: the deviation of a head has `scale` times the size of its input.
    One group has nothing to cancel against and gets zeros.
    """
    groups = shape[0] // num_heads
    if groups == 1:
        return torch.zeros(shape, device=generator.device)
    noise = torch.randn(groups, num_heads, *shape[1:], generator=generator, device=generator.device)
    noise = noise * scale / (shape[1] * shape[2]) ** 0.5
    noise = noise - noise.mean(dim=0)
    bound = (3 - GRID) / (groups - 1) // GRID * GRID
    free = (noise[:-1] / GRID).round().mul(GRID).clamp(-bound, bound)
    return torch.cat((free, -free.sum(dim=0, keepdim=True))).flatten(0, 1)


@torch.no_grad()
def start_as_source(model: nn.Module, perturbation: float, seed: int) -> None:
    """Set the simulation of every attention layer of `model` so that the layer computes its base attention.

    - heads: tiled identities; residual convolutions zero, but for values, whose deviations cancel in the mean (PEAA);
    - features: the identity, extra query features zero, extra key features random: their products are zero and the
      query side receives gradient at the first step; those of values, where there are any, the identity;
    - biases zero.

    Args:
        perturbation: size of a simulated value head's deviation relative to its base head.
        seed: of the random deviations and extra key features.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if not isinstance(layer, SASAttention):
            continue
        for side in (layer.q_simulation, layer.k_simulation, layer.v_simulation):
            for name, parameter in side.named_parameters():
                if name.endswith(("bias", "residual.weight")):
                    parameter.zero_()
            for maps in side:
                if isinstance(maps, HeadSimulation):
                    maps.expansion.weight.copy_(maps.expansion.tiled_identity())
                else:
                    maps.expansion.weight.copy_(maps.expansion.padded_identity())
        for maps in layer.v_simulation:
            if isinstance(maps, HeadSimulation):
                _perturb_values(maps, layer.num_heads, perturbation, generator)
        for maps in layer.k_simulation:
            if isinstance(maps, HeadSimulation):
                continue
            expansion = maps.expansion
            extra = expansion.weight[expansion.in_features :]
            noise = torch.randn(extra.shape, generator=generator, device=generator.device)
            extra.copy_(noise / expansion.in_features**0.5)


def _perturb_values(heads: HeadSimulation, num_heads: int, scale: float, generator: torch.Generator) -> None:
    for weight in (heads.expansion.weight, heads.residual.weight):
        weight.add_(balanced_deviations(weight.shape, num_heads, scale, generator).to(weight))


def outputs_of_groups(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where every group of simulated heads has an output projection of its own: the one in `weights`, for each.

    By their names in `model`; weights that `model` has but `weights` has not are left out.
    """
    found = {}
    for name, layer in model.named_modules():
        output = f"{name}.o_proj.weight"
        if isinstance(layer, SASAttention) and layer.concatenates and output in weights:
            found[output] = weights[output].repeat(1, layer.num_simulated_groups)
    return found


def output_of_all_groups(model: nn.Module) -> dict[str, torch.Tensor]:
    """The way back: the mean of the groups' output projections, to the bit where they are one."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SASAttention) and layer.concatenates:
            parts = torch.stack(layer.o_proj.weight.detach().chunk(layer.num_simulated_groups, dim=1))
            found[f"{name}.o_proj.weight"] = parts[0] + (parts - parts[0]).mean(dim=0)
    return found
