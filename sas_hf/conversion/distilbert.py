"""DistilBERT checkpoints: BERT without token types, whose classifiers alone have a pooler, which ends in a ReLU."""

from transformers import DistilBertConfig

from .bert import ENCODER_FIELDS
from .family import SourceFamily, check_token, encoder_architectures


def derive(config: DistilBertConfig) -> dict:
    check_token(config, "pad_token_id", config.vocab_size)
    return {}


def pooled(config: DistilBertConfig) -> dict:
    return {"classifier_dropout": config.seq_classif_dropout}


DISTILBERT = SourceFamily(
    model_type="distilbert",
    architectures=encoder_architectures("DistilBert"),
    fields=ENCODER_FIELDS
    | {
        "dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "activation": "hidden_act",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "max_position_embeddings": "max_position_embeddings",
    },
    constants={
        "padding_takes_positions": True,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-12,
        "pooler_act": "relu",
    },
    derive=derive,
    of_architecture={
        "DistilBertModel": lambda config: {"pooler_act": None},
        "DistilBertForSequenceClassification": pooled,
        "DistilBertForMultipleChoice": pooled,
    },
    names={
        "embeddings.word_embeddings": "embeddings.embed_tokens",
        "embeddings.position_embeddings": "embeddings.embed_positions",
        "embeddings.LayerNorm": "embeddings.norm",
        "transformer.layer": "layers",
        "attention.q_lin": "self_attn.q_proj",
        "attention.k_lin": "self_attn.k_proj",
        "attention.v_lin": "self_attn.v_proj",
        "attention.out_lin": "self_attn.o_proj",
        "sa_layer_norm": "self_attn_layer_norm",
        "ffn.lin1": "mlp.up_proj",
        "ffn.lin2": "mlp.down_proj",
        "output_layer_norm": "final_layer_norm",
        "vocab_transform": "lm_head.dense",
        "vocab_layer_norm": "lm_head.layer_norm",
        "vocab_projector": "lm_head.decoder",
        "pre_classifier": "model.pooler.dense",
    },
)
