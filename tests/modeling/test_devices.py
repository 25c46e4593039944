"""What a GPU would meet: nothing is asked of the device within a step, as a mode sees that watches every operation."""

import pytest
import torch
from helpers import CACHE_NAME, gpt, left_padded, returned_cache, token_ids
from model_mixin import SASGPT, SASEncoder, SASSeq2Seq, SASViT
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from sas_hf.modeling import attention_functions, fused_simulation, key_store, recomputation, sequence


ARCHITECTURES = {"gpt": SASGPT(), "encoder": SASEncoder(), "seq2seq": SASSeq2Seq(), "vit": SASViT()}
KINDS = ["mha", "learned", "mla", "tpa", "optimised", "efficient", "super", "qk_norm"]
SIMULATED = [
    "sas",
    "sas_k5_gqa",
    "sas_learned",
    "mla_sas",
    "tpa_sas",
    "optimised_sas",
    "efficient_sas",
    "beyond_paper",
]
CASES = [("gpt", variant) for variant in (*KINDS, *SIMULATED)]
for name in ("encoder", "seq2seq", "vit"):
    CASES += [(name, variant) for variant in (*ARCHITECTURES[name].compiled_variants, "sas_k5_gqa")]
CASES = list(dict.fromkeys(CASES))
FORMS = [(variant, "expanded") for variant in KINDS]
FORMS += [(variant, form) for variant in SIMULATED for form in ("expanded", "base")]


def packed_positions() -> torch.Tensor:
    """Two documents in each of two rows of 14 tokens."""
    return torch.cat([torch.arange(6), torch.arange(8)])[None].expand(2, -1)


class Questions(TorchDispatchMode):
    """Notes the operations whose result, or its shape, the host would wait for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        indexes = operation.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put)
        indexes |= operation.overloadpacket is torch.ops.aten.index_put_
        if indexes:  # whose shape is known, unless a mask chooses
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags)
        if waits:
            self.asked.append(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.fixture(params=["definition", "fused"])
def far_away(request, monkeypatch):
    """As if a device had to be waited for; the mode alone would make the fused operations step aside."""
    for module in (sequence, key_store):
        monkeypatch.setattr(module, "is_at_hand", lambda tensor: False)
    if request.param == "fused":
        for module in (fused_simulation, attention_functions, recomputation):
            monkeypatch.setattr(module, "is_transformed", lambda but_for_compilation=False: False)


def questions(model, **inputs) -> list[str]:
    """Those of a step of training, or of a forward pass where the model is not trained."""
    with Questions() as watched, torch.set_grad_enabled(model.training):
        output = model(**inputs).logits
        if model.training:
            output.sum().backward()
    return watched.asked


@pytest.mark.parametrize(("architecture", "variant"), CASES)
def test_nothing_is_asked_in_a_training_step(architecture, variant, far_away):
    architecture = ARCHITECTURES[architecture]
    model = architecture.make(variant).train()
    inputs = architecture.inputs(model)
    padding = inputs.pop("attention_mask", None)
    assert questions(model, **inputs) == []
    if architecture.model_class is SASGPT.model_class:
        assert questions(model, **inputs, position_ids=packed_positions()) == []
        # One question, which may spare all layers a mask: is anything padded?
        padding = torch.ones_like(inputs["input_ids"])
        padding[0, :3] = 0
    if padding is not None:
        assert len(questions(model, **inputs, attention_mask=padding)) <= 3


@pytest.mark.parametrize(("variant", "form"), FORMS)
def test_nothing_is_asked_when_a_token_is_decoded(variant, form, far_away):
    model, ids = gpt(variant, simulation_cache=form), token_ids(2, 6)
    padded, mask = left_padded(6, 4)
    longer = torch.cat((mask, mask[:, -1:]), dim=1)
    positions = (longer.cumsum(-1) - 1)[:, -1:]
    static = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(ids, **{CACHE_NAME: static})
        dynamic, of_padded = (
            returned_cache(model(given, attention_mask=given_mask, use_cache=True))
            for given, given_mask in ((ids, None), (padded, mask))
        )
    assert questions(model, input_ids=ids[:, :1], **{CACHE_NAME: static}) == []
    assert questions(model, input_ids=ids[:, :1], **{CACHE_NAME: dynamic}) == []
    given = {"input_ids": ids[:, :1], "attention_mask": longer, "position_ids": positions}
    assert questions(model, **given, **{CACHE_NAME: of_padded}) == []


@pytest.mark.parametrize("variant", ["mha", "sas", "sas_learned", "super"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_device_that_is_not_asked_computes_the_same(variant, is_causal, monkeypatch):
    """Documents that are packed, documents that are not, padding, and a token after it."""
    model = gpt(variant, is_causal=is_causal)
    ids, mask = left_padded(14, 9)
    positions = torch.arange(14)[None]

    def logits():
        found = [model(ids, position_ids=packed_positions()).logits, model(ids, position_ids=positions).logits]
        if is_causal:
            first = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
            found.append(model(ids[:, -1:], attention_mask=mask, **{CACHE_NAME: returned_cache(first)}).logits)
        return found

    with torch.no_grad():
        expected = logits()
        for module in (sequence, key_store):
            monkeypatch.setattr(module, "is_at_hand", lambda tensor: False)
        torch.testing.assert_close(logits(), expected, atol=1e-4, rtol=0)


def test_positions_without_parameters_are_refused_where_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(sequence, "is_at_hand", lambda tensor: False)
    model, ids = gpt("learned"), token_ids(1, 65)
    with pytest.raises(ValueError, match="`max_position_embeddings` = 64"), Questions() as watched:
        model(ids)
    assert watched.asked  # to tell how far it reaches
    with pytest.raises(RuntimeError, match="`max_position_embeddings` = 64"), Questions() as watched:
        model(ids[:, :3], position_ids=torch.tensor([[62, 63, 64]]))
    assert watched.asked == []
