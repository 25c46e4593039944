"""Weights of the simulation that are not plain memory: quantised, sharded, kept elsewhere, made of others.

What reads them must be the layers that own them, as with any `nn.Linear` or `nn.Conv1d`; a written-out function that
took them for memory would compute something else. The truth is the same model with plain weights.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from promised_models import Logits, answered, assert_near, attention_of, inputs_of, loss_of, make
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.testing._internal.two_tensor import TwoTensor


SIMULATED = ["gpt-mha_sas", "gpt-sas_k3", "gpt-heads_only", "gpt-features_only", "gpt-mla_sas", "vit-mha_sas"]


def layers_of(model: nn.Module, sides: str = "qkv") -> dict[str, nn.Module]:
    """The linear maps and convolutions of the simulation of some sides, by their names in the attention layer."""
    modules = attention_of(model).named_modules()
    prefixes = tuple(f"{side}_simulation." for side in sides)
    return {
        name: part for name, part in modules if name.startswith(prefixes) and isinstance(part, nn.Linear | nn.Conv1d)
    }


def step(logits: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and the gradients of all parameters that have one."""
    logits.zero_grad()
    output = logits(inputs)
    loss_of(output).backward()
    return [output.detach(), *(parameter.grad for parameter in logits.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("sides", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("name", SIMULATED)
def test_two_models_in_one(name, sides):
    """PyTorch's own tensor type that computes twice: what is written into plain memory would be the second's alone."""
    first = make(name)
    second, both = copy.deepcopy(first), copy.deepcopy(first)
    inputs, others = inputs_of(first), layers_of(second, sides)
    for layer_name, layer in layers_of(both, sides).items():
        for weight_name, weight in list(layer.named_parameters()):
            other = getattr(others[layer_name], weight_name)
            with torch.no_grad():
                other.mul_(0.7)
            two = TwoTensor(weight.detach().clone(), other.detach().clone())
            setattr(layer, weight_name, nn.Parameter(two))
    if not others:
        return  # values have no simulation of features

    with torch.no_grad():
        without_graph = Logits(both)(inputs)
    found = [without_graph, *step(Logits(both), inputs)]
    for which, model in (("a", first), ("b", second)):
        expected = [Logits(model)(inputs).detach(), *step(Logits(model), inputs)]
        assert_near([getattr(tensor, which) for tensor in found], expected, 1e-9)


class Int8(torch.Tensor):
    """A quantised weight that knows a linear map and nothing else, as those of torchao."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scales: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scales.dtype)

    def __init__(self, numbers: torch.Tensor, scales: torch.Tensor):
        self.numbers, self.scales = numbers, scales

    @classmethod
    def of(cls, weight: torch.Tensor) -> "Int8":
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scales).round().to(torch.int8), scales)

    def dequantized(self) -> torch.Tensor:
        return self.numbers * self.scales

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            inputs, weight, *bias = args
            return nn.functional.linear(inputs, weight.dequantized(), *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scales)
        raise NotImplementedError(f"{cls.__name__} does not know {function}")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt-mha", *(name for name in SIMULATED if name != "gpt-heads_only")])
def test_quantised_linear_maps(name, implementation):
    plain = make(name, implementation)
    quantised, inputs = copy.deepcopy(plain), inputs_of(plain)
    linear_maps = [
        [part for part in attention_of(model).modules() if isinstance(part, nn.Linear)] for model in (plain, quantised)
    ]
    for truth, layer in zip(*linear_maps, strict=True):
        weight = Int8.of(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        truth.weight = nn.Parameter(weight.dequantized(), requires_grad=False)
    with torch.no_grad():
        assert_near(Logits(quantised)(inputs), Logits(plain)(inputs), 1e-9)
    assert_near(step(Logits(quantised), inputs), step(Logits(plain), inputs), 1e-9)


@pytest.fixture
def mesh():
    """One process of its own group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # that its output must not be written to
@pytest.mark.parametrize("name", SIMULATED)
def test_layers_that_are_sharded_each_alone(name, mesh):
    """FSDP2 gathers a layer's weights when that layer is called, and not before."""
    model = make(name).train()
    inputs = inputs_of(model)
    expected = step(Logits(model), inputs)
    for layer in layers_of(model).values():
        fully_shard(layer, mesh=mesh)
    logits = fully_shard(Logits(model), mesh=mesh)
    found = step(logits, inputs)
    assert_near([tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in found], expected, 1e-9)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt-mha_sas", "gpt-heads_only", "gpt-features_only", "gpt-mla_sas"])
def test_distributed_weights(name, implementation, mesh, record_property):
    model = make(name, implementation)
    inputs = inputs_of(model)
    # PyTorch's convolutions of such tensors have no backward pass.
    compute = step if name == "gpt-features_only" else torch.no_grad()(lambda logits, inputs: [logits(inputs)])
    expected = compute(Logits(model), inputs)
    for layer in layers_of(model).values():
        for weight_name, weight in list(layer.named_parameters()):
            setattr(layer, weight_name, nn.Parameter(distribute_tensor(weight.detach(), mesh, [Replicate()])))
    with implicit_replication():
        found = answered(record_property, implementation, lambda: compute(Logits(model), inputs))
    if found is not None:
        found = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in found]
        assert_near(found, expected, 1e-9)


@pytest.mark.parametrize("name", ["gpt-super", *SIMULATED])
def test_weights_that_are_kept_elsewhere(name):
    """Accelerate brings a layer's weights when that layer is called."""
    model = make(name)
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = Logits(model)(inputs)
        cpu_offload(model, execution_device="cpu")
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert_near(Logits(model)(inputs), expected, 1e-9)


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("make_of_others", ["weight_norm", "prune"])
def test_weights_that_are_made_of_others(make_of_others, name):
    """Also in their gradients."""
    model = make(name).train()
    inputs, layers = inputs_of(model), layers_of(model)
    for layer in layers.values():
        if make_of_others == "weight_norm":
            weight_norm(layer)
        else:
            prune.random_unstructured(layer, "weight", 0.5)
    found = step(Logits(model), inputs)
    watches = [layer.register_forward_hook(lambda *_: None) for layer in layers.values()]
    expected = step(Logits(model), inputs)
    assert len(watches) >= 4
    assert_near(found, expected, 1e-9)
