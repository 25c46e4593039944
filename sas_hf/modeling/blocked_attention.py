"""Softmax attention on a CPU, a few heads and a block of queries at a time: for keys wider than values.

PyTorch's fast kernel for the CPU knows one width for queries, keys and values; its slow one writes the scores of all
queries to memory and computes those of the future, too. This one needs nothing but queries, keys and values in the
backward pass. What it buys: docs/cost.md. The plain version is `eager_attention_forward`.
"""

import re

import torch

from .transforms import differentiable_gradients


BLOCK, HEADS = 64, 12  # the scores of a block, 1.5 MB at 512 keys, about fill the cache of a core


def _blocks(query, key, value, mask, is_causal):
    """Batch row, heads, queries and the keys that they may see, as slices, and the mask of these."""
    heads, length = query.shape[1:3]
    size = HEADS if length > 1 else heads
    for row in range(query.shape[0]):
        for head in range(0, heads, size):
            for start in range(0, length, BLOCK):
                queries = slice(start, min(start + BLOCK, length))
                seen = slice(0, queries.stop if is_causal else key.shape[2])
                block_mask = None
                if mask is not None:
                    block_mask = mask[row if mask.shape[0] > 1 else 0]
                    block_mask = block_mask[slice(head, head + size) if mask.shape[1] > 1 else slice(None), queries]
                yield row, slice(head, head + size), queries, seen, block_mask


def _weights(query, key, mask, is_causal, scaling):
    """Softmax of the scores `[heads, queries, keys]` of a block, in place unless gradients are wanted."""
    scores = torch.matmul(query * scaling, key.transpose(-2, -1))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores.add_(mask)
    elif is_causal:  # the last columns are the block's own tokens
        own = query.shape[-2]
        scores[..., -own:] += scores.new_full((own, own), -torch.inf).triu_(1)
    return torch.softmax(scores, dim=-1, out=None if torch.is_grad_enabled() else scores)


def attend(query, key, value, mask, is_causal, scaling) -> torch.Tensor:
    """`[B, heads, T, width]` to `[B, T, heads, D_v]`; not differentiable by itself."""
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1])
    for row, some, queries, seen, block_mask in _blocks(query, key, value, mask, is_causal):
        weights = _weights(query[row, some, queries], key[row, some, seen], block_mask, is_causal, scaling)
        output[row, queries, some] = torch.matmul(weights, value[row, some, seen]).transpose(0, 1)
    return output


def attend_backward(
    grad, query, key, value, mask, is_causal, scaling
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values from that of the output `[B, T, heads, D_v]`; weights are made again."""
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    for row, some, queries, seen, block_mask in _blocks(query, key, value, mask, is_causal):
        block_query, block_key, block_value = query[row, some, queries], key[row, some, seen], value[row, some, seen]
        block_grad = grad[row, queries, some].transpose(0, 1)
        weights = _weights(block_query, block_key, block_mask, is_causal, scaling)
        grad_value[row, some, seen] += torch.matmul(weights.transpose(-2, -1), block_grad)
        grad_scores = torch.matmul(block_grad, block_value.transpose(-2, -1))  # of the weights; then in place
        torch._softmax_backward_data(grad_scores, weights, -1, weights.dtype, grad_input=grad_scores).mul_(scaling)
        grad_query[row, some, queries] = torch.matmul(grad_scores, block_key)
        grad_key[row, some, seen] += torch.matmul(grad_scores.transpose(-2, -1), block_query)
    return grad_query, grad_key, grad_value


def as_added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to be added to scores of `dtype`, of one that is, or that is true where one may see the other.

    Raises:
        ValueError: for whole numbers, which mean either.
    """
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(
            f"`attention_mask` has numbers of type {mask.dtype}; a mask for queries and keys is boolean, true where "
            "one may see the other, or of real numbers to add to the scores."
        )
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def attend_differentiably(query, key, value, mask, is_causal, scaling) -> torch.Tensor:
    """`attend` on the whole at once, by operations that can be derived as often as one likes."""
    if mask is not None:  # added, for `attend_backward` derives hidden scores like others
        mask = as_added(mask, query.dtype)
    return torch.matmul(_weights(query, key, mask, is_causal, scaling), value).transpose(1, 2)


class BlockedAttention(torch.autograd.Function):
    """`attend`, which keeps queries, keys and values for the backward pass."""

    @staticmethod
    def forward(ctx, query, key, value, mask, is_causal: bool, scaling: float) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.settings = is_causal, scaling
        return attend(query, key, value, mask, is_causal, scaling)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (*tensors, mask), (is_causal, scaling) = ctx.saved_tensors, ctx.settings
        if not torch.is_grad_enabled():
            query, key, value = tensors
            return *attend_backward(grad, query, key, value, mask, is_causal, scaling), None, None, None

        def attention(query, key, value):
            return attend_differentiably(query, key, value, mask, is_causal, scaling)

        return *differentiable_gradients(attention, tensors, ctx.needs_input_grad[:3], grad), None, None, None


# PyTorch knows an operation by its name, and a checkpoint's own code may run beside the installed package.
NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{NAMESPACE}::blocked_attention", mutates_args=())
def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
) -> torch.Tensor:
    """The same as one operation, which `torch.compile` leaves as it is: unrolled, its blocks would be the graph."""
    return attend(query, key, value, mask, is_causal, scaling)


@torch.library.custom_op(f"{NAMESPACE}::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attend_backward` as one operation."""
    return attend_backward(grad, query, key, value, mask, is_causal, scaling)


@blocked_attention.register_fake
def _(query, key, value, mask, is_causal, scaling):
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1])


@blocked_attention_backward.register_fake
def _(grad, query, key, value, mask, is_causal, scaling):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx, inputs, output) -> None:
    *tensors, is_causal, scaling = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = is_causal, scaling


def _backward(ctx, grad: torch.Tensor):
    return *blocked_attention_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None


blocked_attention.register_autograd(_backward, setup_context=_keep)
