"""What the tests share: tiny configurations by name, models with telling weights, real text and a tiny tokenizer.

The weights are ten times the usual size, biases and norms included, so that a wrong rotation, mask or group shows in
the logits.
"""

import functools
import gzip
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sas_hf import (
    SASEncoderConfig,
    SASEncoderForMaskedLM,
    SASGPTConfig,
    SASGPTForCausalLM,
    SASSeq2SeqConfig,
    SASSeq2SeqForConditionalGeneration,
    SASViTConfig,
    SASViTForImageClassification,
)
from sas_hf.modeling.cache_name import CACHE_NAME


# Where models and inputs of the tests are: `SAS_HF_TEST_DEVICE=cuda python -m pytest tests/modeling`. conftest.py
# makes it the default of tests that make their own tensors; trainers find a device themselves unless told not to.
DEVICE = torch.device(os.environ.get("SAS_HF_TEST_DEVICE", "cpu"))
USE_CPU = DEVICE.type == "cpu"

TRANSFORMERS = Version(transformers.__version__)
# What Transformers calls it when activations are made again for the backward pass.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(PreTrainedModel, f"{CHECKPOINTING}_enable"):
    CHECKPOINTING = "gradient_checkpointing"

GPT_BASE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GPT2_BACKBONE = {
    "position_embedding_type": "learned",
    "norm_type": "layer_norm",
    "mlp_type": "plain",
    "hidden_act": "gelu_new",
    "attention_bias": True,
    "mlp_bias": True,
}
SAS = {"num_simulated_heads": 12, "simulated_head_dim": 12}
BEYOND_PAPER = SAS | {"simulate_value_features": True, "head_aggregation": "concat"}

# Every attention and every ablation of §4.3 of the paper, by configuration alone.
PLAIN_VARIANTS = {
    "mha": {},
    "gqa": {"attention_type": "gqa", "num_key_value_heads": 2},
    "mqa": {"attention_type": "mqa"},
    "learned": GPT2_BACKBONE,
}
SAS_VARIANTS = {
    "sas": SAS,
    "sas_k5_gqa": SAS | {"num_key_value_heads": 2, "simulation_kernel_size": 5},
    "sas_mqa": SAS | {"attention_type": "mqa", "simulation_kernel_size": 3},
    "head_only": {"num_simulated_heads": 12, "num_key_value_heads": 2},
    "feature_only": {"simulated_head_dim": 12, "num_key_value_heads": 2},
    "linear": SAS | {"simulation_act": "identity"},
    "same_heads": {"num_simulated_heads": 4, "simulated_head_dim": 12},
    "same_features": {"num_simulated_heads": 8, "simulated_head_dim": 8},
    "all_rotated": SAS | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}},
    "half_rotated": SAS | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "values_only": {"simulate_value_features": True, "num_key_value_heads": 2},
    "beyond_paper": BEYOND_PAPER | {"num_key_value_heads": 2},
    "sas_learned": SAS | GPT2_BACKBONE | {"simulation_kernel_size": 7, "simulation_init": "pytorch"},
}
MHA_VARIANTS = PLAIN_VARIANTS | SAS_VARIANTS

# The other kinds of attention, alone and simulated.
MLA = {"attention_type": "mla", "q_lora_rank": 20, "kv_lora_rank": 12}
TPA = {"attention_type": "tpa", "q_rank": 3}
PLAIN_VARIANTS |= {
    "mla": MLA,
    "tpa": TPA,
    "optimised": {"attention_type": "optimised"},
    "efficient": {"attention_type": "efficient"},
    "super": {"attention_type": "super", "token_mixing_init": "normal"},
}
SAS_VARIANTS |= {
    "mla_sas": MLA | SAS,
    "mla_beyond_paper": MLA | BEYOND_PAPER | {"v_head_dim": 6},
    "tpa_sas": TPA | SAS,
    "optimised_sas": {"attention_type": "optimised"} | SAS,
    "efficient_sas": {"attention_type": "efficient"} | SAS,
    "efficient_beyond_paper": {"attention_type": "efficient"} | BEYOND_PAPER,
}

