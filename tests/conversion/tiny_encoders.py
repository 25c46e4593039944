"""Tiny random encoders of every family, with awkward shapes, and real tokenizers trained on real text."""

import functools

import torch
import transformers
from helpers import real_text, scramble
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sas_hf.conversion.convert import FAMILIES
from sas_hf.conversion.samples import verification_samples


BASE = {
    "vocab_size": 300,
    "hidden_size": 60,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # far from uniform attention, so that mistakes show
    "layer_norm_eps": 0.1,
}
BERT = BASE | {"model_type": "bert", "type_vocab_size": 3, "hidden_act": "relu"}
ROBERTA = BASE | {"model_type": "roberta", "type_vocab_size": 1, "hidden_act": "relu"}
DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": 300,
    "dim": 60,
    "hidden_dim": 44,
    "n_layers": 3,
    "n_heads": 5,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "activation": "relu",
}
SHAPES = {
    "bert": BERT,
    "bert-untied": BERT | {"tie_word_embeddings": False, "hidden_act": "gelu_new", "num_attention_heads": 3},
    "roberta": ROBERTA,  # positions begin behind the padding token, which is 1 here and 5 there
    "roberta-untied": ROBERTA | {"pad_token_id": 5, "type_vocab_size": 2, "tie_word_embeddings": False},
    "xlm-roberta": ROBERTA | {"model_type": "xlm-roberta", "hidden_act": "silu"},
    "camembert": ROBERTA | {"model_type": "camembert"},
    "distilbert": DISTILBERT,
    "distilbert-untied": DISTILBERT | {"tie_word_embeddings": False, "activation": "gelu", "n_heads": 6},
}
FAMILY_NAMES = sorted({fields["model_type"] for fields in SHAPES.values()})  # each is the name of a shape too
HEADS = [(shape, name) for shape in FAMILY_NAMES for name in FAMILIES[shape].architectures]
TOKENIZERS = {
    "bert": transformers.BertTokenizer,
    "roberta": transformers.RobertaTokenizer,
    "xlm-roberta": transformers.XLMRobertaTokenizer,
    "camembert": transformers.CamembertTokenizer,
    "distilbert": transformers.DistilBertTokenizer,
}


def architecture(shape: str, head: str) -> str:
    """The name of the family's class with this head."""
    return next(name for name in FAMILIES[SHAPES[shape]["model_type"]].architectures if name.endswith(head))


def tiny_encoder(shape: str, name: str, **fields) -> PreTrainedModel:
    """A random model of the class of this name, biases and norms off their zeros and ones."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**SHAPES[shape] | fields)
    return scramble(getattr(transformers, name)(config))


def padded_batches(converted: PreTrainedModel, count: int = 3, length: int = 40) -> list:
    """Random batches with padding on the right, as a conversion is verified on."""
    return verification_samples(type(converted), converted.config, None, None, None, count, length, seed=0)[0]


@functools.cache
def _tokenizer(model_type: str) -> PreTrainedTokenizerBase:
    return TOKENIZERS[model_type]().train_new_from_iterator(real_text()[:200], 300)


def tiny_tokenizer(model_type: str, **settings) -> PreTrainedTokenizerBase:
    """The family's own tokenizer, of at most 300 tokens, with other settings such as `padding_side`."""
    tokenizer = _tokenizer(model_type)
    return type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.init_kwargs | settings)
