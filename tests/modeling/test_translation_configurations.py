"""The second paper's translators by name: its Table 10's layers, in all three places, whatever the heads."""

import pytest
import torch

from sas_hf import SASSeq2SeqForConditionalGeneration, named_config


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "parameters"), [("standard", 4_198_400), ("optimised", 3_148_800), ("efficient", 2_099_200)]
)
def test_a_layer_has_as_many_parameters_as_printed(kind, parameters, heads):
    config = named_config(f"nmt-{kind}", num_attention_heads=heads)
    with torch.device("meta"):
        model = SASSeq2SeqForConditionalGeneration(config)
    encoder, decoder = model.model.encoder.layers, model.model.decoder.layers
    assert (len(encoder), len(decoder)) == (1, 2)
    for layer in (
        encoder[0].self_attn,
        *(part for block in decoder for part in (block.self_attn, block.encoder_attn)),
    ):
        assert sum(weight.numel() for weight in layer.parameters()) == parameters
        assert layer.config.num_attention_heads == heads and layer.config.head_dim == 1024 // heads
    assert model.lm_head.weight.shape == (15_000, 1024) and model.lm_head.bias is not None
    embeddings = {id(part.embeddings.embed_tokens.weight) for part in (model.model.encoder, model.model.decoder)}
    assert len(embeddings | {id(model.lm_head.weight)}) == 3
    assert encoder[0].mlp.up_proj.out_features == 2048 and model.model.decoder.norm is None


def test_ours_is_the_standard_one_with_a_simulation():
    sas, standard = named_config("nmt-sas"), named_config("nmt-standard")
    assert (sas.num_simulated_heads, sas.simulated_head_dim, sas.head_dim) == (12, 384, 256)
    different = {name for name, value in sas.to_dict().items() if standard.to_dict()[name] != value}
    assert different <= {"num_simulated_heads", "simulated_head_dim", "query_pre_attn_scalar"}
