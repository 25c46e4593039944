"""Derivatives through the written-out backward passes are right: of second order, by angles and masks, and what
`torch.func`, forward mode and tracing make of a model.

The truth is what PyTorch's own operations give, all in float64.
"""

import io

import pytest
import torch
from helpers import GPT_VARIANTS, SAS, gpt, images, token_ids, vit
from torch.autograd import forward_ad

from sas_hf.modeling import attention_functions, fused_simulation
from sas_hf.modeling.kinds import make_attention


VARIANTS = [name for name in GPT_VARIANTS if "sas" in name or name in ("mla", "head_only", "feature_only", "linear")]
LOUD = "derivative for aten::_scaled_dot_product"  # PyTorch's own kernel, as for Llama


def plain_paths(monkeypatch) -> None:
    monkeypatch.setattr(fused_simulation, "is_plain", lambda module: False)
    monkeypatch.setattr(attention_functions, "_blocks_serve", lambda *arguments: False)


def hessian_vector(model, inputs: dict, vector: list[torch.Tensor]) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    loss = (model(**inputs).logits ** 2).mean()
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    inner = sum((part * side).sum() for part, side in zip(gradient, vector, strict=True) if part is not None)
    found = torch.autograd.grad(inner, parameters, allow_unused=True)
    return [torch.zeros(()) if part is None else part for part in found]


def assert_right(model, inputs: dict, monkeypatch) -> None:
    """With and without recomputation and checkpoints; or PyTorch's own refusal, where its kernel runs."""
    model = model.double().train()
    vector = [torch.randn_like(parameter) for parameter in model.parameters()]
    with monkeypatch.context() as patch:
        plain_paths(patch)
        model.set_attn_implementation("eager")
        expected = hessian_vector(model, inputs, vector)
    scale = max(part.abs().max() for part in expected)
    assert scale > 1e-3
    for implementation, checkpoints, recompute in (
        ("eager", False, True),
        ("sdpa", False, True),
        ("sdpa", False, False),
        ("sdpa", True, True),
    ):
        model.set_attn_implementation(implementation)
        model.config.recompute_simulation = recompute
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            found = hessian_vector(model, inputs, vector)
        except RuntimeError as error:
            assert implementation == "sdpa" and LOUD in str(error)
            continue
        for part, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(part, truth, atol=1e-7 * scale.item(), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives(variant, monkeypatch):
    assert_right(gpt(variant), {"input_ids": token_ids(2, 5), "use_cache": False}, monkeypatch)


@pytest.mark.parametrize("variant", ["sas", "mla", "efficient_sas"])
def test_second_derivatives_beside_padding(variant, monkeypatch):
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    inputs = {"input_ids": token_ids(2, 5), "attention_mask": mask, "use_cache": False}
    assert_right(gpt(variant), inputs, monkeypatch)


@pytest.mark.parametrize("variant", ["sas", "sas_k5_gqa", "mla", "efficient_sas"])
def test_second_derivatives_of_an_image_classifier(variant, monkeypatch):
    model = vit(variant)
    assert_right(model, {"pixel_values": images(model.config).double()}, monkeypatch)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("recompute", [True, False])
def test_angles_and_masks_that_are_learnt(recompute, implementation, monkeypatch):
    """A layer whose caller derives by the cosines, the sines or a mask that is added to the scores."""
    config = gpt("sas", recompute_simulation=recompute).config
    config._attn_implementation = implementation
    layer = make_attention(config, 0).double().train()
    states = torch.randn(2, 5, 32, dtype=torch.float64)
    inputs = [torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)]
    inputs.append(torch.randn(2, 1, 5, 5, dtype=torch.float64))
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def gradients(*which):
        cos, sin, mask = (tensor if index in which else tensor.detach() for index, tensor in enumerate(inputs))
        output, _ = layer(states, (cos, sin), (cos, sin), mask)
        return torch.autograd.grad(output.pow(2).sum(), [inputs[index] for index in which])

    found = gradients(0, 1) + gradients(2)
    plain_paths(monkeypatch)
    for gradient, truth in zip(found, gradients(0, 1) + gradients(2), strict=True):
        assert truth.abs().max() > 1e-3
        torch.testing.assert_close(gradient, truth)


@pytest.mark.parametrize("variant", ["sas", "sas_k5_gqa", "mla"])
def test_functional_transforms(variant):
    model = gpt(variant, **(SAS if variant == "mla" else {})).double()
    ids = token_ids(3, 5)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights, row):
        inputs = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        return torch.func.functional_call(model, weights, (), inputs).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="error")(weights, ids)
    directions = {name: torch.randn_like(weight) for name, weight in weights.items()}
    model.set_attn_implementation("eager")
    _, along = torch.func.jvp(lambda weights: loss(weights, ids[0]), (weights,), (directions,))
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(weight, directions[name]) for name, weight in weights.items()}
        along_by_duals = forward_ad.unpack_dual(loss(duals, ids[0])).tangent
    for row, one in enumerate(ids):
        model.zero_grad()
        model(one[None], labels=one[None], use_cache=False).loss.backward()
        if row == 0:
            expected = sum((parameter.grad * directions[name]).sum() for name, parameter in model.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][row], parameter.grad)
    for found in (along, along_by_duals):  # the loss is computed in float32
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return (self.model(inputs) if inputs.is_floating_point() else self.model(inputs, use_cache=False)).logits


@pytest.mark.filterwarnings("ignore")  # what a trace takes for constants, and that it is of the past
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [gpt, vit])
def test_a_traced_model_is_saved_and_computes_the_same(make, implementation):
    model, saved = make("sas"), io.BytesIO()
    model.set_attn_implementation(implementation)
    inputs = token_ids(2, 8) if make is gpt else images(model.config)
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(Logits(model), (inputs,), check_trace=False), saved)
        saved.seek(0)
        torch.testing.assert_close(torch.jit.load(saved)(inputs), model(inputs).logits)
