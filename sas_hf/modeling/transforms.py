"""What a fast path asks before it runs: whether its operations are only computed, or turned into something else."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.autograd import forward_ad


def is_transformed(but_for_compilation: bool = False) -> bool:
    """Whether what is computed is turned into something else, which takes PyTorch's own operations alone:
    `torch.export`, `torch.jit.trace`, `torch.func` (`vmap`, `grad`, `jvp`), forward-mode derivatives, modes that see
    each operation (selective checkpoints keep results, which nothing may change in place then), and `torch.compile`,
    unless `but_for_compilation`."""
    if torch.compiler.is_compiling():
        return not but_for_compilation or torch.compiler.is_exporting()
    watched = torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    return watched or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def are_ordinary(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether all are PyTorch's own dense tensors: not quantised, distributed or otherwise more than their numbers."""
    return all(tensor is None or type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)


def is_at_hand(tensor: torch.Tensor) -> bool:
    """Whether numbers can be looked at without waiting for a device."""
    return tensor.device.type in ("cpu", "meta") or torch.compiler.is_compiling()


def want_gradient(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether any of `tensors` is to be derived by."""
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def part_features(tensor: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `width` features of `[..., D]` and the others."""
    if torch.compiler.is_exporting():  # ExecuTorch's own split holds for the number of rows it was made with
        return tensor[..., :width], tensor[..., width:]
    return tensor.split((width, tensor.shape[-1] - width), dim=-1)  # whose backward pass is one copy


def differentiable_gradients(
    function: Callable, tensors: Sequence[torch.Tensor | None], needed: Sequence[bool], grad: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradients of `function(*tensors)` along `grad` that are `needed`, as parts of the graph: what the backward
    pass of a written-out function gives under `create_graph=True`, where derivatives of gradients will be wanted."""
    # Views, so that a tensor given twice, or made of another, gets the gradient of each place alone.
    places = [tensor if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    wanted = [place for place, need in zip(places, needed, strict=True) if need and place is not None]
    found = iter(torch.autograd.grad(function(*places), wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
