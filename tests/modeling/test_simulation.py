"""The simulation against Appendix L of the paper, its parameter counts, and how it starts."""

import math

import pytest
import torch
from helpers import GPT_VARIANTS, gpt_config
from torch import nn
from torch.nn import functional as F

from sas_hf import SASGPTConfig, SASGPTForCausalLM
from sas_hf.modeling.attention import SASAttention
from sas_hf.modeling.kinds import make_attention
from sas_hf.modeling.simulation import aggregate_heads


class Residual(nn.Module):
    """`x + process(ReLU(x))`: Appendix L's ResidualCNN and ResidualMLP."""

    def __init__(self, process: nn.Module):
        super().__init__()
        self.process = process

    def forward(self, x):
        return self.process(F.relu(x)) + x


class AppendixL(nn.Module):
    """The paper's module, with `sas_k` and `sas_v` given H_kv input channels."""

    def __init__(self, heads, kv_heads, simulated_heads, dim, simulated_dim, kernel):
        super().__init__()
        self.heads, self.simulated_heads = heads, simulated_heads

        def convolutions(inputs):
            padding = (kernel - 1) // 2
            return (
                nn.Conv1d(inputs, simulated_heads, kernel, 1, padding),
                Residual(nn.Conv1d(simulated_heads, simulated_heads, kernel, 1, padding)),
            )

        def linears():
            return nn.Linear(dim, simulated_dim), Residual(nn.Linear(simulated_dim, simulated_dim))

        self.sas_q = nn.Sequential(*convolutions(heads), *linears())
        self.sas_k = nn.Sequential(*convolutions(kv_heads), *linears())
        self.sas_v = nn.Sequential(*convolutions(kv_heads))
        self.output_dense = nn.Linear(heads * dim, heads * dim)

    def forward(self, query, key, value):
        batch, length = query.shape[:2]

        def simulate(module, x):
            return module(x.reshape(batch * length, *x.shape[2:])).reshape(batch, length, self.simulated_heads, -1)

        query, key, value = simulate(self.sas_q, query), simulate(self.sas_k, key), simulate(self.sas_v, value)
        attention = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        attention = attention.transpose(1, 2).reshape(batch, length, self.simulated_heads // self.heads, -1)
        return self.output_dense(attention).mean(dim=-2)


# H, H_kv, Ĥ, D, D̂, κ
SHAPES = [
    (4, 4, 12, 8, 12, 1),
    (4, 4, 12, 8, 12, 3),
    (4, 2, 12, 8, 12, 5),
    (4, 1, 8, 8, 12, 3),
    (4, 4, 4, 8, 12, 1),  # Ĥ = H
    (4, 2, 8, 8, 8, 3),  # D̂ = D
    (4, 4, 4, 8, 8, 5),  # both
    (6, 3, 18, 4, 6, 7),
    (2, 1, 2, 6, 6, 5),
    (3, 3, 9, 10, 15, 1),
    (8, 2, 16, 4, 6, 3),
    (1, 1, 3, 8, 12, 7),
    (5, 5, 25, 2, 10, 1),
    (12, 12, 36, 64, 96, 1),  # 125M
]


@pytest.fixture(params=SHAPES, ids=str)
def oracle_and_layer(request):
    """Appendix L and our attention layer in float64, the former's weights copied over in the order they act."""
    heads, kv_heads, simulated_heads, dim, simulated_dim, kernel = request.param
    oracle = AppendixL(*request.param)
    config = SASGPTConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_simulated_heads=simulated_heads,
        simulated_head_dim=simulated_dim,
        simulation_kernel_size=kernel,
        position_embedding_type="learned",
        attention_bias=True,
        attn_implementation="sdpa",
    )
    layer = make_attention(config, layer_idx=0)
    pairs = list(oracle_to_layer(oracle, layer))
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.mul_(2)  # large enough for scores far from uniform
            ours.copy_(theirs)
    return oracle.double(), layer.double()


