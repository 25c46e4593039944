"""Narrow weights are compared in float32, and stay narrow."""

import copy

import pytest
import torch
from tiny_sources import FAMILY_NAMES, tiny_source

from sas_hf.conversion import compare_models, convert_model, fidelity
from sas_hf.conversion.fidelity import computing_in_float32


def bfloat16(model):
    """As `from_pretrained` gives it: `model.bfloat16()` would round the rotary frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("slice_size", [2**24, 600])
@pytest.mark.parametrize("shape", FAMILY_NAMES)
@torch.no_grad()
def test_a_narrow_model_computes_what_its_wide_copy_computes(shape, slice_size, monkeypatch):
    monkeypatch.setattr(fidelity, "WEIGHTS_AT_ONCE", slice_size)  # 600: ten rows of a map from 60 features
    for model in (bfloat16(tiny_source(shape)), convert_model(bfloat16(tiny_source(shape)))):
        wide = copy.deepcopy(model).float()
        ids = torch.randint(300, (2, 20))
        with computing_in_float32(model):
            logits = model(ids).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, wide(ids).logits, rtol=0, atol=1e-5 * logits.abs().max().item())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", FAMILY_NAMES)
def test_at_no_time_is_more_than_one_module_wide(shape):
    model = bfloat16(tiny_source(shape))
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    widest = []

    def count(*_):
        widest.append(sum(p.numel() for p in model.parameters() if p.dtype == torch.float32))

    for module in model.modules():
        module.register_forward_hook(count)
    with computing_in_float32(model):
        model(torch.randint(300, (1, 20)))
    assert max(widest) <= largest


def test_an_error_inside_leaves_the_weights_narrow():
    model = bfloat16(tiny_source("gpt2"))
    with computing_in_float32(model), pytest.raises(IndexError):
        model(torch.tensor([[300]]))  # beyond the vocabulary
    with computing_in_float32(model), pytest.raises(RuntimeError):
        model.transformer.ln_f(torch.zeros(1, 61))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "forward" not in vars(model.lm_head)


def test_narrow_models_are_compared_as_exactly_as_wide_ones():
    source = bfloat16(tiny_source("qwen3"))
    converted = convert_model(source)
    ids = [torch.randint(300, (1, 40))]
    narrow = compare_models(source, converted, ids)
    wide = compare_models(source.float(), converted.float(), ids)
    assert narrow.is_exact and wide.is_exact
    assert narrow.max_abs_output == pytest.approx(wide.max_abs_output, rel=1e-5)
    assert 0 < narrow.source_eager_sdpa_difference <= narrow.to_dict()["tolerance"]
