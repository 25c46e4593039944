"""The layer with a source of another length: keys and values of one sequence for the queries of another."""

import copy

import pytest
import torch
from helpers import GPT_BASE, scramble
from promised_models import KINDS, SIMULATED
from transformers import AttentionInterface, BartConfig, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.models.bart.modeling_bart import BartAttention

from sas_hf import SASGPTConfig
from sas_hf.modeling import attention_functions
from sas_hf.modeling.kinds import initialize_attention, make_attention


VARIANTS = KINDS | SIMULATED
VARIANTS |= {f"{name}_base": fields | {"simulation_cache": "base"} for name, fields in SIMULATED.items()}
SOURCE, TARGET = 7, 4


def make_layer(variant: str, implementation: str = "sdpa", **fields):
    torch.manual_seed(0)
    config = SASGPTConfig(**GPT_BASE | VARIANTS[variant] | fields)
    config._attn_implementation = implementation
    layer = make_attention(config, 0).double()
    with torch.no_grad():
        for module in layer.modules():  # what a model would do
            initialize_attention(module, config)
        return scramble(layer)


def mixing(layer, visible: torch.Tensor) -> dict:
    """What a kind that mixes tokens asks for, of a source whose real tokens are `visible` `[B, S]`."""
    if not layer.mixes_tokens:
        return {}
    positions = torch.arange(visible.shape[1])[None]
    return {"token_mixing": (positions, positions, visible[:, None, None, :].expand(-1, 1, visible.shape[1], -1))}


def sequences(layer, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    width = layer.config.hidden_size
    return torch.randn(batch, TARGET, width).double(), torch.randn(batch, SOURCE, width).double()


def everything(batch: int, length: int = SOURCE) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.bool)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_transformers(implementation):
    """BART's cross-attention with the same weights."""
    layer = make_layer("mha", implementation, attention_bias=True, attention_output_bias=True)
    config = BartConfig(d_model=layer.config.hidden_size, attn_implementation=implementation)
    theirs = BartAttention(config.d_model, layer.num_heads, is_decoder=True, config=config, layer_idx=0)
    ours = {name.replace("o_proj", "out_proj"): weight for name, weight in layer.state_dict().items()}
    theirs.double().load_state_dict(ours)
    target, source = sequences(layer)
    torch.testing.assert_close(layer(target, key_value_states=source)[0], theirs(target, key_value_states=source)[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_everyone_sees_the_whole_source(variant, implementation):
    """As bidirectional self-attention of the source gives it at the places whose queries are given."""
    layer = make_layer(variant, implementation)
    target, source = sequences(layer)
    together = torch.cat((target, source), dim=1)
    visible = torch.cat((torch.zeros(2, TARGET, dtype=torch.bool), everything(2)), dim=1)
    given = {}
    if layer.mixes_tokens:  # each at the positions of the source
        positions = torch.cat((torch.zeros(TARGET), torch.arange(SOURCE))).long()[None]
        given["token_mixing"] = (positions, positions, visible[:, None, None, :].expand(-1, 1, TARGET + SOURCE, -1))
    mask = visible[:, None, None, :].expand(-1, 1, TARGET + SOURCE, -1)
    if implementation == "eager":
        mask = torch.zeros(mask.shape).double().masked_fill(~mask, torch.finfo(torch.float64).min)
    expected = layer(together, attention_mask=mask, is_causal=False, **given)[0][:, :TARGET]
    found = layer(target, key_value_states=source, **mixing(layer, everything(2)))[0]
    assert found.std() > 1e-2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_of_the_source_is_not_seen(variant):
    layer = make_layer(variant)
    target, source = sequences(layer)
    visible = everything(2)
    visible[1, 4:] = False
    mask = visible[:, None, None, :].expand(-1, 1, TARGET, -1)
    found = layer(target, key_value_states=source, attention_mask=mask, **mixing(layer, visible))[0]
    alone = layer(target[1:], key_value_states=source[1:, :4], **mixing(layer, everything(1, 4)))[0]
    torch.testing.assert_close(found[1:], alone)


LONG = 130  # queries, more than are taken at once
MASKS = {
    "rows": (2, 1, 1, SOURCE),
    "one_row": (1, 1, 1, SOURCE),
    "heads": (1, 12, LONG, SOURCE),
    "all": (2, 12, LONG, SOURCE),
}
MASKS |= {"queries": (LONG, SOURCE), "queries_of_rows": (1, LONG, SOURCE)}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("shape", MASKS)
def test_masks_are_extended(shape, dtype):
    """As PyTorch's own attention does, over whatever they do not name."""
    layer = make_layer("mha_sas")
    target, source = torch.randn(2, LONG, layer.config.hidden_size).double(), sequences(layer)[1]
    visible = torch.rand(MASKS[shape]) > 0.3
    visible[..., 0] = True
    added = torch.zeros(visible.shape).double().masked_fill(~visible, torch.finfo(torch.float64).min)
    found = []
    for implementation in ("sdpa", "eager"):
        layer.config._attn_implementation = implementation
        mask = visible if dtype == torch.bool else added
        found.append(layer(target, key_value_states=source, attention_mask=mask)[0])
    expected = layer(target, key_value_states=source, attention_mask=added)[0]
    for output in found:
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("mask", [torch.ones(2, 1, TARGET, SOURCE).long(), torch.ones(3, 1, TARGET, SOURCE).bool()])
def test_masks_that_say_nothing_are_refused(mask):
    """Whole numbers, which may stand for either, and rows of another batch."""
    for variant in ("mha", "mha_sas"):
        for implementation in ("sdpa", "eager"):
            layer = make_layer(variant, implementation)
            target, source = sequences(layer)
            with pytest.raises((RuntimeError, ValueError), match="attn_mask|attention_mask|size|broadcast"):
                layer(target, key_value_states=source, attention_mask=mask)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["mha", "mha_sas", "gqa_sas", "mla"])
def test_one_row_of_either_side_serves_all(variant, implementation):
    """As of learnt queries, or of a source that all share."""
    layer = make_layer(variant, implementation)
    target, source = sequences(layer, batch=3)
    found = layer(target[:1], key_value_states=source)[0]
    torch.testing.assert_close(found, layer(target[:1].expand(3, -1, -1), key_value_states=source)[0])
    found = layer(target, key_value_states=source[:1])[0]
    torch.testing.assert_close(found, layer(target, key_value_states=source[:1].expand(3, -1, -1))[0])


def new_caches(kind: str, config) -> EncoderDecoderCache:
    if kind == "dynamic":
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return EncoderDecoderCache(StaticCache(config, max_cache_len=9), StaticCache(config, max_cache_len=SOURCE))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_source_is_read_once(variant, kind):
    """Later steps find it in the cache, whatever they are given; rows of the cache can be reordered as beams are."""
    layer = make_layer(variant)
    target, source = sequences(layer)
    expected = layer(target, key_value_states=source, **mixing(layer, everything(2)))[0]
    cache = new_caches(kind, layer.config)
    steps = [layer(target[:, :2], key_value_states=source, cache=cache, **mixing(layer, everything(2)))[0]]
    other = torch.full_like(source, torch.nan)
    swapped = copy.deepcopy(cache)
    for step in (2, 3):
        steps.append(layer(target[:, step : step + 1], key_value_states=other, cache=cache)[0])
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)
    swapped.reorder_cache(torch.tensor([1, 0]))
    found = layer(target[[1, 0], 2:3], key_value_states=other, cache=swapped)[0]
    torch.testing.assert_close(found, expected[[1, 0], 2:3])


