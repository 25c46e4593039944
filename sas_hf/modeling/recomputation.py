"""Simulated attention that keeps the base heads for the backward pass and simulates them again there.

The simulation is a small share of the operations, but its results are most of what a layer would keep.
`config.recompute_simulation` switches it; figures are in docs/cost.md of the package's repository.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .blocked_attention import attend, attend_backward, attend_differentiably, differentiable_gradients


class RecomputedAttention(torch.autograd.Function):
    """Blocked attention over `simulate(*tensors)`, which keeps `tensors` alone."""

    @staticmethod
    def forward(ctx, simulate: Callable, mask, is_causal: bool, scaling: float, *tensors) -> torch.Tensor:
        ctx.save_for_backward(mask, *tensors)
        ctx.simulate, ctx.settings = simulate, (is_causal, scaling)
        return attend(*simulate(*tensors), mask, *ctx.settings)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        mask, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():

            def attention(*tensors):
                return attend_differentiably(*ctx.simulate(*tensors), mask, *ctx.settings)

            return None, None, None, None, *differentiable_gradients(attention, tensors, needed, grad)
        with torch.enable_grad():
            leaves = [
                tensor if tensor is None else tensor.detach().requires_grad_(need)
                for tensor, need in zip(tensors, needed, strict=True)
            ]
            simulated = ctx.simulate(*leaves)
        grads = attend_backward(grad, *(tensor.detach() for tensor in simulated), mask, *ctx.settings)
        ends = [(tensor, end) for tensor, end in zip(simulated, grads, strict=True) if tensor.requires_grad]
        outputs, directions = zip(*ends, strict=True)
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, directions, allow_unused=True))
        return None, None, None, None, *(next(found) if need else None for need in needed)


# What PyTorch's kernels give out, their normalisers included, is kept: only the simulation runs again.
KERNELS = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}


def _policy(_, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KERNELS else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_around_kernel(attention: Callable, *tensors):
    """`attention(*tensors)` with another kernel, by PyTorch's selective checkpointing."""
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(attention, *tensors, use_reentrant=False, context_fn=contexts)
