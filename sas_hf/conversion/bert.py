"""BERT checkpoints (MiniLM, bge, e5 and most sentence encoders too)."""

from transformers import PreTrainedConfig

from .family import SourceFamily, check_token, encoder_architectures, refuse_decoder, refuse_relative_positions, same


ENCODER_FIELDS = same(
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
BERT_FIELDS = ENCODER_FIELDS | same(
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
)
BERT_NAMES = {
    "embeddings.word_embeddings": "embeddings.embed_tokens",
    "embeddings.position_embeddings": "embeddings.embed_positions",
    "embeddings.LayerNorm": "embeddings.norm",
    "encoder.layer": "layers",
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.o_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "final_layer_norm",
}


def derive(config: PreTrainedConfig) -> dict:
    refuse_decoder(config)
    refuse_relative_positions(config)
    check_token(config, "pad_token_id", config.vocab_size)
    return {}


BERT = SourceFamily(
    model_type="bert",
    architectures=encoder_architectures("Bert"),
    fields=BERT_FIELDS,
    constants={"padding_takes_positions": True},
    derive=derive,
    names=BERT_NAMES
    | {
        "cls.predictions.transform.dense": "lm_head.dense",
        "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
        "cls.predictions.decoder": "lm_head.decoder",
        "cls.predictions": "lm_head.decoder",  # the bias, which is the decoder's
    },
    unread=r"^(bert\.)?pooler\.dense\.|^cls\.seq_relationship\.",
    without_pooler={"pooler_act": None},
)