def oracle_to_layer(oracle, layer):
    """Pairs of parameters of the two modules."""
    for theirs, ours in (
        (oracle.sas_q, layer.q_simulation),
        (oracle.sas_k, layer.k_simulation),
        (oracle.sas_v, layer.v_simulation),
        (oracle.output_dense, layer.o_proj),
    ):
        yield from zip(theirs.parameters(), ours.parameters(), strict=True)


def assert_exact(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    scale = max(1.0, *(tensor.abs().max().item() for tensor in expected))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10 * scale, rtol=0)


def test_simulation_equals_appendix_l(oracle_and_layer):
    oracle, layer = oracle_and_layer
    heads, dim = oracle.heads, layer.head_dim
    kv_heads = layer.k_proj.out_features // dim
    inputs = [torch.randn(2, 7, n, dim, dtype=torch.float64) for n in (heads, kv_heads, kv_heads)]
    theirs = [tensor.clone().requires_grad_() for tensor in inputs]
    ours = [tensor.clone().requires_grad_() for tensor in inputs]

    expected = oracle(*theirs)
    query, key, value = (
        simulation(x).transpose(1, 2)
        for simulation, x in zip((layer.q_simulation, layer.k_simulation, layer.v_simulation), ours, strict=True)
    )
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=layer.scaling)
    output = F.linear(
        aggregate_heads(output.transpose(1, 2), output.shape[1] // heads), layer.o_proj.weight, layer.o_proj.bias
    )
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)

    direction = torch.randn_like(expected)
    expected.backward(direction)
    output.backward(direction)
    pairs = list(oracle_to_layer(oracle, layer))
    assert_exact(
        [tensor.grad for tensor in ours] + [parameter.grad for _, parameter in pairs],
        [tensor.grad for tensor in theirs] + [parameter.grad for parameter, _ in pairs],
    )


def test_attention_layer_equals_appendix_l(oracle_and_layer):
    oracle, layer = oracle_and_layer
    hidden = torch.randn(2, 7, layer.q_proj.in_features, dtype=torch.float64)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    parameters = [parameter for projection in projections for parameter in projection.parameters()]

    x = hidden.clone().requires_grad_()
    expected = oracle(*(projection(x).unflatten(-1, (-1, layer.head_dim)) for projection in projections))
    direction = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, [x, *parameters], direction, retain_graph=True)
    expected.backward(direction)

    layer.zero_grad()
    y = hidden.clone().requires_grad_()
    output, _ = layer(y)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    output.backward(direction)
    pairs = list(oracle_to_layer(oracle, layer))
    assert_exact(
        [y.grad] + [parameter.grad for parameter in parameters] + [parameter.grad for _, parameter in pairs],
        [*theirs, *(parameter.grad for parameter, _ in pairs)],
    )


def test_heads_are_aggregated_before_the_output_projection_as_after():
    heads, weight = torch.randn(2, 5, 12, 8, dtype=torch.float64), torch.randn(32, 32, dtype=torch.float64)
    groups = [F.linear(heads[:, :, start : start + 4].flatten(2), weight) for start in (0, 4, 8)]
    torch.testing.assert_close(F.linear(aggregate_heads(heads, 3), weight), sum(groups) / 3)


def meta_model(**fields) -> SASGPTForCausalLM:
    with torch.device("meta"):
        return SASGPTForCausalLM(SASGPTConfig(**fields))


@pytest.mark.parametrize(
    ("size", "layers", "a_layer"),
    [((768, 12, 12, 2048), 12, 35_904), ((1024, 16, 24, 2730), 24, 39_936)],
    ids=["125M", "350M"],
)
def test_simulation_parameters_are_the_papers(size, layers, a_layer):
    hidden_size, heads, num_layers, width = size
    model = meta_model(
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_hidden_layers=num_layers,
        intermediate_size=width,
        num_simulated_heads=3 * heads,
        simulated_head_dim=96,
    )
    counts = [
        sum(p.numel() for name, p in layer.named_parameters() if "_simulation." in name and name.endswith("weight"))
        for layer in model.model.layers
    ]
    assert counts == [a_layer] * layers
    if layers == 12:
        assert sum(counts) == 430_848


