"""What models promise to the tools that transform them: each kind of attention, plain and simulated, in a decoder and
in an encoder of images, beside Transformers' own Llama and ViT.

Models are called from outside alone, with each attention function. What they give is compared with differences, loops
or the untransformed model, in float64. PyTorch's own attention kernel refuses some derivatives, for Llama as for us:
a refusal in its name is an answer, a wrong number is not.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import CHECKPOINTING, left_padded, token_ids
from promised_models import (
    MODELS,
    OTHERS,
    Logits,
    answered,
    assert_near,
    attention_of,
    inputs_of,
    loss_of,
    make,
    parts_of,
    takes_tokens,
)
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


every_model = pytest.mark.parametrize("name", MODELS)
either_implementation = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
# Where a case takes a second: all kinds with the usual implementation, some with the other.
FORMS = ("gpt-sas_kept", "gpt-heads_only", "gpt-features_only", "vit-sas_k3")
mostly_sdpa = pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "sdpa") for name in MODELS if name not in FORMS]
    + [(name, "eager") for name in ("gpt-mha_sas", "vit-mha_sas", "vit")],
)


@contextmanager
def moved(model: nn.Module, direction: list[torch.Tensor], by: float) -> Iterator[None]:
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, side in zip(parameters, direction, strict=True):
            parameter.add_(side, alpha=by)
    yield
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def difference(function: Callable, model: nn.Module, direction: list[torch.Tensor], step: float) -> list[torch.Tensor]:
    """The derivative of the tensors that `function()` gives when the parameters move, to the fourth order."""

    def at(by: float) -> tuple[torch.Tensor, ...]:
        with moved(model, direction, by):
            return function()

    near = [a - b for a, b in zip(at(step), at(-step), strict=True)]
    far = [a - b for a, b in zip(at(2 * step), at(-2 * step), strict=True)]
    return [(8 * a - b) / (12 * step) for a, b in zip(near, far, strict=True)]


def step_and_bound(name: str, implementation: str) -> tuple[float, float]:
    """Of differences. The softmax of Transformers' `eager` rounds to float32, which a small step would magnify."""
    return (2e-3, 2e-3) if implementation == "eager" and name in ("llama", "vit") else (2e-5, 1e-7)


@every_model
@either_implementation
def test_gradients_of_gradients(name, implementation, record_property):
    """Along a random direction: of the loss the gradient's part, of the gradient the Hessian's product."""
    model = make(name, implementation).train()
    parameters, inputs = list(model.parameters()), inputs_of(model)
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def loss():
        return loss_of(Logits(model)(inputs))

    def gradient(**kwargs):
        return torch.autograd.grad(loss(), parameters, materialize_grads=True, **kwargs)

    def hessian_vector():
        slope = sum((part * side).sum() for part, side in zip(gradient(create_graph=True), direction, strict=True))
        return torch.autograd.grad(slope, parameters, materialize_grads=True)

    step, bound = step_and_bound(name, implementation)
    slope = sum((part * side).sum() for part, side in zip(gradient(), direction, strict=True))
    with torch.no_grad():
        assert_near(slope, difference(lambda: [loss()], model, direction, step), bound)
    found = answered(record_property, implementation, hessian_vector)
    if found is not None:
        assert_near(found, difference(gradient, model, direction, step), bound)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", ["gpt-mha", "gpt-mha_sas", "gpt-sas_k3", "gpt-mla_sas", "gpt-super", *OTHERS])
@either_implementation
def test_gradients_of_gradients_beside_padding(name, implementation, checkpoints, record_property):
    """Also within gradient checkpoints, which compute everything once more."""
    model = make(name, implementation).train()
    parameters, inputs = list(model.parameters()), inputs_of(model)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def gradient(**kwargs):
        logits = model(inputs, attention_mask=mask, use_cache=False).logits
        return torch.autograd.grad(loss_of(logits * mask[..., None]), parameters, materialize_grads=True, **kwargs)

    def hessian_vector():
        slope = sum((part * side).sum() for part, side in zip(gradient(create_graph=True), direction, strict=True))
        return torch.autograd.grad(slope, parameters, materialize_grads=True)

    expected = difference(gradient, model, direction, 2e-5)
    if checkpoints:
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    found = answered(record_property, implementation, hessian_vector)
    if found is not None:
        assert_near(found, expected, 1e-7)


