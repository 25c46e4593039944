"""What each variant is, and that it costs what it promises."""

import pytest
import torch

from sas_hf import SASEncoderConfig, SASGPTForCausalLM
from sas_hf.capacity.models import HIDDEN_SIZE, Reader, config_of, make_model
from sas_hf.capacity.tasks import TASKS
from sas_hf.capacity.training import try_out
from sas_hf.capacity.variants import Variant, choose_variants, count_cost, variants_of


PLACES = [("fetch", 4), ("nearest", 2), ("mqar", 8)]


@pytest.fixture(scope="module")
def everything():
    return {place: variants_of(TASKS[place[0]], place[1]) for place in PLACES}


def cost(everything, place, name):
    return count_cost(TASKS[place[0]], place[1], everything[place][name])


@pytest.mark.parametrize("place", PLACES)
def test_models_are_what_their_names_say(everything, place):
    task, level = TASKS[place[0]], place[1]
    batch = task.make_batch(level, 3, torch.Generator().manual_seed(0))
    for name, variant in everything[place].items():
        config = config_of(task, level, variant.fields)
        heads = config.num_simulated_heads or config.num_attention_heads
        assert (heads, config.simulates) == (variant.heads, name.startswith("sas")), name
        model = make_model(task, level, config)
        assert type(model) is (Reader if task.vocab_size is None else SASGPTForCausalLM)
        output = model(**batch)
        output.loss.backward()
        assert all(weight.grad is not None for weight in model.parameters()), name
        numbers = sum(weight.numel() for weight in model.parameters())
        assert numbers == count_cost(task, level, variant).parameters
    if task.name != "nearest":
        wide, narrow = (everything[place][name].fields for name in ("real-2to4", "mha-4"))
        assert wide["head_dim"] == 2 * narrow["head_dim"] == HIDDEN_SIZE // 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", ["parameters", "operations"])
def test_the_wider_rivals_cost_what_simulation_does(everything, place, what):
    """Nothing above, and not a unit of the feed-forward block below."""
    task, level = TASKS[place[0]], place[1]
    goal = max(getattr(cost(everything, place, name), what) for name in everything[place] if "sas-2to4" in name)
    rival = everything[place][f"{what}-2to4"]
    spent = getattr(count_cost(task, level, rival), what)
    config = config_of(task, level, rival.fields)
    wider = rival.fields | {"intermediate_size": config.intermediate_size + 1}
    more = getattr(count_cost(task, level, Variant("", 2, 2, what, wider)), what)
    assert spent <= goal < more and config.num_attention_heads == 2
    assert (goal - spent) / goal < 0.01
    assert config.head_dim >= everything[place]["mha-2"].fields["head_dim"]


def test_heads_that_share_the_width_cost_the_same(everything):
    for place in (("fetch", 4), ("mqar", 8)):
        costs = {cost(everything, place, f"mha-{heads}") for heads in (1, 2, 4, 8)}
        assert len(costs) == 1


def test_parameters_by_hand(everything):
    c, width, inputs = HIDDEN_SIZE, 4 * HIDDEN_SIZE, 4
    around = (inputs + 1) * c + c + 2 * c + (c + 1) * width + (width + 1)
    plain = around + 4 * (c * c + c)
    assert cost(everything, ("fetch", 4), "mha-2").parameters == plain
    heads = 3 * ((2 * 4 + 4) + (4 * 4 + 4))  # of queries, keys and values
    assert cost(everything, ("fetch", 4), "sas-2to4").parameters == plain + heads
    assert cost(everything, ("fetch", 4), "sas-2to4-id").parameters == plain + heads
    features = (16 * 32 + 32) + (32 * 32 + 32)
    assert cost(everything, ("fetch", 4), "sas-2to4-features").parameters == plain + heads + 2 * features
    assert cost(everything, ("fetch", 4), "sas-2to4-values").parameters == plain + heads + 2 * (16 * 16 + 16)
    assert cost(everything, ("fetch", 4), "sas-2to4-concat").parameters == plain + heads + c * c
    assert cost(everything, ("fetch", 4), "real-2to4").parameters == plain + 4 * c * c + 3 * c


def test_operations_by_hand(everything):
    """Forward, and twice as much backward, but for what has no gradient: the inputs of the first maps."""
    c, width, inputs, length = HIDDEN_SIZE, 4 * HIDDEN_SIZE, 4, 16
    attention = 2 * (2 * c * c + 2 * length * c * c + 2 * length * c)  # W^Q and W^O, W^K and W^V, both products
    forward = 2 * length * inputs * c + attention + 2 * c * width + 2 * width
    expected = 3 * forward - 2 * length * inputs * c
    assert cost(everything, ("fetch", 4), "mha-2").operations == expected


def test_the_forms_of_simulation(everything):
    found = {name: variant.fields for name, variant in everything[("nearest", 2)].items()}
    assert found["mha-8"] == {"num_attention_heads": 8, "head_dim": 2} and "real-2to4" not in found
    simulated = {"num_attention_heads": 2, "head_dim": 2, "num_simulated_heads": 4}
    assert found["sas-2to4"] == simulated
    assert found["sas-2to4-features"] == simulated | {"simulated_head_dim": 4}
    linear = simulated | {"simulation_act": "identity"}
    assert found["sas-2to4-id"] == linear and found["sas-2to4-features-id"] == linear | {"simulated_head_dim": 4}
    assert found["sas-2to4-values"] == simulated | {"simulate_value_features": True}
    assert found["sas-2to4-concat"] == simulated | {"head_aggregation": "concat"}
    assert {name for name in found if name.startswith("sas")} >= {"sas-1to2", "sas-1to4", "sas-2to8", "sas-4to8"}


def test_what_is_chosen_comes_with_what_it_is_compared_with(everything):
    known = everything[("fetch", 4)]
    assert list(choose_variants(known, ["sas-2to4", "mha-8"])) == ["mha-2", "mha-8", "sas-2to4"]
    assert choose_variants(known, None) == known


def test_a_reader_starts_as_transformers_starts_a_model():
    """And what it is asked for stands at one place: a reader without attention to it errs as chance does."""
    task = TASKS["nearest"]
    config = config_of(task, 2, {"num_attention_heads": 2, "head_dim": 2})
    assert isinstance(config, SASEncoderConfig)
    model = make_model(task, 2, config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(HIDDEN_SIZE**-0.5, rel=0.35), name
        elif name.endswith("bias"):
            assert not weight.any(), name
    torch.nn.init.zeros_(model.down.weight)
    assert try_out(task, 2, model) == try_out(task, 2, model) == pytest.approx(1, abs=1e-3)
