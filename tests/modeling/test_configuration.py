"""Defaults that follow from other fields, and refusals that name the field."""

import pytest
from helpers import GPT_BASE, SAS, SAS_VARIANTS, gpt_config
from transformers import AutoConfig

from sas_hf import SASEncoderConfig, SASGPTConfig, SASSeq2SeqConfig, SASViTConfig


ROPE = {"rope_theta": 1e4, "rope_type": "default"}

REFUSED = {  # fields: what the message must name
    "even kernel": (SAS | {"simulation_kernel_size": 2}, "simulation_kernel_size"),
    "kernel zero": (SAS | {"simulation_kernel_size": 0}, "simulation_kernel_size"),
    "negative kernel": (SAS | {"simulation_kernel_size": -1}, "simulation_kernel_size"),
    "simulated heads no multiple": ({"num_simulated_heads": 10}, "num_simulated_heads"),
    "simulated heads fewer": ({"num_simulated_heads": 2}, "num_simulated_heads"),
    "simulated heads zero": ({"num_simulated_heads": 0}, "num_simulated_heads"),
    "simulated features fewer": ({"simulated_head_dim": 6}, "simulated_head_dim"),
    "kv heads do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "kv heads more": ({"num_key_value_heads": 8}, "num_key_value_heads"),
    "kv heads zero": ({"num_key_value_heads": 0}, "num_key_value_heads"),
    "hidden size no multiple": ({"hidden_size": 30}, "hidden_size"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "mqa with two kv heads": ({"attention_type": "mqa", "num_key_value_heads": 2}, "num_key_value_heads"),
    "gqa without kv heads": ({"attention_type": "gqa"}, "num_key_value_heads"),
    "gqa with all kv heads": ({"attention_type": "gqa", "num_key_value_heads": 4}, "num_key_value_heads"),
    "gqa with one kv head": ({"attention_type": "gqa", "num_key_value_heads": 1}, "num_key_value_heads"),
    "unknown attention": ({"attention_type": "none"}, "attention_type"),
    "a window": ({"sliding_window": 8}, "sliding_window"),
    "chunks": ({"attention_chunk_size": 8}, "attention_chunk_size"),
    "windows in some layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "unknown aggregation": (SAS | {"head_aggregation": "sum"}, "head_aggregation"),
    "one group to concatenate": ({"num_simulated_heads": 4, "head_aggregation": "concat"}, "head_aggregation"),
    "no group to concatenate": ({"head_aggregation": "concat"}, "head_aggregation"),
    "super with values' features": (
        {"attention_type": "super", "simulate_value_features": True},
        "simulate_value_features",
    ),
    "unknown activation": (SAS | {"simulation_act": "rellu"}, "simulation_act"),
    "unknown start": (SAS | {"simulation_init": "zeros"}, "simulation_init"),
    "unknown cache form": (SAS | {"simulation_cache": "small"}, "simulation_cache"),
    "unknown positions": ({"position_embedding_type": "alibi"}, "position_embedding_type"),
    "unknown norm": ({"norm_type": "batch_norm"}, "norm_type"),
    "unknown MLP": ({"mlp_type": "moe"}, "mlp_type"),
    "unknown norm position": ({"norm_position": "both"}, "norm_position.*both.*'pre', 'post'"),
    "unknown norm of queries": ({"qk_norm": "head"}, "qk_norm.*'head'.*None, 'per_head', 'all_heads'"),
    "norm of queries that MLA has not": ({"attention_type": "mla", "qk_norm": "per_head"}, "qk_norm.*'mla'"),
    "norm of keys that are slices": (
        {"attention_type": "efficient", "qk_norm": "all_heads"},
        "qk_norm.*'efficient'",
    ),
    "parallel post-norm": (
        {"norm_position": "post", "use_parallel_residual": True},
        "use_parallel_residual.*norm_position",
    ),
    "RoPE for too few layers": ({"no_rope_layers": [1]}, r"no_rope_layers.*\[1\].*num_hidden_layers.*\(2\)"),
    "RoPE by other numbers": ({"no_rope_layers": [1, 2]}, r"no_rope_layers.*\[1, 2\]"),
    "RoPE layers without RoPE": (
        {"no_rope_layers": [1, 0], "position_embedding_type": "learned"},
        "no_rope_layers.*position_embedding_type.*'learned'",
    ),
    "misspelt parallel residual": ({"parallel_residual": True}, "use_parallel_residual"),
    "negative scale": ({"query_pre_attn_scalar": -1.0}, "query_pre_attn_scalar"),
    "zero scale": ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    "rotary wider than the simulated head": (
        SAS | {"rope_parameters": ROPE | {"partial_rotary_factor": 2.0}},
        "partial_rotary_factor",
    ),
    "rotary wider than the plain head": (
        {"rope_parameters": ROPE | {"partial_rotary_factor": 1.5}},
        "partial_rotary_factor",
    ),
    "misspelt number of simulated heads": ({"num_simulated_head": 12}, "num_simulated_heads"),
    "misspelt simulated size": ({"simulated_head_dims": 12}, "simulated_head_dim"),
    "misspelt kernel": (SAS | {"simulation_kernel": 3}, "simulation_kernel_size"),
    "misspelt kv heads": ({"num_kv_heads": 2, "num_key_values_heads": 2}, "num_key_value_heads"),
    "misspelt Llama field": ({"num_hidden_layer": 2}, "num_hidden_layers"),
}


@pytest.mark.parametrize(("fields", "named"), REFUSED.values(), ids=REFUSED)
def test_impossible_configurations_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        SASGPTConfig(**(GPT_BASE | fields))


def test_refusals_name_value_and_remedy():
    with pytest.raises(ValueError, match=r"\(10\).*for instance 8 or 12"):
        SASGPTConfig(**GPT_BASE, num_simulated_heads=10)
    with pytest.raises(ValueError, match=r"\(4\) must be odd.*for instance 3 or 5"):
        SASGPTConfig(**GPT_BASE, **SAS, simulation_kernel_size=4)
    with pytest.raises(ValueError, match=r"at most 1\.5"):
        SASGPTConfig(**GPT_BASE, **SAS, rope_parameters=ROPE | {"partial_rotary_factor": 2.0})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"simulation_act": 5}, "`simulation_act` is 5; it must be of type str"),
        ({"num_simulated_heads": "36"}, "`num_simulated_heads` is '36'; it must be of type int or None"),
        ({"simulated_head_dim": 1.5}, "`simulated_head_dim` is 1.5; it must be of type int or None"),
        ({"recompute_simulation": 1}, "`recompute_simulation` is 1; it must be of type bool"),
        ({"query_pre_attn_scalar": "x"}, "`query_pre_attn_scalar` is 'x'; it must be of type int or float or None"),
        ({"query_pre_attn_scalar": float("nan")}, "`query_pre_attn_scalar` .nan. must be positive"),
        ({"query_pre_attn_scalar": float("inf")}, "`query_pre_attn_scalar` .inf. must be positive and finite"),
        ({"attention_dropout": 1.5}, "`attention_dropout` is 1.5; it must be between 0 and 1"),
        ({"vocab_size": 0}, "`vocab_size` is 0; it must be a positive integer"),
        ({"rope_parameters": ROPE | {"rope_type": "nope"}}, "is 'nope'; it must be one of 'default', 'dynamic'"),
    ],
)
def test_values_of_a_wrong_type_or_size_are_refused_in_our_words(fields, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        SASGPTConfig(**GPT_BASE | fields)
    SASGPTConfig(**GPT_BASE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        SASGPTConfig.from_pretrained(tmp_path, **fields)


def test_foreign_keywords_are_kept_as_by_the_base_class():
    config = gpt_config("sas", my_own_note="kept", id2label={0: "no", 1: "yes"}, output_hidden_states=True)
    assert config.my_own_note == "kept" and config.num_labels == 2 and config.output_hidden_states


def test_kv_heads_default_to_the_attention_type():
    assert gpt_config("mha").num_key_value_heads == 4
    assert gpt_config("mqa").num_key_value_heads == 1
    assert gpt_config("gqa").num_key_value_heads == 2


@pytest.mark.parametrize(
    ("variant", "scalar", "qk_head_dim", "rotary_dim"),
    [
        ("mha", 8, None, 8),
        ("sas", 12, 12, 8),
        ("head_only", 8, 8, 8),
        ("feature_only", 12, 12, 8),
        ("all_rotated", 12, 12, 12),
        ("half_rotated", 12, 12, 4),
        ("sas_learned", 12, 12, 0),
    ],
)
def test_widths(variant, scalar, qk_head_dim, rotary_dim):
    config = gpt_config(variant)
    assert config.head_dim == 8  # caches are sized from it: never the simulated width
    assert (config.query_pre_attn_scalar, config.qk_head_dim, config.rotary_dim) == (scalar, qk_head_dim, rotary_dim)
    assert config.simulates == (variant in SAS_VARIANTS)


def test_a_given_scale_is_kept():
    assert gpt_config("sas", query_pre_attn_scalar=8.0).query_pre_attn_scalar == 8.0


def test_head_size_may_differ_from_the_hidden_size_over_heads():
    config = gpt_config("mha", hidden_size=30, head_dim=6)
    assert (config.head_dim, config.query_pre_attn_scalar) == (6, 6)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (
            SASSeq2SeqConfig,
            {"cross_attention": {"attention_kind": "mha"}},
            "`cross_attention` .*'attention_kind'",
        ),
        (SASSeq2SeqConfig, {"cross_attention": {"attention_type": "mhx"}}, "`cross_attention` .*'mhx'"),
        (SASSeq2SeqConfig, {"decoder_layers": 0}, "`decoder_layers` is 0"),
        (SASSeq2SeqConfig, {"vocab_size": 50}, "`share_encoder_decoder_embeddings` is True, but `decoder_vocab_size`"),
        (SASEncoderConfig, {"classifier_pooling": "max"}, "`classifier_pooling` is 'max'"),
        (SASGPTConfig, {"num_simulated_heads": 7}, "`num_simulated_heads` .*7"),
        (SASViTConfig, {"num_simulated_heads": 7}, "`num_simulated_heads` .*7"),
    ],
)
def test_fields_given_to_from_pretrained_are_checked(config_class, fields, message, tmp_path):
    """Transformers sets them when the file's own are checked."""
    config_class().save_pretrained(tmp_path)
    for load in (config_class.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **fields)
    assert config_class.from_pretrained(tmp_path, attention_dropout=0.5).attention_dropout == 0.5


@pytest.mark.parametrize("config_class", [SASGPTConfig, SASViTConfig])
def test_an_empty_auto_map_is_read_and_not_saved(config_class, tmp_path):
    """TRL reads it of every architecture that is not Transformers' own."""
    first, second = config_class(), config_class()
    assert first.auto_map == {}
    first.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text() + first.to_json_string() + str(first.to_dict())
    assert config_class.from_pretrained(tmp_path).auto_map == {}
    first.auto_map["AutoModel"] = "mine.Mine"  # as `register_for_auto_class` has it done; of this configuration alone
    assert first.to_dict()["auto_map"] == {"AutoModel": "mine.Mine"}
    assert second.auto_map == {} == config_class().auto_map


@pytest.mark.parametrize("config_class", [SASGPTConfig, SASEncoderConfig, SASSeq2SeqConfig])
def test_a_tensor_parallel_plan_is_made_of_the_fields_alone(config_class):
    config = config_class()
    plan = config.base_model_tp_plan
    config.base_model_tp_plan = plan | {"embed_tokens": "embedding_rowwise"}  # as older versions of Transformers do
    assert config.base_model_tp_plan == plan
    with pytest.raises(AttributeError):
        config.base_model_tp_plan = plan | {"norm": "rowwise"}
