"""Simulation whose results nobody keeps for the backward pass: they are made again from the base heads there.

The simulation is a small share of the operations, but its results are most of what a layer would keep.
`config.recompute_simulation` switches it; figures are in docs/cost.md of the package's repository.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .transforms import differentiable_gradients, is_transformed


class RecomputedSimulation(torch.autograd.Function):
    """`simulate(*tensors)`, which keeps `tensors` alone.

    Its result is made again once in a backward pass: by the first that asks for it, the attention function or itself.
    """

    @staticmethod
    def forward(ctx, simulate: Callable, heads: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        tensors = (heads, *others)
        ctx.simulate, ctx.again = simulate, None
        ctx.autocast = _as_now(heads.device.type)
        ctx.save_for_backward(*tensors)
        return simulate(*tensors).detach()  # a view could not be changed in place by the attention function

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # derivatives of the gradients will be wanted
            tensors, ctx.again = ctx.saved_tensors if ctx.again is None else ctx.again.tensors, None
            with ctx.autocast():
                return None, *differentiable_gradients(ctx.simulate, tensors, needed, grad)
        (_, leaves, result), ctx.again = _simulated_again(ctx), None
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need and leaf is not None]
        found = iter(torch.autograd.grad(result, wanted, grad, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


def _as_now(device_type: str) -> Callable[[], AbstractContextManager]:
    """Makes contexts in which types are cast as they are now."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext
    return partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


class _Again(NamedTuple):
    """What a simulation was made of, the same as leaves, and what was made of these in the backward pass."""

    tensors: tuple[torch.Tensor | None, ...]
    leaves: list[torch.Tensor | None]
    result: torch.Tensor


def _simulated_again(node) -> _Again:
    if node.again is None:
        tensors, needed = node.saved_tensors, node.needs_input_grad[1:]  # to be read once: gradient checkpoints
        with torch.enable_grad(), node.autocast():
            leaves = [
                tensor if tensor is None else tensor.detach().requires_grad_(need)
                for tensor, need in zip(tensors, needed, strict=True)
            ]
            node.again = _Again(tensors, leaves, node.simulate(*leaves))
    return node.again


class _View(NamedTuple):
    """Stands for a tensor that an attention function wants to keep: how it lies in the result of `node`."""

    node: torch.autograd.graph.Node | None
    laid_out: tuple[int, ...]  # strides of the result
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt  # from where the result begins

    def made_again(self) -> torch.Tensor:
        result = _simulated_again(self.node).result.detach()
        if result.stride() != self.laid_out:  # else its memory is not what the view looks at
            result = torch.empty_strided(result.shape, self.laid_out, dtype=result.dtype, device=result.device).copy_(
                result
            )
        return result.as_strided(self.size, self.stride, result.storage_offset() + self.offset)


class _Kept(NamedTuple):
    """Stands for all else, as PyTorch keeps it: what is changed in place afterwards is not what was computed with."""

    tensor: torch.Tensor
    version: int

    def unchanged(self) -> torch.Tensor:
        if self.tensor._version == self.version:
            return self.tensor
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{self.tensor.type()} {list(self.tensor.shape)}, which an attention function kept for its backward pass, "
            f"is at version {self.tensor._version}; expected version {self.version} instead."
        )


def is_recomputed(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a result of `RecomputedSimulation`, of which notes can be kept."""
    return getattr(type(tensor.grad_fn), "_forward_cls", None) is RecomputedSimulation


def may_note() -> bool:
    """Whether notes can be kept here: not where operations are turned into something else."""
    return not is_transformed() and torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None


def attend_padded(attend: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor, width: int) -> torch.Tensor:
    """`attend(padded)` `[..., width]` without the last features, for values `[..., D_v]` padded with zeros to `width`.

    Padded values are made again in the backward pass where `value` is.
    """
    pad = partial(nn.functional.pad, pad=(0, width - value.shape[-1]))
    again = may_note() and is_recomputed(value)
    padded = RecomputedSimulation.apply(pad, value) if again else pad(value)
    with recomputing(padded):
        return attend(padded)[..., : value.shape[-1]]


def recomputing(*simulated: torch.Tensor) -> AbstractContextManager:
    """Within, whatever is computed of the results of `RecomputedSimulation` keeps a note of them for its backward pass
    instead of their numbers. So any attention function can be called, and runs once."""
    if not may_note():
        return nullcontext()
    results: dict[int | None, torch.Tensor] = {
        tensor.untyped_storage().data_ptr(): tensor for tensor in simulated if is_recomputed(tensor)
    }
    return _noting(results) if results else nullcontext()


@contextmanager
def _noting(results: dict[int | None, torch.Tensor]) -> Iterator[None]:
    """Notes, instead of numbers, of all that lies in the memory of `results`."""
    # A result that the attention function changes in place is kept as it became.
    versions = {memory: result._version for memory, result in results.items()}
    # All else is kept as it would be without us: gradient checkpoints and offloading hook in here, too.
    keep, give_back = torch._C._autograd._top_saved_tensors_default_hooks(False) or (None, None)

    def pack(tensor: torch.Tensor):
        is_dense = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        memory = tensor.untyped_storage().data_ptr() if is_dense else None
        result = results.get(memory)
        if result is not None and tensor.dtype == result.dtype and result._version == versions[memory]:
            offset = tensor.storage_offset() - result.storage_offset()
            return _View(result.grad_fn, result.stride(), tensor.size(), tensor.stride(), offset)
        # Detached, as an output would hold the graph that holds it.
        return _Kept(tensor.detach(), tensor._version) if keep is None else keep(tensor)

    def unpack(packed) -> torch.Tensor:
        if isinstance(packed, _View):
            return packed.made_again()
        return packed.unchanged() if give_back is None else give_back(packed)

    with saved_tensors_hooks(pack, unpack):
        yield
    results.clear()  # the graph holds these functions
