"""The papers' models by name: `named_config("sas-125m")`.

SAS paper, Table 2 and Appendix C (backbone of the FineWeb-Edu runs: RoPE, RMSNorm, SwiGLU, no biases, tied
embeddings, GPT-2's tokenizer padded to 50,304), Table 7's variants under simulation; "You Need to Pay Better
Attention", Tables 1 and 5-7 (image classifiers), 2, 8 and 9 (text classifiers), 3 and 10 (translation). What a paper
leaves open is marked as ours.
"""

import difflib
from typing import Any

from .modeling import SASEncoderConfig, SASGPTConfig, SASSeq2SeqConfig, SASViTConfig


# name of the size: (hidden size, layers, MHA heads)
SIZES = {
    "cpu": (64, 2, 4),  # ours: the papers' comparisons at a size for two cores
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "760m": (1280, 36, 20),
    "1.5b": (1600, 48, 25),
    "2.7b": (2560, 32, 32),
    "6.7b": (4096, 32, 32),
    "10.6b": (5120, 33, 40),  # ours: the paper gives no configuration
}

# Of that size: its vocabulary, and weights that start as large as the width lets them (0.02 is for thousands).
CPU_BACKBONE = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}

# Heads of MQA, of GQA with two key/value heads, of MLA and of TPA: as many as keep the parameters of MHA. 125M and
# 350M are Table 2's, 760M and 1.5B those of the TPA paper's public configurations; at the other sizes, for which no
# paper prints any, they are ours by the same rule.
BASELINE_HEADS = {
    "cpu": (7, 6, 5, 8),
    "125m": (23, 22, 13, 36),
    "350m": (31, 30, 23, 48),
    "760m": (39, 38, 34, 61),
    "1.5b": (49, 48, 49, 78),
    "2.7b": (63, 62, 79, 105),
    "6.7b": (63, 62, 93, 109),
    "10.6b": (79, 78, 123, 139),
}
# With these ranks of 125M the heads above keep MHA's parameters at every size.
MLA_RANKS = {"q_lora_rank": 512, "kv_lora_rank": 256}
CPU_MLA_RANKS = {"q_lora_rank": 40, "kv_lora_rank": 16}
CPU_TPA_RANKS = {"q_rank": 3, "k_rank": 1, "v_rank": 1}
# "mla-...-r1024": what the TPA paper's public configurations have from C = 1,024 on instead, with the same heads: a
# third more parameters than MHA.
PUBLIC_MLA = {"q_lora_rank": 1024, "kv_lora_rank": 512, "qk_nope_head_dim": 32}

# IMDB and Amazon reviews, after the text classifier of Keras's examples, which the paper names: post-norm, ReLU,
# learned positions, the mean of the tokens, dropout 0.1 but inside of the attention. Vocabulary sizes and the
# feed-forward width are inferred from the printed totals. The example's hidden layer of 20 before the classes is left
# out, and what it does not have comes with BERT's architecture: dropout of the embeddings, padding that is not seen.
TEXT_CLASSIFIERS = {
    "imdb": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "max_position_embeddings": 32,
        "vocab_size": 20000,
        "num_labels": 2,
    },
    "amazon": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
        "vocab_size": 40000,
        "num_labels": 5,
    },
}

# MNIST, CIFAR100 and ImageNet. Feed-forward widths and CIFAR100's patches are inferred: the paper gives 300K and 60M
# parameters in all, and context lengths of 64 and 256. Classifiers are linear; in Table 7, whose first row is
# Table 1's, ImageNet's has a hidden layer ("imagenet-60m-standard").
IMAGE_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "mnist": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
        "num_channels": 1,
        "num_labels": 10,
        "use_class_token": False,  # 64 tokens
        "classifier_pooling": "mean",
    },
    "cifar100": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "image_size": 32,
        "patch_size": 2,
        "num_labels": 100,
    },
    "imagenet": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "image_size": 112,
        "patch_size": 8,
        "num_labels": 1000,
    },
}