@every_model
@either_implementation
def test_gradients_of_each_sample(name, implementation, record_property):
    """By `vmap`, as differential privacy takes them, and one after the other."""
    model = make(name, implementation)
    logits, inputs = Logits(model), inputs_of(model, batch=3)
    weights = {name: parameter.detach() for name, parameter in logits.named_parameters()}

    def loss(weights, row):
        return loss_of(functional_call(logits, weights, (row[None],)))

    each = vmap(grad(loss), in_dims=(None, 0), randomness="error")
    found = answered(record_property, implementation, lambda: each(weights, inputs))
    for index, row in enumerate(inputs):
        expected = torch.autograd.grad(loss_of(logits(row[None])), list(logits.parameters()), materialize_grads=True)
        assert_near([part[index] for part in found.values()], expected, 1e-6)


@pytest.mark.parametrize("name", ["gpt-mha", "gpt-gqa_sas", "gpt-super", "vit-mla_sas", "vit-tpa", "llama", "vit"])
@either_implementation
def test_an_ensemble_computes_at_once(name, implementation, record_property):
    models = [Logits(make(name, implementation)) for _ in range(2)]
    inputs = inputs_of(models[0].model)
    weights, buffers = stack_module_state(models)

    def call(weights, buffers):
        return functional_call(models[0], (weights, buffers), (inputs,))

    found = answered(record_property, implementation, lambda: vmap(call)(weights, buffers))
    assert_near(found, torch.stack([model(inputs) for model in models]), 1e-6)


@every_model
@either_implementation
def test_derivatives_forwards(name, implementation, record_property):
    """By `jvp` and by dual numbers."""
    model = make(name, implementation)
    logits, inputs = Logits(model), inputs_of(model)
    weights = {name: parameter.detach() for name, parameter in logits.named_parameters()}
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def call(weights):
        return functional_call(logits, weights, (inputs,))

    def by_duals():
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(weight, direction[name]) for name, weight in weights.items()}
            return forward_ad.unpack_dual(call(duals)).tangent

    step, bound = step_and_bound(name, implementation)
    with torch.no_grad():
        along = list(direction.values())
        (expected,) = difference(lambda: [logits(inputs)], model, along, step)
    for compute in (lambda: jvp(call, (weights,), (direction,))[1], by_duals):
        found = answered(record_property, implementation, compute)
        if found is not None:
            assert_near(found, expected, bound)


@pytest.mark.parametrize("name", ["gpt-mha_sas", "gpt-super", "vit-mla_sas", "vit-mha", "llama", "vit"])
def test_jacobians(name):
    """By what goes in, both ways, and Hessians as the Jacobian of the gradient."""
    model = make(name, "eager")
    inputs = inputs_of(model, batch=1, length=3)
    inputs = model.get_input_embeddings()(inputs).detach() if takes_tokens(model) else inputs

    def call(inputs):
        if takes_tokens(model):
            return model(inputs_embeds=inputs, use_cache=False).logits[0, -1]
        return model(inputs).logits[0]

    leaf = inputs.clone().requires_grad_()
    rows = [torch.autograd.grad(logit, leaf, retain_graph=True)[0] for logit in call(leaf)]
    assert_near(jacrev(call)(inputs), torch.stack(rows), 1e-5)
    assert_near(jacfwd(call)(inputs), torch.stack(rows), 1e-5)

    first = inputs.flatten()[:4].clone()

    def loss(first):
        return loss_of(call(torch.cat((first, inputs.flatten()[4:])).view_as(inputs)))

    first.requires_grad_()
    (slope,) = torch.autograd.grad(loss(first), first, create_graph=True)
    hessian = [torch.autograd.grad(entry, first, retain_graph=True)[0] for entry in slope]
    assert_near(jacfwd(jacrev(loss))(first.detach()), torch.stack(hessian), 1e-5)


