"""Which kernel computes attention on which card where keys are wider than values: one table, each row with its reason.

Kernels differ in what they ask for. Some compute with keys of 96 and values of 64 features as they are; others know
one width, so that values are padded with zeros, which costs 1.20 times the operations forward and 1.15 times backward,
and the zeros are cut off the result. Where widths are equal nothing is chosen: the attention function asked for runs.
"""

from typing import NamedTuple

import torch


IN_BLOCKS, AS_THEY_ARE, PADDED = "in blocks", "as they are", "padded"
UNMEASURED = "unmeasured"
HALF = (torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """
    A row of the table.

    Attributes:
        functions: the attention functions (`attn_implementation`) whose rows these are.
        device: the type of device.
        capability: the least and the greatest compute capability of a CUDA card; `None`: any.
        dtypes: of queries, keys and values.
        alignment: what both widths must be multiples of.
        kernel: whose kernel then computes.
        values: what becomes of the values: `AS_THEY_ARE`, `PADDED` or, on a CPU, `IN_BLOCKS`.
        evidence: the figure that put the row here, with its place, or `UNMEASURED`.
    """

    functions: tuple[str, ...]
    device: str
    capability: tuple[tuple[int, int], tuple[int, int]] | None
    dtypes: tuple[torch.dtype, ...]
    alignment: int
    kernel: str
    values: str
    evidence: str


# The first row that fits is taken; where none does, sdpa gets values as they are and FlashAttention padded ones. Of
# the kernels of "sdpa" PyTorch takes the first that serves, on capability 9 and 10 beginning with cuDNN's where its
# version is sound; padded values let its flash kernel serve, too.
CHOICES = [
    Choice(
        ("sdpa",),
        "cpu",
        None,
        (torch.float32, torch.float64),
        1,
        "ours, blocked_attention.py",
        IN_BLOCKS,
        "docs/cost.md, G: a training step 1.70 times MHA's (1.70-1.80), without it 2.76 (2.66-2.83)",
    ),
    Choice(("sdpa",), "cpu", None, HALF, 1, "PyTorch's, written out", AS_THEY_ARE, UNMEASURED),
    Choice(
        ("sdpa",),
        "cuda",
        ((9, 0), (10, 9)),
        HALF,
        8,
        "cuDNN's",
        AS_THEY_ARE,
        "docs/gpu.md, an H200: a training step 2.66 times MHA's, memory-efficient 2.56, flash padded 2.53",
    ),
    Choice(("sdpa",), "cuda", None, HALF, 8, "PyTorch's memory-efficient", AS_THEY_ARE, UNMEASURED),
    Choice(("sdpa",), "cuda", None, (torch.float32,), 4, "PyTorch's memory-efficient", AS_THEY_ARE, UNMEASURED),
    Choice(
        ("flash_attention_4", "kernels-community/flash-attn4"),
        "cuda",
        ((9, 0), (11, 9)),
        HALF,
        8,
        "FlashAttention 4",
        AS_THEY_ARE,
        UNMEASURED,
    ),
    Choice(
        ("flash_attention_3", "kernels-community/flash-attn3", "kernels-community/vllm-flash-attn3"),
        "cuda",
        None,
        HALF,
        1,
        "FlashAttention 3",
        PADDED,
        UNMEASURED,
    ),
    Choice(
        ("flash_attention_2", "kernels-community/flash-attn2"),
        "cuda",
        None,
        HALF,
        1,
        "FlashAttention 2",
        PADDED,
        UNMEASURED,
    ),
    Choice(("flex_attention",), "cuda", None, (*HALF, torch.float32), 1, "PyTorch's flex", AS_THEY_ARE, UNMEASURED),
]


def choose(function: str, query: torch.Tensor, value: torch.Tensor) -> Choice | None:
    """The row of [`CHOICES`] for an attention function, queries `[..., D̂]` and values `[..., D_v]`; `None`: no row."""
    for row in CHOICES:
        if (
            function in row.functions
            and query.device.type == row.device
            and query.dtype in row.dtypes
            and query.shape[-1] % row.alignment == value.shape[-1] % row.alignment == 0
            and (row.capability is None or row.capability[0] <= _capability(query.device) <= row.capability[1])
        ):
            return row
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a card; (0, 0) where there is none, for tensors without memory."""
    if not torch.cuda.is_available():
        return (0, 0)
    card = torch.cuda.get_device_properties(device)  # what `torch.compile` knows as a constant
    return card.major, card.minor