@pytest.mark.parametrize(
    ("hidden_size", "heads", "layers", "millions"),
    [(768, 12, 12, "123.57"), (1024, 16, 24, "353.45"), (1280, 20, 36, "772.1"), (1600, 25, 48, "1554.9")],
)
def test_backbone_parameters_are_the_papers(hidden_size, heads, layers, millions):
    """The papers' totals leave the weights of the norms out."""
    model = meta_model(
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=8 * hidden_size // 3,
    )
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1) / 1e6
    assert f"{count:.{len(millions.split('.')[1])}f}" == millions


@pytest.mark.parametrize(
    ("variant", "modules"),
    [
        ("mha", set()),
        ("sas", {"q.heads", "k.heads", "v.heads", "q.features", "k.features"}),
        ("head_only", {"q.heads", "k.heads", "v.heads"}),
        ("feature_only", {"q.features", "k.features"}),
    ],
)
def test_ablations_hold_only_what_they_use(variant, modules):
    layer = make_attention(gpt_config(variant), layer_idx=0)
    sides = {"q": layer.q_simulation, "k": layer.k_simulation, "v": layer.v_simulation}
    assert {f"{side}.{name}" for side, module in sides.items() for name, _ in module.named_children()} == modules


def test_linear_ablation_is_linear_and_the_simulation_is_not():
    x, y = torch.randn(2, 2, 3, 4, 8, dtype=torch.float64)
    for variant, linear in (("linear", True), ("sas", False)):
        simulation = make_attention(gpt_config(variant), layer_idx=0).double().q_simulation
        deviation = simulation(x + y) + simulation(torch.zeros_like(x)) - simulation(x) - simulation(y)
        assert (deviation.abs().max() < 1e-12) == linear


def test_kernel_size_one_treats_features_alone():
    """κ = 1 is the MLP of equations 2-4: a change of one feature stays there, κ = 5 spreads it."""
    x = torch.randn(1, 1, 4, 8)
    other = x.clone()
    other[..., 3] += 1
    for kernel, reached in ((1, {3}), (3, {1, 2, 3, 4, 5}), (5, set(range(8)))):
        heads = make_attention(gpt_config("sas", simulation_kernel_size=kernel), layer_idx=0).q_simulation.heads
        changed = (heads(x) != heads(other)).any(dim=2).flatten()
        assert set(changed.nonzero().flatten().tolist()) == reached


START = {"num_attention_heads": 8, "hidden_size": 256, "num_simulated_heads": 24, "simulated_head_dim": 48}


