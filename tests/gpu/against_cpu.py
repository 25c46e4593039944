"""What the tests of this folder share: a step on some device, compared with the definition in float64 on the CPU.

The bodies take any device: where a CPU has the kernel, too, the same test runs on it, and a rare GPU meets no slips.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from helpers import PLAIN_VARIANTS, gpt, gradients, token_ids
from torch import nn

from sas_hf.modeling import attention_kernels
from sas_hf.modeling.attention_kernels import UNMEASURED, Choice


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The widths of the paper's 125M model, keys of 96 features and values of 64.
FIELDS = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_simulated_heads": 12,
    "simulated_head_dim": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
}
LENGTH, LAYERS = 64, 2
# Distances of outputs and gradients, relative to their size; of float32 without TF32.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def case_inputs(case: str) -> dict[str, torch.Tensor]:
    """Two rows of tokens: whole ("plain"), of two documents each ("packed"), or the second one shorter ("padded")."""
    inputs = {"input_ids": token_ids(2, LENGTH)}
    if case == "packed":
        rows = [torch.cat([torch.arange(first), torch.arange(LENGTH - first)]) for first in (20, 41)]
        inputs["position_ids"] = torch.stack(rows)
    if case == "padded":
        inputs["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
        inputs["attention_mask"][1, 50:] = 0
    return inputs


def to(device: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def step(
    model: nn.Module, inputs: dict, direction: torch.Tensor, around: Callable[[], AbstractContextManager] = nullcontext
) -> dict[str, torch.Tensor]:
    """Logits and the gradients of their product with `direction`, in float64 on the CPU; `around` the forward pass."""
    device = next(model.parameters()).device
    model.zero_grad()
    with around():
        logits = model(**to(device, inputs), use_cache=False).logits
    (logits.double() * direction.to(device)).sum().backward()
    real = inputs.get("attention_mask", torch.ones(2, LENGTH))[..., None].to(device)
    found = {name: gradient for name, gradient in gradients(model).items() if gradient is not None}
    return {name: tensor.detach().double().cpu() for name, tensor in (found | {"logits": logits * real}).items()}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Logits, and all gradients together."""
    assert found.keys() == expected.keys()
    for names in ({"logits"}, found.keys() - {"logits"}):
        difference = sum((found[name] - expected[name]).square().sum() for name in names).sqrt()
        size = sum(expected[name].square().sum() for name in names).sqrt()
        assert difference < tolerance * size, f"{sorted(names)[:3]}: {difference / size:.2g} of their size"


class Beside:
    """A model of `variant` on a device, and the definition in float64 on the CPU, with the same weights and inputs."""

    def __init__(self, device: str, dtype: torch.dtype, case: str = "plain", variant: str = "sas", **fields):
        fields = FIELDS | fields
        if variant in PLAIN_VARIANTS:
            fields |= {"num_simulated_heads": None, "simulated_head_dim": None}
        self.inputs = case_inputs(case)
        self.model = gpt(variant, **fields).train()
        self.definition = gpt(variant, **fields, attn_implementation="eager").double().train()
        self.definition.load_state_dict(self.model.to(dtype).state_dict())  # rounded as the model's
        self.model.to(device)
        real = self.inputs.get("attention_mask", torch.ones(2, LENGTH))[..., None]
        self.direction = torch.randn(2, LENGTH, self.model.config.vocab_size, dtype=torch.float64) * real

    def compare(self, tolerance: float, model: nn.Module | None = None, around=nullcontext) -> None:
        found = step(self.model if model is None else model, self.inputs, self.direction, around)
        found = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
        assert_near(found, step(self.definition, self.inputs, self.direction), tolerance)


def choose_always(monkeypatch, function: str, device: str, values: str) -> None:
    """Put a row in front of the table of kernels."""
    dtypes = tuple(TOLERANCES)
    row = Choice((function,), device, None, dtypes, 1, "as this test says", values, UNMEASURED)
    monkeypatch.setattr(attention_kernels, "CHOICES", [row, *attention_kernels.CHOICES])


class Kept:
    """Counts the tensors that are kept for the backward pass, by their shape."""

    def __init__(self):
        self.shapes = []

    def __call__(self) -> AbstractContextManager:
        def pack(tensor):
            self.shapes.append(tuple(tensor.shape))
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
