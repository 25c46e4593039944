"""GPT-2 checkpoints: learned positions, transposed weights, and queries, keys and values in one."""

from collections.abc import Iterable, Sequence

import torch
from transformers import GPT2Config

from .family import TEXT_FIELDS, ConversionError, SourceFamily, common_dropout, text_architectures


def derive(config: GPT2Config) -> dict:
    if config.scale_attn_by_inverse_layer_idx:
        raise ConversionError(
            "`scale_attn_by_inverse_layer_idx` gives every layer its own score scale, but the SAS model has one for "
            "all (`query_pre_attn_scalar`)."
        )
    if config.add_cross_attention:
        raise ConversionError("`add_cross_attention`: the SAS model is a decoder without an encoder to look at.")
    scale = {} if config.scale_attn_weights else {"query_pre_attn_scalar": 1.0}
    return scale | {
        "intermediate_size": 4 * config.n_embd if config.n_inner is None else config.n_inner,
        "hidden_dropout": common_dropout(config, "embd_pdrop", "resid_pdrop"),
    }


def tensors(name: str, weight: torch.Tensor, config: GPT2Config) -> Iterable[torch.Tensor]:
    if ".c_" in name:  # Conv1D keeps its weight as [in, out]
        weight = weight.T if weight.ndim == 2 else weight
    return weight.chunk(3) if ".c_attn." in name else (weight,)


def join(name: str, weights: Sequence[torch.Tensor], config: GPT2Config) -> torch.Tensor:
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    return weight.T if ".c_" in name and weight.ndim == 2 else weight


GPT2 = SourceFamily(
    model_type="gpt2",
    architectures=text_architectures("GPT2", causal="LMHeadModel"),
    fields=TEXT_FIELDS
    | {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
        "attn_pdrop": "attention_dropout",
    },
    constants={
        "position_embedding_type": "learned",
        "norm_type": "layer_norm",
        "mlp_type": "plain",
        "attention_bias": True,
        "mlp_bias": True,
    },
    derive=derive,
    names={
        "wte": "embed_tokens",
        "wpe": "embed_positions",
        "h": "layers",
        "ln_1": "input_layernorm",
        "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj": "self_attn.o_proj",
        "ln_2": "post_attention_layernorm",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
        "ln_f": "norm",
        "classifier": "score",
    },
    tensors=tensors,
    join=join,
)
