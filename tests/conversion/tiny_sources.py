"""Tiny random sources of every text family, with awkward shapes."""

import torch
import transformers
from helpers import scramble
from transformers import PreTrainedConfig, PreTrainedModel

from sas_hf.conversion.convert import FAMILIES


BASE = {
    "vocab_size": 300,
    "hidden_size": 60,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # far from uniform attention, so that mistakes show
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {"model_type": "gpt2", "num_attention_heads": 5, "n_inner": 44}
NEOX = {"model_type": "gpt_neox", "num_attention_heads": 5}
MISTRAL = {"model_type": "mistral", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 14}
QWEN2 = {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2}
QWEN3 = {"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14}
SMOLLM3 = {"model_type": "smollm3", "num_attention_heads": 6, "num_key_value_heads": 2}
OLMO2 = {"model_type": "olmo2", "num_attention_heads": 6, "num_key_value_heads": 2}
PHI = {"model_type": "phi", "num_attention_heads": 5}
HELIUM = {"model_type": "helium", "num_attention_heads": 6, "head_dim": 10, "rms_norm_eps": 0.1}

SHAPES = {
    "gpt2": GPT2,
    "gpt2-plain": GPT2 | {"scale_attn_weights": False, "n_inner": None, "tie_word_embeddings": False},
    "gpt_neox": NEOX,  # a quarter of 12 features: 3, rounded up to 4
    "gpt_neox-sequential": NEOX
    | {
        "num_attention_heads": 3,
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "mistral": MISTRAL | {"sliding_window": None},
    "mistral-window": MISTRAL | {"num_key_value_heads": 1, "sliding_window": 128, "tie_word_embeddings": True},
    "qwen2": QWEN2,
    "qwen2-window": QWEN2
    | {
        "num_key_value_heads": 3,
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 3,  # from the fourth of three layers on
        "tie_word_embeddings": True,
    },
    "qwen3": QWEN3,
    "qwen3-biases": QWEN3 | {"num_attention_heads": 5, "num_key_value_heads": 1, "attention_bias": True},
    "smollm3": SMOLLM3 | {"no_rope_layers": [1, 0, 1, 1]},  # one more than layers
    "smollm3-biases": SMOLLM3
    | {
        "no_rope_layer_interval": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
    },
    "olmo2": OLMO2,
    "olmo2-biases": OLMO2 | {"num_key_value_heads": 6, "attention_bias": True, "tie_word_embeddings": True},
    "phi": PHI | {"tie_word_embeddings": True},
    "phi-partial": PHI
    | {"num_attention_heads": 6, "num_key_value_heads": 2, "partial_rotary_factor": 0.4, "hidden_act": "gelu"},
    "helium": HELIUM | {"num_key_value_heads": 2},
    "helium-biases": HELIUM
    | {
        "num_key_value_heads": 6,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
    },
}
FAMILY_NAMES = sorted({fields["model_type"] for fields in SHAPES.values()})  # each is the name of a shape too


def tiny_source_config(shape: str, **fields) -> PreTrainedConfig:
    return transformers.AutoConfig.for_model(**BASE | SHAPES[shape] | fields)


def source_classes(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """The classes of a family that can be converted, by name."""
    return {name: getattr(transformers, name) for name in FAMILIES[model_type].architectures}


def language_model(model_type: str) -> type[PreTrainedModel]:
    return next(cls for name, cls in source_classes(model_type).items() if name.endswith(("CausalLM", "LMHeadModel")))


def tiny_source(shape: str, **fields) -> PreTrainedModel:
    """A random language model, biases and norms off their zeros and ones."""
    torch.manual_seed(0)
    config = tiny_source_config(shape, **fields)
    return scramble(language_model(config.model_type)(config))
