"""Phi-1, Phi-1.5 and Phi-2 checkpoints: parallel residual, partial RoPE, biases everywhere.

Attention and the feed-forward block share one norm there; here each has its own, which start equal.
"""

from collections.abc import Iterable, Sequence

import torch
from transformers import PhiConfig

from .family import ROPE_FIELDS, ConversionError, SourceFamily, common_dropout, same, text_architectures


def derive(config: PhiConfig) -> dict:
    if config.qk_layernorm:
        raise ConversionError(
            "`qk_layernorm` norms queries and keys by LayerNorm, but the SAS model's `qk_norm` is an RMSNorm."
        )
    return {
        "attention_dropout": config.attention_dropout or 0.0,
        "hidden_dropout": common_dropout(config, "embd_pdrop", "resid_pdrop"),
    }


def tensors(name: str, weight: torch.Tensor, config: PhiConfig) -> Iterable[torch.Tensor]:
    return (weight, weight.clone()) if ".input_layernorm." in name else (weight,)


def join(name: str, weights: Sequence[torch.Tensor], config: PhiConfig) -> torch.Tensor:
    if not all(torch.equal(weight, weights[0]) for weight in weights):
        raise ConversionError(
            f"Attention and feed-forward block share one norm in Phi ({name}), but here theirs were trained apart, by "
            f"up to {(weights[0] - weights[1]).abs().max().item():.3g}."
        )
    return weights[0]


PHI = SourceFamily(
    model_type="phi",
    architectures=text_architectures("Phi", without=("ForQuestionAnswering",)),
    fields=ROPE_FIELDS | same("num_key_value_heads", "layer_norm_eps"),
    constants={
        "use_parallel_residual": True,
        "norm_type": "layer_norm",
        "mlp_type": "plain",
        "attention_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
    },
    derive=derive,
    names={
        "input_layernorm": ("input_layernorm", "post_attention_layernorm"),
        "self_attn.dense": "self_attn.o_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "final_layernorm": "norm",
    },
    tensors=tensors,
    join=join,
)
