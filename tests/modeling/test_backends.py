"""Attention implementations give the same numbers, compiled and checkpointed too."""

import pytest
import torch
from helpers import SAS_VARIANTS, gpt, left_padded, token_ids
from model_mixin import SASGPT, BackendTests, SASEncoder, SASSeq2Seq, SASViT


class TestSASGPT(SASGPT, BackendTests):
    pass


class TestSASEncoder(SASEncoder, BackendTests):
    pass


class TestSASSeq2Seq(SASSeq2Seq, BackendTests):
    pass


class TestSASViT(SASViT, BackendTests):
    pass


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # Transformers to PyTorch
@pytest.mark.parametrize("variant", ["gqa", "sas_k5_gqa"])
def test_flex_attention_forward(variant):
    """Forward alone: PyTorch has no backward of flex attention on the CPU."""
    model = gpt(variant)
    ids, mask = left_padded(14, 9)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        model.set_attn_implementation("flex_attention")
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-3, rtol=0)


def test_compiled_by_inductor():
    model, ids = gpt("sas_k5_gqa"), token_ids(2, 14)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(ids).logits
        torch.testing.assert_close(compiled, model(ids).logits, atol=1e-3, rtol=0)


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="attn_implementation"):
        gpt("sas", attn_implementation="nothing_of_this_name")


@pytest.mark.parametrize("variant", SAS_VARIANTS)
def test_bfloat16_autocast(variant):
    """Mixed precision runs forward and backward and stays near float32."""
    model, ids = gpt(variant), token_ids(2, 14)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
