"""How scores are computed: attention functions with the signature that Transformers' `AttentionInterface` asks for.

The layer finds them by `config._attn_implementation`. Here are the definition ("eager") and what this architecture
needs instead of Transformers' "sdpa" and FlashAttention where keys are wider than values, by the table of
attention_kernels.py; all others are Transformers' or the user's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.flash_attention import (
    flash_attention_forward as transformers_flash_attention_forward,
)
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward as transformers_sdpa_attention_forward
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as SHARED_ATTENTION_FUNCTIONS
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.processing_utils import Unpack

from .annotations import AttentionLayer, ForwardKwargs
from .attention_kernels import AS_THEY_ARE, IN_BLOCKS, PADDED, choose
from .blocked_attention import BlockedAttention, as_added, blocked_attention
from .recomputation import attend_padded
from .transforms import are_ordinary, is_transformed


def repeat_kv(states: torch.Tensor, repeats: int) -> torch.Tensor:
    """`[B, H_kv, S, D]` to `[B, H_kv·repeats, S, D]`, each head repeated in place."""
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def eager_attention_forward(
    module: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[ForwardKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out: `[B, heads, T, width]` in, `[B, T, heads, D_v]` and the weights out."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + as_added(attention_mask, scores.dtype)
    # At least float32, as everywhere in the ecosystem, but never less than the inputs.
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, query.dtype))
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def sdpa_attention_forward(
    module: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Unpack[ForwardKwargs],
) -> tuple[torch.Tensor, None]:
    """Transformers' "sdpa", with what attention_kernels.py chooses where keys are wider than values: on a CPU, which
    has no fast kernel for such, in blocks. Shapes as in `eager_attention_forward`; no weights."""
    registered = SHARED_ATTENTION_FUNCTIONS["sdpa"]
    chosen = None
    if registered is transformers_sdpa_attention_forward and query.shape[-1] > value.shape[-1]:
        chosen = choose("sdpa", query, value)
    values = AS_THEY_ARE if chosen is None else chosen.values
    if values != IN_BLOCKS or not _blocks_serve(module, query, key, value, attention_mask, dropout, kwargs):
        attend = partial(
            registered, module, query, key, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        if values == PADDED and attention_mask is None:  # the kernel that asks for it knows no masks
            return attend_padded(lambda padded: attend(padded, None)[0], value, query.shape[-1]), None
        return attend(value, attention_mask)
    # As there: no mask and more than one query, and the kernel hides the future itself.
    hides_future = module.is_causal if is_causal is None else is_causal
    hides_future = hides_future and attention_mask is None and query.shape[2] > 1
    if hides_future:  # a static cache has empty slots behind
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    in_blocks = blocked_attention if torch.compiler.is_compiling() else BlockedAttention.apply
    return in_blocks(query, key, value, attention_mask, hides_future, scaling), None


def _blocks_serve(module, query, key, value, attention_mask, dropout, kwargs) -> bool:
    """Whether attention in blocks computes what is asked for."""
    return (
        query.shape[0] == key.shape[0]
        and module.num_key_value_groups == 1
        and not dropout
        and all(kwargs.get(name) is None for name in ("position_bias", "softcap"))
        and not kwargs.get("output_attentions")  # of which a warning is due
        and are_ordinary((query, key, value, attention_mask))
        and (attention_mask is None or _is_as_models_make_it(attention_mask, query, key))
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed(but_for_compilation=True)
    )


def _is_as_models_make_it(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Otherwise it is left to PyTorch, which extends it, derives by it or refuses it."""
    rows, heads, length = query.shape[:3]
    return (
        mask.ndim == 4
        and mask.shape[0] in (1, rows)
        and mask.shape[1] in (1, heads)
        and mask.shape[2] == length
        and mask.shape[3] == key.shape[2]
        and mask.dtype in (torch.bool, query.dtype)
        and not mask.requires_grad
    )