# Backbones of other decoders.
PARALLEL = {
    "use_parallel_residual": True,
    "norm_type": "layer_norm",
    "mlp_type": "plain",
    "lm_head_bias": True,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
POST_NORM = {"norm_position": "post", "qk_norm": "all_heads", "num_key_value_heads": 2}
PLAIN_VARIANTS |= {
    "qk_norm": {"qk_norm": "per_head", "num_key_value_heads": 2, "no_rope_layers": [1, 0]},
    "post_norm": POST_NORM,
    "parallel": PARALLEL,
}
SAS_VARIANTS |= {
    "qk_norm_sas": {"qk_norm": "per_head", "num_key_value_heads": 2, "no_rope_layers": [0, 1]} | SAS,
    "post_norm_sas": POST_NORM | SAS,
    "parallel_sas": PARALLEL | SAS,
}
GPT_VARIANTS = PLAIN_VARIANTS | SAS_VARIANTS

VIT_BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_labels": 7,
    "initializer_range": 0.3,
}
WITHOUT_CLASS_TOKEN = {"use_class_token": False, "classifier_pooling": "mean"}
VIT_VARIANTS = {
    "vit": {},
    "mean": WITHOUT_CLASS_TOKEN | {"num_channels": 1},
    "distilled": {"use_distillation_token": True, "classifier_pooling": "distilled"},
    "oblong": {"image_size": (8, 18), "patch_size": (4, 6)},
    "hidden_classifier": {"classifier_hidden_size": 9},
    "gqa": {"num_key_value_heads": 2, "qkv_bias": False},
    "sas": SAS,
    "sas_k5_gqa": SAS | {"num_key_value_heads": 2, "simulation_kernel_size": 5},
    "mla": MLA,
    "mla_sas": MLA | SAS,
    "tpa": TPA,
    "tpa_sas": TPA | SAS,
    "optimised": {"attention_type": "optimised"},
    "optimised_sas": {"attention_type": "optimised"} | SAS,
    "efficient": {"attention_type": "efficient"},
    "efficient_sas": {"attention_type": "efficient"} | SAS | WITHOUT_CLASS_TOKEN,
    "beyond_paper": BEYOND_PAPER,
    "super": {"attention_type": "super", "token_mixing_init": "normal"},
    "super_mean": {"attention_type": "super", "token_mixing_init": "normal"} | WITHOUT_CLASS_TOKEN,
}

# Encoders, and encoder–decoders: the kinds alone and simulated, and other backbones.
ROPE_LLAMA = {"position_embedding_type": "rope", "norm_type": "rms_norm", "norm_position": "pre", "mlp_type": "gated"}
MARIAN = {"position_embedding_type": "sinusoidal", "scale_embedding": True, "embedding_norm": False}
ENCODER_BASE = GPT_BASE | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SUPER = {"attention_type": "super", "token_mixing_init": "normal"}
TEXT_VARIANTS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "rope": ROPE_LLAMA | {"attention_bias": False, "attention_output_bias": False},
    "sinusoidal": MARIAN,
    "olmo": ROPE_LLAMA | {"norm_position": "post", "qk_norm": "all_heads"},
    "mla": MLA,
    "tpa": TPA,
    "optimised": {"attention_type": "optimised"},
    "efficient": {"attention_type": "efficient"},
    "super": SUPER,
    "sas": SAS,
    "sas_k5_gqa": SAS | {"num_key_value_heads": 2, "simulation_kernel_size": 5},
    "sas_rope": SAS | ROPE_LLAMA,
    "mla_sas": MLA | SAS | ROPE_LLAMA,
    "tpa_sas": TPA | SAS,
    "optimised_sas": {"attention_type": "optimised"} | SAS,
    "efficient_sas": {"attention_type": "efficient"} | SAS | ROPE_LLAMA,
    "beyond_paper": BEYOND_PAPER,
}
ENCODER_VARIANTS = TEXT_VARIANTS | {
    "mean": {"classifier_pooling": "mean", "pooler_act": None, "type_vocab_size": 0},
    "untied": {"tie_word_embeddings": False, "lm_head_act": "relu"},
}
SEQ2SEQ_BASE = {name: value for name, value in GPT_BASE.items() if name != "num_hidden_layers"}
SEQ2SEQ_BASE |= {"encoder_layers": 2, "hidden_dropout": 0.0}
SEQ2SEQ_VARIANTS = TEXT_VARIANTS | {
    "two_vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 43, "lm_head_bias": True},
    "untied": {"tie_word_embeddings": False},
    "places": {
        "encoder_attention": {"attention_type": "efficient"},
        "decoder_attention": SAS | {"num_key_value_heads": 2},
        "cross_attention": SAS | {"num_attention_heads": 2, "simulated_head_dim": 20},
    },
}


