"""Configurations of tiny Llama sources with awkward shapes."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


AWKWARD = {
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12},
    "mqa": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8, "attention_bias": True},
    "mha-untied-biases": {
        "num_attention_heads": 3,
        "head_dim": 10,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama3-rope": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "yarn-rope": {
        "num_attention_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0},
    },
}


def tiny_llama_config(**fields) -> LlamaConfig:
    defaults = {
        "vocab_size": 300,
        "hidden_size": 60,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # far from uniform attention, so that mistakes show
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**defaults | fields)


def tiny_llama(shape: str) -> LlamaForCausalLM:
    """A random Llama of one of the awkward shapes, with biases off zero."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(**AWKWARD[shape])).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model