def tiled(heads: int, kv_heads: int, simulated_heads: int, kernel: int) -> torch.Tensor:
    weight = torch.zeros(simulated_heads, kv_heads, kernel)
    for j in range(simulated_heads):
        weight[j, (j % heads) // (heads // kv_heads), (kernel - 1) // 2] = 1
    return weight


def assert_noise(noise: torch.Tensor, scale: float) -> None:
    """Mean zero and standard deviation `scale`, within four standard errors."""
    count = noise.numel()
    assert noise.std().item() == pytest.approx(scale, rel=4 / math.sqrt(2 * count))
    assert abs(noise.mean().item()) < 4 * scale / math.sqrt(count)


def assert_near_identity_start(layer: SASAttention, config: SASGPTConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    simulated_heads, kernel = config.num_simulated_heads, config.simulation_kernel_size
    groups = simulated_heads // heads
    for side, inputs in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        simulation = getattr(layer, f"{side}_simulation").heads
        noise = simulation.expansion.weight - tiled(heads, inputs, simulated_heads, kernel)
        scale = 0.5 / math.sqrt(inputs * kernel)
        if side == "v":  # deviations that cancel in the aggregation's mean
            mean = noise.unflatten(0, (groups, heads)).mean(dim=0)
            torch.testing.assert_close(mean, torch.zeros_like(mean))
            scale *= math.sqrt(1 - 1 / groups)
        assert_noise(noise, scale)
        assert_noise(simulation.residual.weight, config.initializer_range)
        assert not simulation.expansion.bias.any() and not simulation.residual.bias.any()
    for side in ("q", "k"):
        simulation = getattr(layer, f"{side}_simulation").features
        noise = simulation.expansion.weight - torch.eye(*simulation.expansion.weight.shape)
        scale = 0.5 / math.sqrt(config.head_dim)
        assert_noise(noise[: config.head_dim], scale)
        assert_noise(noise[config.head_dim :], scale)  # the extra features are noise alone
        assert_noise(simulation.residual.weight, config.initializer_range)
        assert not simulation.expansion.bias.any() and not simulation.residual.bias.any()


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_near_identity_start(kernel, kv_heads):
    config = gpt_config(
        "mha", **START, num_key_value_heads=kv_heads, simulation_kernel_size=kernel, initializer_range=0.02
    )
    for layer in SASGPTForCausalLM(config).model.layers:
        assert_near_identity_start(layer.self_attn, config)


def assert_pytorch_start(layer: SASAttention) -> None:
    maps = [m for m in layer.modules() if "simulation" in type(m).__module__ and isinstance(m, nn.Conv1d | nn.Linear)]
    assert len(maps) == 10
    for module in maps:
        bound = 1 / math.sqrt(module.weight[0].numel())
        for parameter, tolerance in ((module.weight, 0.15), (module.bias, 0.5)):
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=tolerance)


def test_pytorch_start():
    """What Appendix L gets, and what the base class would replace by N(0, `initializer_range`) and zero."""
    config = gpt_config("mha", **START, simulation_init="pytorch", initializer_range=0.02)
    for layer in SASGPTForCausalLM(config).model.layers:
        assert_pytorch_start(layer.self_attn)


@pytest.mark.parametrize("method", ["near_identity", "pytorch"])
def test_start_survives_loading_without_simulation_weights(tmp_path, method):
    config = gpt_config("mha", **START, simulation_init=method, initializer_range=0.02)
    model = SASGPTForCausalLM(config)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "_simulation." not in name}
    model.save_pretrained(tmp_path, state_dict=dict(kept))  # which empties it

    loaded, report = SASGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name, _ in loaded.named_parameters()} - set(kept) == set(report["missing_keys"])
    for layer in loaded.model.layers:
        if method == "pytorch":
            assert_pytorch_start(layer.self_attn)
        else:
            assert_near_identity_start(layer.self_attn, config)
    for name, tensor in loaded.state_dict().items():
        if name in kept:
            assert torch.equal(tensor, kept[name])


def test_loaded_simulation_weights_are_not_started_anew(tmp_path):
    """A checkpoint that lacks one simulation weight keeps the others to the bit."""
    model = SASGPTForCausalLM(gpt_config("sas"))
    missing = "model.layers.1.self_attn.q_simulation.features.expansion.weight"
    kept = {name: tensor for name, tensor in model.state_dict().items() if name != missing}
    model.save_pretrained(tmp_path, state_dict=dict(kept))  # which empties it
    loaded = SASGPTForCausalLM.from_pretrained(tmp_path).state_dict()
    assert not torch.equal(loaded[missing], model.state_dict()[missing])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())


def test_scores_start_far_from_uniform():
    """The base class's start would make simulated attention uniform; ours keeps the spread of the base heads."""
    spread = {}
    for variant in ("mha", "sas"):
        torch.manual_seed(1)
        config = gpt_config(variant, initializer_range=0.02, attn_implementation="eager")
        model = SASGPTForCausalLM(config).eval()
        weights = model(torch.arange(1, 33)[None], output_attentions=True).attentions[0]
        spread[variant] = weights[:, :, -1].std().item()
    assert spread["sas"] > 0.5 * spread["mha"]


def test_every_variant_is_covered():
    """The variants the other tests run over reach all four kernel sizes."""
    kernels = {gpt_config(variant).simulation_kernel_size for variant in GPT_VARIANTS}
    assert kernels == {1, 3, 5, 7}
