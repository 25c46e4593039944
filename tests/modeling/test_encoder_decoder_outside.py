"""What Transformers' own tests of encoders and encoder–decoders ask of any model, where ours once answered otherwise."""

from sas_hf import SASEncoderConfig, SASSeq2SeqConfig


def test_fields_by_another_name_come_before_what_follows_from_them():
    config = SASSeq2SeqConfig(d_model=32, num_hidden_layers=3, num_attention_heads=4, dropout=0.2)
    assert (config.hidden_size, config.head_dim, config.hidden_dropout) == (32, 8, 0.2)
    assert (config.encoder_layers, config.decoder_layers) == (3, 3)
    assert SASEncoderConfig(hidden_dropout=0.3).hidden_dropout_prob == 0.3
