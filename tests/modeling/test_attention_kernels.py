"""What is chosen where keys are wider than values: the table, padded values, and FlashAttention's two habits.

FlashAttention runs on GPUs alone (tests/gpu); here a stand-in with its signature takes its place, and all around it is
Transformers' own.
"""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import assert_all_close, gpt, gradients, left_padded, token_ids
from transformers import modeling_flash_attention_utils as flash

from sas_hf.modeling import attention_kernels
from sas_hf.modeling.attention_kernels import AS_THEY_ARE, CHOICES, PADDED, UNMEASURED, Choice, choose


ROOT = Path(__file__).parents[2]
PACKED = torch.stack([torch.cat([torch.arange(n), torch.arange(14 - n)]) for n in (6, 9)])


def test_every_row_has_a_figure_or_says_that_it_has_none():
    for row in CHOICES:
        if row.evidence != UNMEASURED:
            document, figures = row.evidence.partition(",")[0], re.findall(r"\d+\.\d+", row.evidence)
            text = (ROOT / document).read_text()
            assert figures, row.evidence
            assert all(figure in text for figure in figures), row.evidence


def test_the_document_holds_the_table():
    text = (ROOT / "docs" / "gpu.md").read_text()
    for row in CHOICES:
        assert f"| {row.kernel} | {row.values} |" in text, row.kernel