def returned_cache(output):
    """The cache in a model's output, under the name that the installed version of Transformers gives it."""
    return getattr(output, CACHE_NAME)


def gpt_config(variant: str = "sas_k5_gqa", **overrides) -> SASGPTConfig:
    return SASGPTConfig(**(GPT_BASE | GPT_VARIANTS[variant] | overrides))


def gpt(variant: str = "sas_k5_gqa", model_class=SASGPTForCausalLM, **overrides):
    """A small random model in evaluation mode."""
    return scramble(model_class(gpt_config(variant, **overrides)))


def vit(variant: str = "sas_k5_gqa", model_class=SASViTForImageClassification, **overrides):
    """A small random model of images in evaluation mode."""
    return scramble(model_class(SASViTConfig(**(VIT_BASE | VIT_VARIANTS[variant] | overrides))))


def encoder(variant: str = "sas_k5_gqa", model_class=SASEncoderForMaskedLM, **overrides):
    """A small random encoder in evaluation mode."""
    return scramble(model_class(SASEncoderConfig(**(ENCODER_BASE | ENCODER_VARIANTS[variant] | overrides))))


def seq2seq(variant: str = "sas_k5_gqa", model_class=SASSeq2SeqForConditionalGeneration, **overrides):
    """A small random encoder–decoder in evaluation mode."""
    return scramble(model_class(SASSeq2SeqConfig(**(SEQ2SEQ_BASE | SEQ2SEQ_VARIANTS[variant] | overrides))))


@torch.no_grad()
def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Move biases and norm weights off their zeros and ones, where an error would not show."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def token_ids(*shape: int, vocab_size: int = 67) -> torch.Tensor:
    return torch.randint(1, vocab_size, shape)


def images(config: SASViTConfig, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, config.num_channels, *config.image_shape)


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows with the given lengths, padded on the left to the longest."""
    mask = torch.tensor([[int(slot >= max(lengths) - length) for slot in range(max(lengths))] for length in lengths])
    return token_ids(*mask.shape) * mask, mask


def generator(seed: int) -> torch.Generator:
    """A source of random numbers for tensors on the tests' device."""
    return torch.Generator(DEVICE).manual_seed(seed)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_all_close(found: dict, expected: dict, tolerance: float) -> None:
    """Equal names, and tensors within `tolerance` of the largest entry of them all (at least 1)."""
    assert found.keys() == expected.keys()
    scale = max(1.0, *(tensor.abs().max().item() for tensor in expected.values()))
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].cpu(), tensor.cpu(), atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_identical(found: dict, expected: dict) -> None:
    """Equal names, types and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].cpu(), tensor.cpu()), name


def all_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that checkpoints do not hold included."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@functools.cache
def real_text() -> tuple[str, ...]:
    """The paragraphs of Python's own language reference, as `help("topic")` prints it."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return tuple(paragraph.strip() for paragraph in text.split("\n\n") if len(paragraph.split()) > 8)


@functools.cache
def train_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with end-of-text and padding tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eot>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(real_text()[:200], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eot>")


def write_idx(path: Path, array: np.ndarray) -> None:
    """Unsigned bytes in MNIST's own format, gzipped."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def build_nothing(monkeypatch, auto_class: type) -> None:
    """Whoever builds a model of this class fails the test, unless it is one without weights, to be counted."""
    build = auto_class.from_config

    def refuse(*args, **kwargs):
        if torch.get_default_device().type != "meta":
            raise AssertionError("a model was built")
        return build(*args, **kwargs)

    monkeypatch.setattr(auto_class, "from_config", refuse)


def sas_hf(*arguments) -> subprocess.CompletedProcess:
    """Run the command `sas-hf` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "sas_hf", *map(str, arguments)], capture_output=True, text=True)


def python_environment() -> dict[str, str]:
    """The environment of a fresh interpreter on one thread that finds this directory's helpers."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