# Table 7, ImageNet at about the same size: hidden size and layers. The totals come out of feed-forward blocks that are
# 3,072 wide at every hidden size, and of a classifier with a hidden layer of 2,000, of which the paper does not speak.
SAME_SIZE = {
    "standard": (768, 8),
    "optimised": (816, 8),
    "efficient": (804, 9),
    "super": (804, 9),
    "sas": (768, 8),  # ours, half a per cent larger than standard
}


# English to Spanish, after Keras's example: post-norm, ReLU, learned positions, embeddings of both sides and the head
# apart. Which attentions are replaced the paper does not say: all three of them (encoder, decoder, from there to the
# source) are, which is inferred. Dropout is ours: that of Keras's example is on the decoder's output alone.
TRANSLATION = {
    "vocab_size": 15000,
    "decoder_vocab_size": 15000,
    "share_encoder_decoder_embeddings": False,
    "tie_word_embeddings": False,
    "lm_head_bias": True,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 4,  # or 1, or 2
    "max_position_embeddings": 20,
    "position_embedding_type": "learned",
    "embedding_norm": False,
    "norm_position": "post_residual",
    "norm_type": "layer_norm",
    "mlp_type": "plain",
    "hidden_act": "relu",
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _backbone(size: str) -> dict:
    hidden_size, layers, heads = SIZES[size]
    return {
        "vocab_size": 50304,
        "hidden_size": hidden_size,
        "intermediate_size": 8 * hidden_size // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": hidden_size // heads,
        "max_position_embeddings": 1024,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    } | (CPU_BACKBONE if size == "cpu" else {})


def _baselines(size: str) -> dict[str, dict]:
    """MQA, GQA, MLA and TPA in the place of MHA. (MLA's 32 and 64 features for heads of 64 are halves and wholes of a
    head at the other sizes, too.)"""
    mha = _backbone(size)
    heads = dict(zip(("mqa", "gqa", "mla", "tpa"), BASELINE_HEADS[size], strict=True))
    cpu, features = size == "cpu", mha["head_dim"]
    widths = {"qk_rope_head_dim": features // 2, "qk_nope_head_dim": features, "v_head_dim": features}
    own = {
        "mqa": {"num_key_value_heads": 1},
        "gqa": {"num_key_value_heads": 2},
        "mla": (CPU_MLA_RANKS if cpu else MLA_RANKS) | widths,
        "tpa": CPU_TPA_RANKS if cpu else {},
    }
    return {kind: mha | {"attention_type": kind, "num_attention_heads": heads[kind]} | own[kind] for kind in heads}


def _simulated(fields: dict, times: int, kernel_size: int) -> dict:
    """More heads, and D̂ = 1.5·D: the paper's 96 for heads of 64; for heads of other sizes ours."""
    mla = fields.get("attention_type") == "mla"
    width = fields["qk_rope_head_dim"] + fields["qk_nope_head_dim"] if mla else fields["head_dim"]
    return fields | {
        "num_simulated_heads": times * fields["num_attention_heads"],
        "simulated_head_dim": width * 3 // 2,
        "simulation_kernel_size": kernel_size,
    }


def _text_classifier(task: str, kind: str) -> dict:
    fields: dict[str, Any] = TEXT_CLASSIFIERS[task] | {
        "attention_type": "mha" if kind in ("standard", "sas") else kind,
        "intermediate_size": TEXT_CLASSIFIERS[task]["hidden_size"],
        "num_attention_heads": 4,
        "hidden_act": "relu",
        "attention_probs_dropout_prob": 0.0,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-6,
        "embedding_norm": False,
        "classifier_pooling": "mean",
        "pooler_act": None,
    }
    if kind == "sas":  # ours: the SAS paper has no text classifiers
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
        return _simulated(fields, times=3, kernel_size=1)
    return fields


def _image_classifier(task: str, kind: str) -> dict:
    fields = IMAGE_CLASSIFIERS[task]
    fields = fields | {"encoder_stride": fields["patch_size"]}
    if kind in ("standard", "sas"):
        fields["attention_type"] = "mha"
    if kind == "sas":  # ours: the SAS paper has no images
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
        return _simulated(fields, times=3, kernel_size=1)
    return {"attention_type": kind} | fields


def _image_classifier_of_same_size(kind: str) -> dict:
    hidden_size, layers = SAME_SIZE[kind]
    fields = {"hidden_size": hidden_size, "num_hidden_layers": layers, "classifier_hidden_size": 2000}
    return _image_classifier("imagenet", kind) | fields


def _translator(kind: str) -> dict:
    if kind == "sas":  # ours: the paper has none; three times the heads, and D̂ = 1.5·D
        return TRANSLATION | {"attention_type": "mha", "num_simulated_heads": 12, "simulated_head_dim": 384}
    return TRANSLATION | {"attention_type": "mha" if kind == "standard" else kind}


def _all_configs() -> dict[str, dict]:
    named = {}
    for size in SIZES:
        named[f"mha-{size}"] = _backbone(size)
        named[f"sas-{size}"] = _simulated(_backbone(size), times=3, kernel_size=1)
        named[f"mha-sas-{size}"] = _simulated(_backbone(size), times=3, kernel_size=5)
        for kind, fields in _baselines(size).items():
            named[f"{kind}-{size}"] = fields
    for size in ("350m", "760m", "1.5b"):
        named[f"mla-{size}-r1024"] = named[f"mla-{size}"] | PUBLIC_MLA
    for size in ("cpu", "125m"):  # Table 7
        for kind in _baselines(size):
            named[f"{kind}-sas-{size}"] = _simulated(named[f"{kind}-{size}"], times=2, kernel_size=1)
    for task in TEXT_CLASSIFIERS:
        for kind in ("standard", "optimised", "efficient", "super", "sas"):
            named[f"{task}-{kind}"] = _text_classifier(task, kind)
    for task in IMAGE_CLASSIFIERS:
        for kind in ("standard", "optimised", "efficient", "super", "sas"):
            named[f"{task}-{kind}"] = _image_classifier(task, kind)
    for kind in SAME_SIZE:
        named[f"imagenet-60m-{kind}"] = _image_classifier_of_same_size(kind)
    for kind in ("standard", "optimised", "efficient", "sas"):  # "super" has a fixed length, and is left out there
        named[f"nmt-{kind}"] = _translator(kind)
    return named


NAMED_CONFIGS = _all_configs()
# By what a name begins with; all others are language models.
_CLASSES: dict[str, type[SASEncoderConfig | SASViTConfig | SASSeq2SeqConfig]] = {
    **dict.fromkeys(TEXT_CLASSIFIERS, SASEncoderConfig),
    **dict.fromkeys(IMAGE_CLASSIFIERS, SASViTConfig),
    "nmt": SASSeq2SeqConfig,
}


def named_config(name: str, **overrides) -> SASGPTConfig | SASEncoderConfig | SASSeq2SeqConfig | SASViTConfig:
    """The configuration of a model of the papers.

    Args:
        name: one of `NAMED_CONFIGS`, such as "sas-125m", "gqa-350m", "mla-sas-125m", "imdb-super" or "mnist-sas".
        overrides: fields to change.

    Raises:
        ValueError: for an unknown name (with the nearest known ones).
    """
    if name not in NAMED_CONFIGS:
        near = difflib.get_close_matches(name, NAMED_CONFIGS, n=3) or sorted(NAMED_CONFIGS)
        raise ValueError(f"There is no configuration named {name!r}; known are, for instance, {', '.join(near)}.")
    config_class = _CLASSES.get(name.partition("-")[0], SASGPTConfig)
    return config_class(**NAMED_CONFIGS[name] | overrides)
