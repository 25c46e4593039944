"""What Transformers' own tests of encoders and encoder–decoders ask, where ours once answered otherwise."""

import pytest
import torch
from helpers import MLA, SAS
from torch import nn

from sas_hf import (
    SASEncoderConfig,
    SASEncoderForMaskedLM,
    SASEncoderModel,
    SASSeq2SeqConfig,
    SASSeq2SeqForConditionalGeneration,
    SASSeq2SeqModel,
)
from sas_hf.modeling.parallel_plans import seq2seq_parallel_plans


BASE = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
BASE |= {"max_position_embeddings": 32}
PLACES = {"encoder_attention": SAS, "decoder_attention": MLA, "cross_attention": {"attention_type": "mqa"}}
EVERY_CLASS = [
    (SASEncoderModel, SASEncoderConfig, {}),
    (SASEncoderForMaskedLM, SASEncoderConfig, SAS),
    (SASSeq2SeqModel, SASSeq2SeqConfig, {}),
    (SASSeq2SeqForConditionalGeneration, SASSeq2SeqConfig, PLACES | {"mlp_type": "gated"}),
]
every_class = pytest.mark.parametrize(
    ("model_class", "config_class", "fields"), EVERY_CLASS, ids=[entry[0].__name__ for entry in EVERY_CLASS]
)


def test_fields_by_another_name_come_before_what_follows_from_them():
    config = SASSeq2SeqConfig(d_model=32, num_hidden_layers=3, num_attention_heads=4, dropout=0.2)
    assert (config.hidden_size, config.head_dim, config.hidden_dropout) == (32, 8, 0.2)
    assert (config.encoder_layers, config.decoder_layers) == (3, 3)
    assert SASEncoderConfig(hidden_dropout=0.3).hidden_dropout_prob == 0.3


@every_class
def test_every_entry_of_the_tensor_parallel_plan_names_a_module(model_class, config_class, fields):
    model = model_class(config_class(**BASE, **fields))
    modules = {name.replace(".0.", ".*.") for name, _ in model.named_modules()}
    assert model.tp_plan
    assert model.tp_plan.keys() <= modules
    # A tied head is the embeddings' parameter: both are split, or neither could be.
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("embed_tokens"):
            assert name in model.tp_plan
    head = model.get_output_embeddings()
    assert head is None or next(name for name, module in model.named_modules() if module is head) in model.tp_plan


def test_the_halves_of_an_encoder_decoder_have_plans_of_their_own():
    model = SASSeq2SeqModel(SASSeq2SeqConfig(**BASE, **PLACES))
    for half in ("encoder", "decoder"):
        plan = getattr(model, half).tp_plan
        assert plan == seq2seq_parallel_plans(model.config)[half]
        assert plan.keys() <= {name.replace(".0.", ".*.") for name, _ in getattr(model, half).named_modules()}


@every_class
def test_tuples_for_all_where_the_configuration_asks_for_them(model_class, config_class, fields):
    model = model_class(config_class(**BASE, **fields, return_dict=False)).eval()
    output = model(**model.dummy_inputs)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], model(**model.dummy_inputs, return_dict=True)[0])


def test_the_base_model_resized_can_be_saved_and_loaded(tmp_path):
    model = SASSeq2SeqModel(SASSeq2SeqConfig(**BASE)).eval()
    model.resize_token_embeddings(80)
    assert model.config.decoder_vocab_size == model.decoder.embeddings.embed_tokens.weight.shape[0] == 80
    model.save_pretrained(tmp_path)
    loaded = SASSeq2SeqModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**model.dummy_inputs)[0], model(**model.dummy_inputs)[0])


@pytest.mark.parametrize("config_class", [SASEncoderConfig, SASSeq2SeqConfig])
def test_models_without_rope_do_not_seem_to_have_it(config_class, tmp_path):
    """Transformers' tests of scaled RoPE ask for the attribute."""
    assert not hasattr(config_class(), "rope_parameters")
    rotating = config_class(position_embedding_type="rope", rope_theta=5e4)
    assert rotating.rope_parameters == {"rope_theta": 5e4, "rope_type": "default"}
    rotating.save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path).rope_parameters == rotating.rope_parameters
    for name, value in {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}.items():
        with pytest.raises(ValueError, match=f"`{name}` is of RoPE, but `position_embedding_type` is 'learned'"):
            config_class(**{name: value})