@mostly_sdpa
@pytest.mark.filterwarnings("ignore")  # what a trace takes for constants, and that it is of the past
def test_a_trace_is_saved_and_computes_the_same(name, implementation, record_property):
    logits, saved = Logits(make(name, implementation)), io.BytesIO()
    inputs, others = inputs_of(logits.model), inputs_of(logits.model)
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(logits, (inputs,), check_trace=False), saved)
        saved.seek(0)
        loaded = torch.jit.load(saved)
        assert_near(loaded(inputs), logits(inputs), 1e-6)
        assert_near(loaded(others), logits(others), 1e-6)
        for batch, length in ((5, 9), (1, 2)):
            inputs = inputs_of(logits.model, batch, length)
            assert_near(loaded(inputs), logits(inputs), 1e-6)
    record_property("answer", "right")


class MaskedLogits(Logits):
    def forward(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(inputs, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("name", ["gpt-mha", "gpt-gqa_sas", "gpt-mla_sas", "gpt-efficient_sas", "gpt-super", "llama"])
@pytest.mark.filterwarnings("ignore")
def test_a_trace_keeps_a_mask_that_hid_nothing(name, record_property):
    """OpenVINO and TorchScript get what happened once: what is skipped for these numbers is skipped for all."""
    logits, inputs = MaskedLogits(make(name)), token_ids(2, 5)
    padded, mask = left_padded(9, 4, 6)
    with torch.no_grad():
        traced = torch.jit.trace(logits, (inputs, torch.ones_like(inputs)), check_trace=False)
        seen = mask.bool()
        assert_near(traced(padded, mask)[seen], logits(padded, mask)[seen], 1e-6)
    record_property("answer", "right")


@mostly_sdpa
def test_an_export_takes_other_sizes(name, implementation, record_property):
    """Any number of rows, and of tokens."""
    logits = Logits(make(name, implementation))
    sizes = {0: torch.export.Dim.DYNAMIC}
    if takes_tokens(logits.model):
        sizes[1] = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        exported = torch.export.export(logits, (inputs_of(logits.model),), dynamic_shapes=(sizes,)).module()
        for batch, length in ((5, 9), (3, 2)):
            inputs = inputs_of(logits.model, batch, length)
            assert_near(exported(inputs), logits(inputs), 1e-6)
    record_property("answer", "right")


@pytest.mark.parametrize("name", ["gpt-gqa_sas", "vit-mla_sas", "llama", "vit"])
def test_a_compiled_step_is_the_same(name, record_property):
    torch._dynamo.reset()
    logits = Logits(make(name)).train()
    inputs, parameters = inputs_of(logits.model), list(logits.parameters())
    expected = torch.autograd.grad(loss_of(logits(inputs)), parameters, materialize_grads=True)
    compiled = torch.compile(logits, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(loss_of(compiled(inputs)), parameters, materialize_grads=True)
    assert_near(found, expected, 1e-6)
    record_property("answer", "right")


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def functions_of(tensor: torch.Tensor) -> list:
    """The nodes of the graph that made it."""
    found, to_see = {}, [tensor.grad_fn]
    while to_see:
        node = to_see.pop()
        if node is not None and node not in found:
            found[node] = True
            to_see += [following for following, _ in node.next_functions]
    return list(found)


@every_model
def test_eager_is_written_out(name):
    """PyTorch's own operations alone, forwards and backwards."""
    model = make(name, "eager").train()
    inputs = inputs_of(model)
    with Operations() as forwards:
        loss = loss_of(Logits(model)(inputs))
    own = [type(node).__name__ for node in functions_of(loss) if isinstance(node, BackwardCFunction)]
    with torch.no_grad(), Operations() as without_graph:
        Logits(model)(inputs)
    fused = [name for name in forwards.names | without_graph.names if "attention" in name]
    assert own + fused == []


@pytest.fixture
def counted():
    """An attention function of a user's own, as kernels are, and the list of its calls."""
    calls = []

    def attention(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("counted", attention)
    yield calls
    del AttentionInterface._global_mapping["counted"]


@pytest.mark.parametrize(
    "name", ["gpt-mha", "gpt-mha_sas", "gpt-heads_only", "gpt-gqa_sas", "vit-mla_sas", "llama", "vit"]
)
def test_an_attention_function_runs_once_in_a_step(name, counted):
    """Recomputation is of the simulation: kernels are what costs."""
    model = make(name).train()
    inputs, parameters = inputs_of(model), list(model.parameters())
    expected = torch.autograd.grad(loss_of(Logits(model)(inputs)), parameters, materialize_grads=True)
    model.set_attn_implementation("counted")
    found = torch.autograd.grad(loss_of(Logits(model)(inputs)), parameters, materialize_grads=True)
    assert len(counted) == 1
    assert_near(found, expected, 1e-9)


@pytest.mark.parametrize("name", ["gpt-mha_sas", "gpt-sas_k3", "gpt-features_only", "vit-mla_sas"])
def test_watches_of_all_modules_see_every_part(name):
    """As profilers set them: a hook for every module there is."""
    model = make(name).train()
    seen, inputs = [], inputs_of(model)
    handle = register_module_forward_hook(lambda module, given, output: seen.append(module))
    try:
        loss_of(Logits(model)(inputs))
    finally:
        handle.remove()
    assert [name for name, part in parts_of(model).items() if part not in seen] == []


def turned(given, *_):
    """The other way round: the features of a tensor, or of the first of a part's arguments."""
    return (turned(given[0]), *given[1:]) if isinstance(given, tuple) else given.flip(-1)


class Turned(nn.Module):
    """A wrapper as adapters make them."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, *given):
        return turned(self.part(*given))


@pytest.mark.parametrize(
    "name", ["gpt-super", "gpt-mha_sas", "gpt-mla_sas", "gpt-sas_k3", "gpt-heads_only", "vit-tpa_sas"]
)
def test_what_is_put_on_or_for_a_part_takes_effect(name):
    """Hooks, wrappers and other forwards, in a step of training and without gradients: as where all parts are watched,
    so that nothing can run as one."""
    model = make(name).train()
    logits, inputs, parameters = Logits(model), inputs_of(model), list(model.parameters())
    parts, attention = parts_of(model), attention_of(model)

    def step():
        with torch.no_grad():
            without_graph = logits(inputs)
        output = logits(inputs)
        gradient = torch.autograd.grad(loss_of(output), parameters, materialize_grads=True)
        return without_graph, output.detach(), torch.cat([part.flatten() for part in gradient])

    def check(what: str) -> None:
        found = step()
        assert max((a - b).abs().max() for a, b in zip(found, before, strict=True)) > 1e-7, what
        watches = [part.register_forward_hook(lambda *_: None) for part in parts.values()]
        for one, expected in zip(found, step(), strict=True):
            assert_near(one, expected, 1e-9)
        for watch in watches:
            watch.remove()

    before = step()
    for part_name, part in parts.items():
        hooks = (
            (part.register_forward_hook, lambda _, given, output: turned(output)),
            (part.register_forward_pre_hook, lambda _, given: turned(given)),
            (
                part.register_full_backward_hook,
                lambda _, given, __: tuple(
                    2 * one if torch.is_tensor(one) and one.is_floating_point() else one for one in given
                ),
            ),
        )
        for register, hook in hooks:
            handle = register(hook)
            check(f"{register.__name__} on {part_name}")
            handle.remove()
        parent, _, child = part_name.rpartition(".")
        setattr(attention.get_submodule(parent), child, Turned(part))
        check(f"another module for {part_name}")
        setattr(attention.get_submodule(parent), child, part)
        part.forward = lambda *given, forward=part.forward: turned(forward(*given))
        check(f"another forward of {part_name}")
        del part.forward
    assert_near(step(), before, 1e-9)
