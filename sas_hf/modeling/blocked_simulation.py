"""Simulation on a CPU for training: a block of tokens at a time, with the backward pass written out.

What lies between the maps of a block stays near a core's cache, and the backward pass makes no copies. What it buys:
docs/cost.md. The plain version is `maps` of fast_simulation.py, which autograd differentiates.
"""

import torch
from torch import nn


BLOCK = 128  # tokens


class HeadMap:
    """A map over heads with κ = 1: one product of matrices, heads first. Sums its gradients over blocks.

    Its subclasses, too, map blocks `[first, second, width]`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, needed: tuple[bool, bool]):
        self.weight, self.bias = weight, bias
        self.weight_grad = torch.zeros_like(weight) if needed[0] else None
        self.bias_grad = torch.zeros_like(bias) if needed[1] else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias[:, None], self.weight[..., 0], x.flatten(1)).unflatten(1, x.shape[1:])

    def backward(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of the input `x` from that of the output."""
        rows = grad.flatten(1)
        if self.weight_grad is not None:
            self.weight_grad[..., 0].addmm_(rows, x.flatten(1).T)
        if self.bias_grad is not None:
            self.bias_grad += rows.sum(1)
        return (self.weight[..., 0].T @ rows).unflatten(1, grad.shape[1:])


class HeadConvolution(HeadMap):
    """A map over heads with κ > 1, tokens first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv1d(x, self.weight, self.bias, padding=self.weight.shape[2] // 2)

    def backward(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        found = torch.ops.aten.convolution_backward(
            *(grad, x, self.weight, self.bias.shape, [1], [self.weight.shape[2] // 2], [1], False, [0], 1),
            output_mask=[True, self.weight_grad is not None, self.bias_grad is not None],
        )
        for total, part in zip((self.weight_grad, self.bias_grad), found[1:], strict=True):
            if total is not None:
                total += part
        return found[0]


class FeatureMap(HeadMap):
    """`nn.Linear`, whichever of heads and tokens stand first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def backward(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = grad.flatten(0, 1)
        if self.weight_grad is not None:
            self.weight_grad.addmm_(rows.T, x.flatten(0, 1))
        if self.bias_grad is not None:
            self.bias_grad += rows.sum(0)
        return (rows @ self.weight).unflatten(0, grad.shape[:2])


class Stage:
    """`y = expansion(x)`, then `y + residual(act(y))`: the simulation of heads or of features on one block."""

    def __init__(self, kind: type[HeadMap], act: nn.Module, weights: list[torch.Tensor], needed: tuple[bool, ...]):
        self.expansion, self.residual = kind(*weights[:2], needed[:2]), kind(*weights[2:], needed[2:])
        self.act = act

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, and the y that `backward` asks for."""
        hidden = self.expansion.forward(x)
        return self.residual.forward(self.act(hidden)).add_(hidden), hidden

    def backward(self, grad: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():  # whatever activation it is
            leaf = hidden.detach().requires_grad_()
            acted = self.act(leaf)
        grad_acted = self.residual.backward(grad, acted.detach())
        (grad_hidden,) = torch.autograd.grad(acted, leaf, grad_acted)
        return self.expansion.backward(grad_hidden + grad, x)

    def grads(self) -> list[torch.Tensor | None]:
        maps = (self.expansion, self.residual)
        return [grad for layer in maps for grad in (layer.weight_grad, layer.bias_grad)]


def make_stages(act: nn.Module, weights: list, needed: tuple[bool, ...] = (False,) * 8) -> list[Stage | None]:
    """The stages of heads and of features, `None` where a simulation is off."""
    kinds = (HeadMap if is_heads_first(weights) else HeadConvolution, FeatureMap)
    quarters = ((weights[:4], needed[:4]), (weights[4:], needed[4:]))
    return [
        None if part[0] is None else Stage(kind, act, part, some)
        for kind, (part, some) in zip(kinds, quarters, strict=True)
    ]


def is_heads_first(weights: list[torch.Tensor | None]) -> bool:
    return weights[0] is not None and weights[0].shape[2] == 1


class BlockedMaps(torch.autograd.Function):
    """`maps` of fast_simulation.py."""

    @staticmethod
    def forward(ctx, act: nn.Module, heads: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        ctx.act = act
        axis = 1 if is_heads_first(weights) else 0
        stages, kept, results = make_stages(act, weights), [], []
        for x in heads.split(BLOCK, axis):
            x, inputs = x.contiguous(), []
            for stage in stages:
                if stage is not None:
                    inputs.append(x)
                    x, hidden = stage.forward(x)
                    inputs.append(hidden)
            kept += inputs
            results.append(x)
        ctx.save_for_backward(*weights, *kept)
        return torch.cat(results, axis)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        saved = list(ctx.saved_tensors)  # read once, as checkpointing asks
        weights, kept = saved[:8], saved[8:]
        axis = 1 if is_heads_first(weights) else 0
        stages = make_stages(ctx.act, weights, ctx.needs_input_grad[2:])
        results = []
        for part in reversed(grad.split(BLOCK, axis)):
            part = part.contiguous()
            for stage in reversed(stages):
                if stage is not None:
                    hidden, x = kept.pop(), kept.pop()
                    part = stage.backward(part, x, hidden)
            results.append(part)
        grads = [grad for stage in stages for grad in ([None] * 4 if stage is None else stage.grads())]
        return None, torch.cat(results[::-1], axis), *grads
