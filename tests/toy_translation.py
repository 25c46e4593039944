"""A language of a few words and its translation, which a tiny encoder-decoder learns in seconds."""

import itertools
import json
import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from sas_hf.data.text_pairs import train_pair_tokenizer


NOUNS = {"cat": "gato", "dog": "perro", "bird": "pájaro", "horse": "caballo", "book": "libro", "boat": "barco"}
ADJECTIVES = {"red": "rojo", "white": "blanco", "black": "negro", "old": "viejo", "new": "nuevo", "small": "pequeño"}
VERBS = {"sees": "ve", "wants": "quiere", "has": "tiene"}
LENGTH, VOCABULARY = 24, 320


def toy_pairs() -> list[dict[str, str]]:
    """648 pairs in a shuffled order, always the same; adjectives stand behind their nouns in Spanish."""
    pairs = [
        {
            "en": f"the {adjective} {noun} {verb} a {other}",
            "es": f"el {NOUNS[noun]} {ADJECTIVES[adjective]} {VERBS[verb]} un {NOUNS[other]}",
        }
        for adjective, noun, verb, other in itertools.product(ADJECTIVES, NOUNS, VERBS, NOUNS)
    ]
    random.Random(0).shuffle(pairs)
    return pairs


def write_lines(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    rows = toy_pairs()
    pairs = {"source": [row["en"] for row in rows], "target": [row["es"] for row in rows]}
    return train_pair_tokenizer(Dataset.from_dict(pairs), VOCABULARY, LENGTH)


def toy_bart(folder: Path | None = None, tokenizer=None, **fields) -> BartForConditionalGeneration:
    """A tiny BART with random weights; saved with its tokenizer where a folder is given."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY,
        "d_model": 48,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
        "dropout": 0.0,
        "init_std": 0.1,
    } | fields
    model = BartForConditionalGeneration(BartConfig(**fields))
    if folder is not None:
        model.save_pretrained(folder)
        (tokenizer or toy_tokenizer()).save_pretrained(folder)
    return model
