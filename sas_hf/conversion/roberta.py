"""RoBERTa, XLM-RoBERTa and CamemBERT checkpoints: BERT whose positions count real tokens alone, and begin behind
`pad_token_id`.

The first rows of the table of positions, up to the padding token's, are never a real token's; they are left out, and
zeros on the way back.
"""

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedConfig

from .bert import BERT_FIELDS, BERT_NAMES
from .bert import derive as derive_as_bert
from .family import ConversionError, SourceFamily, encoder_architectures


def unused_positions(config: PreTrainedConfig) -> int:
    return config.pad_token_id + 1


def derive(config: PreTrainedConfig) -> dict:
    if config.pad_token_id is None:
        raise ConversionError(
            "`pad_token_id` is null, but RoBERTa's positions begin behind it; set it in the source's config.json (1, "
            "as a rule)."
        )
    return derive_as_bert(config) | {
        "max_position_embeddings": config.max_position_embeddings - unused_positions(config)
    }


def tensors(name: str, weight: torch.Tensor, config: PreTrainedConfig) -> Iterable[torch.Tensor]:
    return (weight[unused_positions(config) :] if ".position_embeddings." in name else weight,)


def join(name: str, weights: Sequence[torch.Tensor], config: PreTrainedConfig) -> torch.Tensor:
    weight = weights[0]
    if ".position_embeddings." not in name:
        return weight
    return torch.cat((weight.new_zeros(unused_positions(config), weight.shape[1]), weight))


def family(model_type: str, prefix: str) -> SourceFamily:
    return SourceFamily(
        model_type=model_type,
        architectures=encoder_architectures(prefix),
        fields={name: sas for name, sas in BERT_FIELDS.items() if name != "max_position_embeddings"},
        constants={"padding_takes_positions": False, "lm_head_act": "gelu"},
        derive=derive,
        of_architecture={
            # which does not ask `classifier_dropout`
            f"{prefix}ForMultipleChoice": lambda config: {"classifier_dropout": config.hidden_dropout_prob}
        },
        names=BERT_NAMES
        | {
            "lm_head.dense": "lm_head.dense",
            "lm_head.layer_norm": "lm_head.layer_norm",
            "lm_head.decoder": "lm_head.decoder",
            "lm_head": "lm_head.decoder",  # the bias, which is the decoder's
            "classifier.dense": "model.pooler.dense",
            "classifier.out_proj": "classifier",
        },
        tensors=tensors,
        join=join,
        unread=r"^(roberta\.)?pooler\.dense\.",
        without_pooler={"pooler_act": None},
    )


ROBERTA = family("roberta", "Roberta")
XLM_ROBERTA = family("xlm-roberta", "XLMRoberta")
CAMEMBERT = family("camembert", "Camembert")
