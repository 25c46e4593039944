"""Tiny random encoder-decoders of every family, with awkward shapes, and real tokenizers trained on real text."""

import functools
from pathlib import Path

import torch
import transformers
from helpers import real_text, scramble
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sas_hf.conversion.convert import FAMILIES


BASE = {
    "vocab_size": 300,
    "d_model": 60,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 52,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 5,
    "max_position_embeddings": 128,
    "activation_function": "relu",
    "init_std": 0.2,  # far from uniform attention, so that mistakes show
}
BART = BASE | {"model_type": "bart"}
MBART = BASE | {"model_type": "mbart", "scale_embedding": True}
MARIAN = BASE | {
    "model_type": "marian",
    "scale_embedding": True,
    "pad_token_id": 299,
    "decoder_start_token_id": 299,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
}
SHAPES = {
    "bart": BART,
    "bart-untied": BART | {"tie_word_embeddings": False, "scale_embedding": True, "activation_function": "gelu"},
    "mbart": MBART,
    "mbart-unscaled": MBART
    | {"scale_embedding": False, "encoder_attention_heads": 6, "decoder_attention_heads": 6, "decoder_layers": 1},
    "marian": MARIAN,
    "marian-two-vocabularies": MARIAN
    | {
        "share_encoder_decoder_embeddings": False,
        "decoder_vocab_size": 200,
        "pad_token_id": 30,
        "decoder_start_token_id": 30,
        "scale_embedding": False,
    },
    "marian-untied": MARIAN | {"tie_word_embeddings": False, "activation_function": "swish"},
}
FAMILY_NAMES = sorted({fields["model_type"] for fields in SHAPES.values()})  # each is the name of a shape too
HEADS = [(shape, name) for shape in SHAPES for name in FAMILIES[SHAPES[shape]["model_type"]].architectures]


def head_of(shape: str) -> str:
    """The name of the family's class with a head."""
    return list(FAMILIES[SHAPES[shape]["model_type"]].architectures)[1]


def tiny_seq2seq(shape: str, name: str | None = None, **fields) -> PreTrainedModel:
    """A random model, by default with a head; biases (the logits' too) and norms off their zeros and ones."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**SHAPES[shape] | fields)
    model = scramble(getattr(transformers, name or head_of(shape))(config))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def padded_pair(config, side: str = "right", length: int = 30) -> dict[str, torch.Tensor]:
    """Two sources of unequal length."""
    pad = config.pad_token_id
    ids, mask = torch.randint(3, pad if pad > 3 else 300, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, slice(0, 11) if side == "left" else slice(length - 11, length)] = 0
    return {"input_ids": ids * mask + pad * (1 - mask), "attention_mask": mask}


@functools.cache
def bart_tokenizer() -> PreTrainedTokenizerBase:
    return transformers.BartTokenizer().train_new_from_iterator(real_text()[:200], 300)


@functools.cache
def mbart_tokenizer() -> PreTrainedTokenizerBase:
    return transformers.MBartTokenizer().train_new_from_iterator(real_text()[:200], 300)


def write_marian_tokenizer(folder: Path, separate: bool = False) -> None:
    """Two sentencepiece models and the vocabulary of both, or of each. Needs sentencepiece."""
    import json

    import sentencepiece

    folder.mkdir(exist_ok=True)
    texts = [text.replace("\n", " ") for text in real_text()[:200]]
    pieces = {}
    for name, rows in (("source", texts[:100]), ("target", texts[100:])):
        prefix = str(folder / name)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(rows), model_prefix=prefix, vocab_size=150, minloglevel=2
        )
        Path(f"{prefix}.model").rename(folder / f"{name}.spm")
        Path(f"{prefix}.vocab").unlink()
        read = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.spm"))
        pieces[name] = [read.id_to_piece(i) for i in range(len(read))]

    def vocabulary(*lists):
        names = dict.fromkeys(["</s>", "<unk>", *(piece for part in lists for piece in part)])
        names.pop("<s>", None)
        names.pop("<pad>", None)
        return {piece: number for number, piece in enumerate([*names, "<pad>"])}

    settings = {"source_lang": "eng", "target_lang": "spa", "separate_vocabs": separate}
    if separate:
        source, target = vocabulary(pieces["source"]), vocabulary(pieces["target"])
        (folder / "target_vocab.json").write_text(json.dumps(target))
    else:
        source = vocabulary(pieces["source"], pieces["target"])
    (folder / "vocab.json").write_text(json.dumps(source))
    settings |= {"tokenizer_class": "MarianTokenizer", "model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