@torch.no_grad()
def test_both_sides_of_a_cache_are_kept_apart():
    """A decoder's self-attention extends its own side."""
    own, cross, cache = make_layer("mha_sas"), make_layer("gqa_sas_base"), new_caches("dynamic", None)
    target, source = sequences(own)
    expected = own(target)[0]
    found = []
    for step in range(TARGET):
        found.append(own(target[:, step : step + 1], cache=cache)[0])
        cross(target[:, step : step + 1], key_value_states=source, cache=cache)
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    assert cache.self_attention_cache.get_seq_length() == TARGET
    assert cache.cross_attention_cache.get_seq_length() == SOURCE


@pytest.mark.parametrize("variant", ["mha_sas", "mha_sas_base", "efficient_sas"])
def test_each_side_has_its_own_positions(variant):
    """Queries and keys are turned by the angles given for each; without, not at all."""
    layer = make_layer(variant)
    target, source = sequences(layer)

    def angles(length, start):
        steps = (torch.arange(length) + start)[None, :, None].double() * torch.tensor([1.0, 0.1, 1.0, 0.1]).double()
        return steps.cos(), steps.sin()

    def attend(start, key_start):
        given = {"position_embeddings": angles(TARGET, start), "key_position_embeddings": angles(SOURCE, key_start)}
        return layer(target, key_value_states=source, **given)[0]

    torch.testing.assert_close(attend(0, 0), attend(5, 5))
    assert (attend(0, 0) - attend(0, 5)).abs().max() > 1e-3
    assert (attend(0, 0) - layer(target, key_value_states=source)[0]).abs().max() > 1e-3


def test_gradients_reach_both_sides():
    """The same from the definition and from what is recomputed in blocks."""
    layer = make_layer("gqa_sas").train()
    target, source = (tensor.requires_grad_() for tensor in sequences(layer))

    def gradients():
        output = layer(target, key_value_states=source)[0]
        return torch.autograd.grad(output.pow(2).sum(), [target, source, *layer.parameters()])

    found = gradients()
    layer.config._attn_implementation = "eager"
    for gradient, expected in zip(found, gradients(), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_super_attention_says_what_it_needs():
    layer = make_layer("super")
    target, source = sequences(layer)
    with pytest.raises(ValueError, match="token_mixing"):
        layer(target, key_value_states=source)


@pytest.mark.parametrize("variant", ["mha", "mha_sas", "mla_sas"])
def test_an_engine_may_return_tokens_and_features(variant, monkeypatch):
    """As serving engines do, which run all rows of a batch as one."""

    def engine(module, query, key, value, attention_mask, scaling, **kwargs):
        output, _ = attention_functions.sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output.flatten(0, 1).flatten(1), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "engine", engine)
    layer = make_layer(variant)
    states, _ = sequences(layer, batch=1)
    expected = layer(states)[0]
    layer.config._attn_implementation = "engine"
    torch.testing.assert_close(layer(states)[0], expected)
