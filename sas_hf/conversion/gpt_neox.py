"""GPT-NeoX checkpoints (Pythia, GPT-NeoX-20B, ...): queries, keys and values of each head in one, partial RoPE."""

from collections.abc import Iterable, Sequence

import torch
from transformers import GPTNeoXConfig

from .family import ROPE_FIELDS, SourceFamily, same, text_architectures


def tensors(name: str, weight: torch.Tensor, config: GPTNeoXConfig) -> Iterable[torch.Tensor]:
    if ".query_key_value." not in name:
        return (weight,)
    by_head = weight.unflatten(0, (config.num_attention_heads, 3, -1))
    return (by_head[:, side].flatten(0, 1) for side in range(3))


def join(name: str, weights: Sequence[torch.Tensor], config: GPTNeoXConfig) -> torch.Tensor:
    if ".query_key_value." not in name:
        return weights[0]
    by_head = [weight.unflatten(0, (config.num_attention_heads, -1)) for weight in weights]
    return torch.stack(by_head, dim=1).flatten(0, 2)


GPT_NEOX = SourceFamily(
    model_type="gpt_neox",
    architectures=text_architectures("GPTNeoX"),
    fields=ROPE_FIELDS
    | same("layer_norm_eps", "attention_dropout", "hidden_dropout", "use_parallel_residual", "attention_bias"),
    constants={"norm_type": "layer_norm", "mlp_type": "plain", "mlp_bias": True},
    names={
        "embed_in": "embed_tokens",
        "attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
        "final_layer_norm": "norm",
        "classifier": "score",
    },
    tensors=tensors,
    join=join,
)
