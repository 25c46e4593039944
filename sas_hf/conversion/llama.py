"""Llama-architecture checkpoints (Llama 1-3, SmolLM, TinyLlama, ...): every weight keeps its name."""

from transformers import LlamaConfig

from ..modeling import (
    SASGPTForCausalLM,
    SASGPTForQuestionAnswering,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    SASGPTModel,
)
from .family import SourceFamily


SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)


def fields(config: LlamaConfig) -> dict:
    return {name: getattr(config, name) for name in SAME_FIELDS}


def rename(name: str) -> str:
    # Llama's question answering calls its body `transformer`.
    return "model." + name.removeprefix("transformer.") if name.startswith("transformer.") else name


LLAMA = SourceFamily(
    model_type="llama",
    architectures={
        "LlamaModel": SASGPTModel,
        "LlamaForCausalLM": SASGPTForCausalLM,
        "LlamaForSequenceClassification": SASGPTForSequenceClassification,
        "LlamaForTokenClassification": SASGPTForTokenClassification,
        "LlamaForQuestionAnswering": SASGPTForQuestionAnswering,
    },
    fields=fields,
    rename=rename,
)
