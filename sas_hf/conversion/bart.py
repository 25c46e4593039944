"""BART checkpoints, and mBART's, which norm before each block and begin a translation with its language."""

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import SASSeq2SeqForConditionalGeneration, SASSeq2SeqModel
from .family import ConversionError, SourceFamily, check_token, same


UNUSED_POSITIONS = 2  # at the beginning of both tables; zeros on the way back
BART_FIELDS = same(
    "vocab_size",
    "encoder_layers",
    "decoder_layers",
    "attention_dropout",
    "activation_dropout",
    "max_position_embeddings",
    "scale_embedding",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "tie_word_embeddings",
) | {
    "d_model": "hidden_size",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
    "decoder_ffn_dim": "decoder_intermediate_size",
    "activation_function": "hidden_act",
    "dropout": "hidden_dropout",
    "init_std": "initializer_range",
}
BART_NAMES = {
    "shared": "encoder.embeddings.embed_tokens",  # first in a source's order: the encoder's own goes before it
    "embed_tokens": "embeddings.embed_tokens",
    "embed_positions": "embeddings.embed_positions",
    "layernorm_embedding": "embeddings.norm",
    "encoder.layer_norm": "encoder.norm",
    "decoder.layer_norm": "decoder.norm",
    "out_proj": "o_proj",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
    "final_logits_bias": "lm_head.bias",
}


def seq2seq_architectures(prefix: str, head: str) -> dict[str, type[PreTrainedModel]]:
    return {f"{prefix}Model": SASSeq2SeqModel, f"{prefix}{head}": SASSeq2SeqForConditionalGeneration}


def derive(config: PreTrainedConfig) -> dict:
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name):
            raise ConversionError(
                f"`{name}` is {getattr(config, name)}: layers that training leaves out at random have no counterpart; "
                "set it to 0 in the source's config.json, which changes no output."
            )
    if config.encoder_attention_heads != config.decoder_attention_heads:
        raise ConversionError(
            f"`encoder_attention_heads` ({config.encoder_attention_heads}) and `decoder_attention_heads` "
            f"({config.decoder_attention_heads}) differ, but the SAS model has one number, `num_attention_heads`."
        )
    vocab_size = getattr(config, "decoder_vocab_size", config.vocab_size)
    if config.pad_token_id is None:
        raise ConversionError(
            "`pad_token_id` is null, but labels are padded with it; set it in the source's config.json."
        )
    if config.decoder_start_token_id is None and config.model_type != "mbart":
        raise ConversionError(
            "`decoder_start_token_id` is null, but the decoder's inputs begin with it; set it in the source's "
            f"config.json (of a {config.model_type}, "
            f"{'`eos_token_id`' if config.model_type == 'bart' else '`pad_token_id`'} as a rule)."
        )
    check_token(config, "pad_token_id", min(config.vocab_size, vocab_size))
    check_token(config, "decoder_start_token_id", vocab_size)
    return {"share_encoder_decoder_embeddings": config.tie_word_embeddings}


def tensors(name: str, weight: torch.Tensor, config: PreTrainedConfig) -> Iterable[torch.Tensor]:
    if name == "final_logits_bias":
        return (weight[0],)
    return (weight[UNUSED_POSITIONS:] if ".embed_positions." in name else weight,)


def join(name: str, weights: Sequence[torch.Tensor], config: PreTrainedConfig) -> torch.Tensor:
    weight = weights[0]
    if name == "final_logits_bias":
        return weight[None]
    if ".embed_positions." not in name:
        return weight
    return torch.cat((weight.new_zeros(UNUSED_POSITIONS, weight.shape[1]), weight))


def family(model_type: str, prefix: str, constants: dict) -> SourceFamily:
    return SourceFamily(
        model_type=model_type,
        architectures=seq2seq_architectures(prefix, "ForConditionalGeneration"),
        fields=BART_FIELDS,
        constants={
            "position_embedding_type": "learned",
            "padding_takes_positions": True,
            "embedding_norm": True,
            "layer_norm_eps": 1e-5,
            "lm_head_bias": True,
        }
        | constants,
        derive=derive,
        names=BART_NAMES,
        tensors=tensors,
        join=join,
    )


BART = family("bart", "Bart", {"norm_position": "post_residual"})
MBART = family("mbart", "MBart", {"norm_position": "pre", "decoder_starts_with_last_label": True})