def test_no_row_is_hidden_by_one_before(monkeypatch):
    """Each is what some card, type and width gets."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for row in CHOICES:
        card = type("Card", (), dict(zip(("major", "minor"), (row.capability or [(8, 6)])[0], strict=True)))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        query, value = (torch.empty(2, width, dtype=row.dtypes[0], device="meta") for width in (96, 64))
        query, value = (On(tensor, row.device) for tensor in (query, value))
        assert choose(row.functions[0], query, value) == row


class On:
    """A tensor that is said to be elsewhere."""

    def __init__(self, tensor, device):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device(device)


def row_before_all(monkeypatch, function: str, values: str) -> None:
    row = Choice((function,), "cpu", None, (torch.float64,), 1, "a test's", values, UNMEASURED)
    monkeypatch.setattr(attention_kernels, "CHOICES", [row, *CHOICES])


def step(model, inputs, direction) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    (logits * direction).sum().backward()
    return {"logits": (logits * direction).detach()} | {
        name: gradient.clone() for name, gradient in gradients(model).items() if gradient is not None
    }


def by_definition(model, inputs, direction) -> dict[str, torch.Tensor]:
    model.set_attn_implementation("eager")
    return step(model, inputs, direction)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("variant", ["sas", "feature_only"])
def test_padded_values(variant, recompute, monkeypatch):
    """The kernel sees one width, and what it is given is made again in the backward pass."""
    row_before_all(monkeypatch, "sdpa", PADDED)
    attention, widths, kept = torch.nn.functional.scaled_dot_product_attention, set(), []

    def watched(query, key, value, **options):
        widths.add((query.shape[-1], key.shape[-1], value.shape[-1]))
        return attention(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = gpt(variant, recompute_simulation=recompute).double().train()
    inputs, direction = {"input_ids": token_ids(2, 14)}, torch.randn(2, 14, 67, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        found = step(model, inputs, direction)
    assert widths == {(12, 12, 12)}
    assert_all_close(found, by_definition(model, inputs, direction), 1e-5)
    if variant == "sas":  # the output alone, or queries, keys and padded values as well
        wide = [shape for shape in kept if sorted(shape) == [2, 12, 12, 14]]
        layers = model.config.num_hidden_layers
        assert len(wide) == layers if recompute else len(wide) >= 4 * layers


def test_padded_values_are_derived_twice(monkeypatch):
    """Derivatives of gradients go through the values that were padded."""
    row_before_all(monkeypatch, "sdpa", PADDED)
    model = gpt("sas").double().train()
    ids, direction = token_ids(1, 5), torch.randn(1, 5, 67, dtype=torch.float64)
    weight = model.model.layers[0].self_attn.v_proj.weight

    def curvature():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            logits = model(ids, use_cache=False).logits
            (gradient,) = torch.autograd.grad((logits * direction).sum(), weight, create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), weight)[0]

    found = curvature()
    model.set_attn_implementation("eager")
    torch.testing.assert_close(found, curvature(), rtol=1e-4, atol=1e-4 * found.abs().max().item())


def attend(query, key, value, softmax_scale, causal):
    """`[..., T, heads, width]`, whose last queries meet the last keys."""
    query, key, value = (states.transpose(-3, -2) for states in (query, key, value))
    scores = query @ key.transpose(-2, -1) * softmax_scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(-3, -2)


class StandIn:
    """FlashAttention's functions; version 4 takes keys that are wider than values, the others refuse them."""

    def __init__(self, version: int):
        self.version, self.calls = version, []

    def check(self, query, value):
        if self.version < 4 and query.shape[-1] != value.shape[-1]:
            raise RuntimeError("queries, keys and values must have one width")

    def whole(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
        self.check(q, v)
        self.calls.append(("whole", v.shape[-1]))
        return attend(q, k, v, softmax_scale, causal)

    def documents(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        deterministic=False,
    ):
        self.check(q, v)
        self.calls.append(("documents", v.shape[-1]))
        bounds = cu_seqlens_q.tolist()
        assert bounds == cu_seqlens_k.tolist()
        assert max(end - begin for begin, end in pairwise(bounds)) == max_seqlen_q == max_seqlen_k
        parts = [slice(*pair) for pair in pairwise(bounds)]
        return torch.cat([attend(q[part], k[part], v[part], softmax_scale, causal) for part in parts])


@pytest.fixture
def stand_in(monkeypatch):
    """Makes the stand-in of a version what Transformers has loaded."""

    def install(version: int) -> tuple[StandIn, str]:
        functions, name = StandIn(version), f"flash_attention_{version}"
        loaded = {
            "_loaded_implementation": name,
            "_flash_fn": functions.whole,
            "_flash_varlen_fn": functions.documents,
            "_flash_with_kvcache_fn": None,
            "_pad_fn": flash._pad_input,
            "_unpad_fn": flash._unpad_input,
            "_process_flash_kwargs_fn": flash._lazy_define_process_function(functions.documents),
            "_process_with_kvcache_kwargs_fn": dict,
        }
        for attribute, value in loaded.items():
            monkeypatch.setattr(flash, attribute, value)
        if version == 4:
            row_before_all(monkeypatch, name, AS_THEY_ARE)
        return functions, name

    return install


@pytest.mark.parametrize("case", ["plain", "packed", "packed in one row", "padded"])
@pytest.mark.parametrize("version", [2, 4])
def test_flash_attention_around_its_kernel(version, case, stand_in):
    """Several rows of packed documents, too, which Transformers alone would take for whole ones."""
    functions, name = stand_in(version)
    model, ids = gpt("sas").double().train(), token_ids(2, 14)
    inputs = {"input_ids": ids}
    if case == "padded":
        inputs["input_ids"], inputs["attention_mask"] = left_padded(14, 9)
    elif case != "plain":
        rows = slice(0, 1 if case.endswith("row") else 2)
        inputs = {"input_ids": ids[rows], "position_ids": PACKED[rows]}
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[..., None]
    direction = torch.randn(*inputs["input_ids"].shape, 67, dtype=torch.float64) * real
    model.config._attn_implementation = name
    found = step(model, inputs, direction)
    called = "whole" if case == "plain" else "documents"
    assert functions.calls == [(called, 12 if version == 2 else 8)] * model.config.num_hidden_layers
    model.config._attn_implementation = "eager"
    assert_all_close(found, step(model, inputs, direction), 1e-5)


def test_flash_attention_of_equal_widths_is_transformers_own(stand_in):
    functions, name = stand_in(2)
    model, ids = gpt("mha"), token_ids(2, 14)
    with torch.no_grad():
        expected = model(ids, position_ids=PACKED).logits
        model.config._attn_implementation = name
        torch.testing.assert_close(model(ids, position_ids=PACKED).logits, expected, atol=1e-4, rtol=0)
    assert functions.calls == [("documents", 8)] * model.config.num_hidden_layers