def flash_attention_forward(
    module: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: dict[str, torch.Tensor | int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' function for every version of FlashAttention. Where keys are wider than values, the version that
    takes them as they are gets them so (attention_kernels.py), and padded values are not kept for the backward pass.

    Args:
        attention_mask: `[B, S]`, or `None` where nothing is padded.
        documents: where packed documents begin, by `packed_documents`.
    """
    if kwargs.get("cu_seq_lens_q") is None:
        kwargs |= documents or {}
    width, name = query.shape[-1], module.config._attn_implementation.removeprefix("paged|")
    if width == value.shape[-1]:
        return transformers_flash_attention_forward(module, query, key, value, attention_mask, **kwargs)
    chosen = choose(name, query, value)
    if chosen is None or chosen.values != AS_THEY_ARE:

        def attend(padded):
            return transformers_flash_attention_forward(module, query, key, padded, attention_mask, **kwargs)[0]

        return attend_padded(attend, value, width), None
    is_causal, scaling = kwargs.pop("is_causal", None), kwargs.pop("scaling", None)
    output = _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=module.is_causal if is_causal is None else is_causal,
        softmax_scale=scaling,
        target_dtype=get_target_dtype(query, module),
        attn_implementation=name,
        **kwargs,
    )
    return output, None


TELL_VLLM = (
    "Install `sas_hf` beside vLLM, whose plugin tells it so, and leave `model_impl` and `VLLM_PLUGINS` as they are."
)


def vllm_attention_forward(
    module: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Unpack[ForwardKwargs],
) -> tuple[torch.Tensor, None]:
    """What vLLM registers; it holds keys and values itself. Of itself it makes room for heads as they are before
    simulation, takes those of several tokens for one's, and says nothing.

    Raises:
        ValueError: where vLLM was not told of these heads, or cannot compute this attention.
    """
    held: Any = module.attn  # vLLM's own layer, which it puts there
    room = held.num_heads, held.num_kv_heads, held.head_size
    needed = query.shape[1], key.shape[1], query.shape[3]
    if room != needed:
        raise ValueError(
            f"vLLM made room for {room[0]} heads and {room[1]} key/value heads of {room[2]} features, but this layer "
            f"has {needed[0]} and {needed[1]} of {needed[2]}. {TELL_VLLM}"
        )
    if module.mixes_tokens:
        raise ValueError(
            "vLLM cannot serve `attention_type='super'`: it holds the tokens of several texts in one row, along which "
            "this mixes values."
        )
    return SHARED_ATTENTION_FUNCTIONS["vllm"](module, query, key, value, attention_mask, **kwargs)


def refuse_pooling_of_vllm(model: PreTrainedModel) -> None:
    """Raise a `ValueError` where vLLM makes a classifier by itself: it would read the first token of a text, of
    whichever model, and leave out an encoder's pooler. The package's plugin has classifiers of its own."""
    if model.config._attn_implementation == "vllm":
        raise ValueError(f"vLLM alone cannot tell which tokens {type(model).__name__} reads. {TELL_VLLM}")


class SASAttentionInterface(AttentionInterface):
    """Transformers' table of attention functions, with what this architecture needs of its own."""

    def __init__(self):
        super().__init__()
        self["sdpa"] = sdpa_attention_forward
        self["vllm"] = vllm_attention_forward

    def get_interface(self, attn_implementation: str | None, default: Callable) -> Callable:
        """As in Transformers. Every cache was extended before, the pool of continuous batching too: "paged|" asks for
        nothing more. FlashAttention has many names, those of kernels from the Hub too, and one function."""
        name = attn_implementation and attn_implementation.removeprefix("paged|")
        found = super().get_interface(name, default)  # type: ignore[arg-type]  # it takes None, too
        return flash_attention_forward if found is transformers_flash_attention_forward else found


ALL_ATTENTION_FUNCTIONS = SASAttentionInterface()
