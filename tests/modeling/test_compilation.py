"""`compile_simulation`: the same numbers by few graphs, and the plain way where compiling fails."""

import pytest
import torch
from accelerate.utils import compile_regions
from helpers import assert_all_close, gpt, gradients, token_ids

from sas_hf.modeling import compilation, fused_simulation
from sas_hf.modeling.compilation import Compiled
from sas_hf.modeling.fused_simulation import simulate_at_once


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are made, by PyTorch's backend that runs them as they are."""
    torch._dynamo.reset()
    compiled, made = Compiled(simulate_at_once, backend="aot_eager"), []
    compile_both_passes = compiled._compile_both_passes

    def counted(graph, inputs):
        made.append(graph)
        return compile_both_passes(graph, inputs)

    monkeypatch.setattr(compiled, "_compile_both_passes", counted)
    monkeypatch.setattr(fused_simulation, "simulate_compiled", compiled)
    return made


def step(model, ids, direction) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    (logits * direction).sum().backward()
    return {"logits": logits.detach()} | {name: gradient.clone() for name, gradient in gradients(model).items()}


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("variant", ["sas", "sas_k5_gqa"])
def test_a_compiled_simulation_computes_the_same(variant, recompute, graphs):
    """Layers and sides that are alike share a graph: one without gradients, and one with."""
    model = gpt(variant, recompute_simulation=recompute, num_hidden_layers=4).double().train()
    ids, direction = token_ids(2, 14), torch.randn(2, 14, 67, dtype=torch.float64)
    expected = step(model, ids, direction)
    model.config.compile_simulation = True
    assert_all_close(step(model, ids, direction), expected, 1e-5)
    sides = 2 if variant == "sas" else 3  # queries and keys of as many heads are alike
    assert len(graphs) == sides * (2 if recompute else 1)
    step(model, ids, direction)
    assert len(graphs) == sides * (2 if recompute else 1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected["logits"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["mha", "sas", "sas_learned", "mla_sas"])
def test_layers_share_what_regional_compilation_makes(variant):
    """Accelerate's, in training: more graphs than PyTorch keeps would leave the rest of the layers uncompiled."""
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model = gpt(variant, num_hidden_layers=4).double().train()
    ids, direction = token_ids(2, 14), torch.randn(2, 14, 67, dtype=torch.float64)
    expected = step(model, ids, direction)
    regions = compile_regions(model, fullgraph=True, dynamic=False, backend=backend)
    found = step(regions, ids, direction)
    assert_all_close({name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}, expected, 1e-9)
    alike = [graph for graph in made if "attention" in graph.code]
    assert len(alike) == 1


def test_where_compiling_fails_it_runs_uncompiled(monkeypatch):
    """With one warning; what was to be compiled is not tried again."""
    torch._dynamo.reset()
    monkeypatch.setattr(fused_simulation, "simulate_compiled", Compiled(simulate_at_once, backend="of no such name"))
    warnings = []
    monkeypatch.setattr(compilation.logger, "warning", warnings.append)
    model = gpt("sas").double().train()
    ids, direction = token_ids(2, 14), torch.randn(2, 14, 67, dtype=torch.float64)
    expected = step(model, ids, direction)
    model.config.compile_simulation = True
    assert_all_close(step(model, ids, direction), expected, 1e-9)
    assert len(warnings) == 1
    assert "of no such name" in warnings[0]


def test_what_is_no_fault_of_the_compiler_is_raised():
    torch._dynamo.reset()
    compiled = Compiled(torch.matmul, backend="aot_eager")
    with pytest.raises(RuntimeError):
        compiled(torch.ones(2, 3), torch.ones(2, 3))
    assert not compiled.failed


def test_by_inductor():
    torch._dynamo.reset()
    model = gpt("sas", num_hidden_layers=1).train()
    ids, direction = token_ids(2, 14), torch.randn(2, 14, 67)
    expected = step(model, ids, direction)
    model.config.compile_simulation = True
    assert_all_close(step(model, ids, direction), expected, 1e-4)
    assert not fused_simulation.simulate_compiled.failed
