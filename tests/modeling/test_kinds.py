"""Every attention kind against plain references: outputs and gradients, counts, caches, and token mixing."""

import ast
import re
from pathlib import Path

import plain_references
import pytest
import test_cross_attention
import torch
from helpers import GPT_BASE, SAS, VIT_BASE, images, returned_cache, scramble
from plain_references import attention
from transformers import DynamicCache, StaticCache

from sas_hf import SASGPTConfig, SASGPTForCausalLM, SASGPTModel, SASViTConfig, SASViTForImageClassification
from sas_hf.configurations import NAMED_CONFIGS, named_config
from sas_hf.hub.info import cache_numbers_per_token, describe, equation_24
from sas_hf.modeling import configuration_attention, kinds, parallel_plans


BASE = GPT_BASE | {"hidden_size": 48, "q_rank": 3, "token_mixing_init": "normal"}
KINDS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"attention_type": "mqa"},
    "mla": {"attention_type": "mla", "q_lora_rank": 20, "kv_lora_rank": 14, "qk_rope_head_dim": 4, "v_head_dim": 10},
    "tpa": {"attention_type": "tpa"},
    "optimised": {"attention_type": "optimised"},
    "efficient": {"attention_type": "efficient"},
    "super": {"attention_type": "super"},
}
SIMULATIONS = {
    "plain": {},
    "simulated": {"num_simulated_heads": 12, "simulated_head_dim": 20, "simulation_kernel_size": 3},
    "heads": {"num_simulated_heads": 8},
    "features": {"simulated_head_dim": 18},
}
CASES = [(kind, simulation) for kind in KINDS for simulation in SIMULATIONS if kind != "super"]
CASES.append(("super", "plain"))
PLAIN_AND_SIMULATED = [case for case in CASES if case[1] in ("plain", "simulated")]
CACHED = [(*case, form) for case in PLAIN_AND_SIMULATED for form in ("expanded", "base")[: 1 + (case[1] != "plain")]]


def config_of(kind: str, simulation: str = "plain", **fields) -> SASGPTConfig:
    return SASGPTConfig(**BASE | KINDS[kind] | SIMULATIONS[simulation] | fields)


def model_of(*args, model_class=SASGPTForCausalLM, **fields):
    return scramble(model_class(config_of(*args, **fields)))


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize(("kind", "simulation"), CASES)
def test_output_and_gradients_equal_the_reference(kind, simulation, bias):
    """One attention layer in float64, through the decoder's own masks and rotations."""
    model = model_of(kind, simulation, attention_bias=bias, num_hidden_layers=1, model_class=SASGPTModel).double()
    layer, length = model.layers[0].self_attn, 11
    if hasattr(layer, "q_a_layernorm"):  # RMSNorm computes in float32 whatever the type: compare without it
        exact_norms(layer)
    x = torch.randn(1, length, 48, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(length, 48, dtype=torch.float64)
    seen = {}
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((x,), kwargs), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, output: seen.update(output=output[0]))
    # Sixty-four bit angles, as the reference has them.
    model.rotary_emb.forward = exact_rotary(model.rotary_emb)
    model(inputs_embeds=torch.zeros(1, length, 48, dtype=torch.float64), use_cache=False)
    actual = torch.autograd.grad((seen["output"][0] * direction).sum(), [x, *layer.parameters()])

    weights = dict(layer.named_parameters())
    expected_output = attention(weights, x[0], layer.config)
    expected = torch.autograd.grad((expected_output * direction).sum(), [x, *weights.values()])
    torch.testing.assert_close(seen["output"][0], expected_output, rtol=0, atol=1e-10 * scale_of([expected_output]))
    for name, a, b in zip(["x", *weights], actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * scale_of(expected), msg=lambda m, n=name: f"{n}: {m}")


def scale_of(tensors) -> float:
    return max(1.0, *(tensor.abs().max().item() for tensor in tensors))


def exact_norms(layer):
    for norm in (layer.q_a_layernorm, layer.kv_a_layernorm):
        norm.forward = lambda x, n=norm: x / (x.pow(2).mean(-1, keepdim=True) + n.variance_epsilon).sqrt() * n.weight


def exact_rotary(rotary):
    width = rotary.config.head_dim
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def forward(x, position_ids):
        angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    return forward


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("kind", "simulation", "form"), CACHED)
def test_cached_logits_equal_uncached_ones_with_left_padding(kind, simulation, form, cache):
    model = model_of(kind, simulation, simulation_cache=form)
    ids, mask = torch.randint(1, 67, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids[:1, 4:], use_cache=False).logits[0]
        together = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(together[0, 4:], alone, rtol=0, atol=2e-4)
        past = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
        steps = [
            model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                cache=past,
            ).logits
            for start, stop in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 11), (11, 12))
        ]
    stepwise = torch.cat(steps, dim=1)
    torch.testing.assert_close(stepwise[1], together[1], rtol=0, atol=2e-4)
    torch.testing.assert_close(stepwise[0, 4:], together[0, 4:], rtol=0, atol=2e-4)


# Spec, section 2: numbers per token and layer, from C, H, H_kv, D and the ranks.
FORMULAS = {
    "mha": lambda c: 2 * c.num_attention_heads * c.head_dim,
    "gqa": lambda c: 2 * c.num_key_value_heads * c.head_dim,
    "mqa": lambda c: 2 * c.head_dim,
    "mla": lambda c: c.kv_lora_rank + c.qk_rope_head_dim,
    "tpa": lambda c: (c.k_rank + c.v_rank) * (c.num_attention_heads + c.head_dim),
    "optimised": lambda c: 2 * c.hidden_size,
    "efficient": lambda c: c.hidden_size,
    "super": lambda c: 2 * c.hidden_size,
}


@pytest.mark.parametrize(("kind", "simulation"), CASES)
def test_cached_numbers_are_the_formulas_and_what_is_really_cached(kind, simulation):
    for form in ("base", "expanded"):
        model = model_of(kind, simulation, simulation_cache=form)
        config = model.config
        expected = FORMULAS[kind](config)
        if config.simulates and form == "expanded":
            heads = config.num_simulated_heads or config.num_key_value_heads
            value_width = config.v_head_dim if kind == "mla" else config.head_dim
            expected = heads * ((config.simulated_head_dim or config.query_head_dim) + value_width)
        assert cache_numbers_per_token(config) == expected
        layer = returned_cache(model(torch.ones(1, 7, dtype=torch.long), use_cache=True)).layers[0]
        assert (layer.keys.numel() + layer.values.numel()) / 7 == expected


# Spec, section 2 (weights of a layer, without biases and norms) and section 3 (with biases).
LAYER_WEIGHTS = {
    "mha": (2_359_296, 4_194_304),
    "mqa": (2_359_296, 4_194_304),
    "gqa": (2_359_296, 4_194_304),
    "mla": (2_318_336, 4_210_688),
    "tpa": (2_537_472, 4_292_608),
    "sas": (2_359_296 + 35_904, 4_194_304 + 39_936),
}
LAYER_PARAMETERS = {
    (32, 32): (4_224, 3_168, 2_112, 3_168),
    (64, 64): (16_640, 12_480, 8_320, 12_480),
    (128, 64): (66_048, 49_536, 33_024, 37_184),
    (256, 257): (263_168, 197_376, 131_584, 197_890),
    (768, 197): (2_362_368, 1_771_776, 1_181_184, 1_220_190),
    (1024, 64): (4_198_400, 3_148_800, 2_099_200, None),
}


def attention_parameters(config, matrices_only: bool) -> int:
    with torch.device("meta"):
        layer = SASGPTModel(config).layers[0].self_attn
    return sum(p.numel() for p in layer.parameters() if not matrices_only or p.ndim > 1)


@pytest.mark.parametrize(("kind", "counts"), LAYER_WEIGHTS.items())
def test_table_2_of_the_sas_paper(kind, counts):
    for size, count in zip(("125m", "350m"), counts, strict=True):
        assert attention_parameters(named_config(f"{kind}-{size}"), matrices_only=True) == count


@pytest.mark.parametrize(("shape", "counts"), LAYER_PARAMETERS.items())
def test_the_23_cells_of_the_second_paper(shape, counts):
    for kind, count in zip(("mha", "optimised", "efficient", "super"), counts, strict=True):
        if count is None:
            continue
        config = SASGPTConfig(
            vocab_size=8,
            num_hidden_layers=1,
            num_attention_heads=4,
            hidden_size=shape[0],
            max_position_embeddings=shape[1],
            attention_type=kind,
            attention_bias=True,
        )
        assert attention_parameters(config, matrices_only=False) == count


@pytest.mark.parametrize(
    ("size", "millions"), [("125m", "123.57"), ("350m", "353.45"), ("760m", "772.1"), ("1.5b", "1554.9")]
)
def test_backbone_totals_without_norms(size, millions):
    with torch.device("meta"):
        model = SASGPTForCausalLM(named_config(f"mha-{size}"))
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert f"{total / 1e6:.{len(millions.split('.')[1])}f}" == millions


def test_simulation_of_the_125m_model():
    info = describe(named_config("sas-125m"))
    with torch.device("meta"):
        model = SASGPTForCausalLM(named_config("sas-125m"))
    weights = sum(p.numel() for n, p in model.named_parameters() if "_simulation." in n and p.ndim > 1)
    assert weights == 430_848
    assert info.simulation_overhead < 0.01
    assert info.cache_numbers == 5_760


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_named_configurations_are_valid_and_cost_something(name):
    info = describe(named_config(name), context=None if "image_size" in NAMED_CONFIGS[name] else 16)
    assert info.parameters > info.attention_parameters > info.simulation_parameters >= 0
    assert info.forward_flops > 2 * info.attention_parameters
    size = name.rsplit("-", 1)[1]
    expected = {"125m": 0.125e9, "350m": 0.35e9, "760m": 0.76e9, "1.5b": 1.5e9, "2.7b": 2.7e9, "6.7b": 6.7e9}
    expected |= {"10.6b": 10.6e9}
    if size in expected:
        assert abs(info.parameters / expected[size] - 1) < 0.05


def test_an_unknown_name_gets_its_neighbours():
    with pytest.raises(ValueError, match="sas-125m"):
        named_config("sas-125")


def test_equation_24():
    config = SASGPTConfig(hidden_size=64, num_attention_heads=4, attention_type="super", max_position_embeddings=32)
    assert equation_24(config, 32) == 12 * 32 * 64 + 15 * 4 * 32**2
    assert equation_24(named_config("gqa-125m"), 32) is None


@pytest.mark.parametrize("hidden_size", [64, 768])
def test_tensor_products_start_as_large_as_plain_projections(hidden_size):
    """Factors of the usual start would make queries and keys so small that attention is uniform."""
    config = SASGPTConfig(
        hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=8, head_dim=32, vocab_size=8,
        attention_type="tpa", initializer_range=0.02,
    )  # fmt: skip
    layer = SASGPTModel(config).layers[0].self_attn
    inputs = torch.randn(1, 400, hidden_size)
    for heads in (layer.project_queries(inputs), *layer.expand(*layer.project_state(inputs))):
        assert heads.std().item() == pytest.approx(0.02 * hidden_size**0.5, rel=0.2)


class TestSuper:
    def test_no_future_token_reaches_an_earlier_output(self):
        model = model_of("super", model_class=SASGPTModel).double()
        embeds = torch.randn(1, 9, 48, dtype=torch.float64, requires_grad=True)
        hidden_states = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        for position in range(9):
            (gradient,) = torch.autograd.grad(hidden_states[0, position].sum(), embeds, retain_graph=True)
            assert (gradient[0, position + 1 :] == 0).all()
            assert (gradient[0, : position + 1].abs().sum(-1) > 0).all(), "an earlier token does not reach"

    def test_identity_start_computes_efficient_attention(self):
        efficient = model_of("efficient")
        model = SASGPTForCausalLM(config_of("super", token_mixing_init="identity")).eval()
        missing, unexpected = model.load_state_dict(efficient.state_dict(), strict=False)
        assert not unexpected and all("token_mixing" in name for name in missing)
        ids = torch.randint(67, (2, 10))
        torch.testing.assert_close(model(ids).logits, efficient(ids).logits)

    def test_shorter_contexts_use_the_leading_block(self):
        model = model_of("super", num_hidden_layers=1)
        ids = torch.randint(67, (1, 10))
        before = model(ids).logits
        with torch.no_grad():
            mixing = model.model.layers[0].self_attn.token_mixing
            mixing.weight[10:] = 100.0
            mixing.weight[:, 10:] = 100.0
            mixing.bias[10:] = 100.0
        assert torch.equal(model(ids).logits, before)

    def test_packed_documents_do_not_mix(self):
        model = model_of("super")
        ids = torch.randint(67, (1, 12))
        packed = model(ids, position_ids=torch.tensor([[*range(5), *range(7)]]), use_cache=False).logits
        torch.testing.assert_close(packed[:, :5], model(ids[:, :5]).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(packed[:, 5:], model(ids[:, 5:]).logits, rtol=0, atol=1e-4)

    def test_a_context_beyond_its_length_is_refused_with_the_length(self):
        model = model_of("super", max_position_embeddings=8)
        with pytest.raises(ValueError, match="position 8.*`max_position_embeddings` = 8.*truncate"):
            model(torch.ones(1, 9, dtype=torch.long))
        with pytest.raises(ValueError, match="position 8"):
            model.generate(torch.ones(1, 6, dtype=torch.long), max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize(("kind", "simulation"), PLAIN_AND_SIMULATED)
class TestBidirectional:
    def test_every_token_sees_every_token(self, kind, simulation):
        model = model_of(kind, simulation, is_causal=False, model_class=SASGPTModel).double()
        embeds = torch.randn(1, 7, 48, dtype=torch.float64, requires_grad=True)
        first = model(inputs_embeds=embeds).last_hidden_state[0, 0]
        (gradient,) = torch.autograd.grad(first.sum(), embeds)
        assert (gradient[0].abs().sum(-1) > 0).all()

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_harmless(self, kind, simulation, side):
        model = model_of(kind, simulation, is_causal=False, model_class=SASGPTModel)
        ids, mask = torch.randint(1, 67, (1, 10)), torch.ones(1, 10, dtype=torch.long)
        real = slice(3, None) if side == "left" else slice(None, 7)
        mask[:, slice(None, 3) if side == "left" else slice(7, None)] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state[:, real]
        torch.testing.assert_close(padded, model(ids[:, real]).last_hidden_state, rtol=0, atol=2e-4)

    def test_packed_documents_are_separate(self, kind, simulation):
        model = model_of(kind, simulation, is_causal=False, model_class=SASGPTModel)
        ids = torch.randint(1, 67, (1, 11))
        packed = model(ids, position_ids=torch.tensor([[*range(4), *range(7)]])).last_hidden_state
        torch.testing.assert_close(packed[:, :4], model(ids[:, :4]).last_hidden_state, rtol=0, atol=2e-4)
        torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]).last_hidden_state, rtol=0, atol=2e-4)


IMPOSSIBLE = [
    ({"attention_type": "super", "num_simulated_heads": 12}, "super.*cannot be simulated"),
    ({"attention_type": "mla", "kv_lora_rank": 49}, "kv_lora_rank.*49.*at most 48"),
    ({"attention_type": "mla", "q_lora_rank": 0}, "q_lora_rank.*0.*positive"),
    ({"attention_type": "mla", "simulated_head_dim": 12}, "simulated_head_dim.*qk_rope_head_dim.*18"),
    ({"attention_type": "tpa", "q_rank": 5}, "q_rank.*5.*at most 4"),
    ({"attention_type": "tpa", "q_rank": 6}, "q_rank.*6.*at most 4"),
    ({"attention_type": "tpa", "q_rank": 2, "k_rank": 0}, "k_rank.*0.*positive"),
    ({"attention_type": "mqa", "num_key_value_heads": 2}, "mqa.*num_key_value_heads.*2"),
    ({"attention_type": "efficient", "num_key_value_heads": 2}, "num_key_value_heads.*2.*efficient"),
    ({"attention_type": "optimised", "head_dim": 10}, "head_dim.*10.*hidden_size.*48"),
    ({"attention_type": "flash"}, "attention_type.*flash.*mha"),
]


@pytest.mark.parametrize(("fields", "message"), IMPOSSIBLE)
def test_impossible_combinations_are_refused_with_the_reason(fields, message):
    with pytest.raises(ValueError, match=message):
        SASGPTConfig(**GPT_BASE | {"hidden_size": 48} | fields)


@pytest.mark.parametrize(
    ("fields", "ranks"),
    [
        ({"num_attention_heads": 12, "hidden_size": 96}, (6, 2, 2)),
        ({"num_attention_heads": 4, "hidden_size": 48}, (4, 2, 2)),
        ({"num_attention_heads": 1, "hidden_size": 48}, (1, 1, 1)),
        ({"num_attention_heads": 12, "hidden_size": 48}, (4, 2, 2)),
        ({"num_attention_heads": 4, "hidden_size": 48, "q_rank": 3}, (3, 2, 2)),
    ],
)
def test_ranks_that_are_not_given_fit_the_heads(fields, ranks, tmp_path):
    config = SASGPTConfig(**GPT_BASE | {"attention_type": "tpa"} | fields)
    assert (config.q_rank, config.k_rank, config.v_rank) == ranks
    model = SASGPTModel(config).eval()
    model.save_pretrained(tmp_path)
    loaded = SASGPTModel.from_pretrained(tmp_path)
    ids = torch.randint(1, 67, (1, 5))
    torch.testing.assert_close(loaded(ids)[0], model(ids)[0])


def test_latents_that_are_not_given_fit_narrow_heads():
    config = SASGPTConfig(**GPT_BASE | {"attention_type": "mla", "hidden_size": 48, "head_dim": 2})
    assert (config.qk_rope_head_dim, config.q_lora_rank, config.kv_lora_rank) == (2, 16, 16)  # pairs are rotated
    SASGPTModel(config)(torch.randint(1, 67, (1, 5)))


@pytest.mark.parametrize("kind", ["mla", "tpa", "efficient", "super"])
def test_continuous_batching_is_refused_with_the_reason(kind):
    with pytest.raises(ValueError, match=f"Continuous batching.*{kind}"):
        model_of(kind).generate_batch([[1, 2, 3]])


@pytest.fixture
def the_kind_of_the_contributors_page(monkeypatch):
    """ "shared", made of the code as it stands there, registered where the page says."""
    document = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    page = document.partition("## Adding an attention kind")[2].partition("\n## ")[0]
    code, reference = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    projections = ast.literal_eval(re.search(r'`"shared": (\(.*?\))`', page)[1])
    in_kinds, in_references = dict(vars(kinds)), dict(vars(plain_references))
    exec(compile(code, "CONTRIBUTING.md", "exec"), in_kinds)
    exec(compile(reference, "CONTRIBUTING.md", "exec"), in_references)
    types = (*configuration_attention.ATTENTION_TYPES, "shared")
    monkeypatch.setattr(configuration_attention, "ATTENTION_TYPES", types)
    monkeypatch.setitem(kinds.ATTENTION_CLASSES, "shared", in_kinds["SharedAttention"])
    monkeypatch.setitem(parallel_plans._HEAD_PROJECTIONS, "shared", projections)
    monkeypatch.setitem(plain_references.KINDS, "shared", in_references["shared"])
    monkeypatch.setitem(KINDS, "shared", {"attention_type": "shared"})
    monkeypatch.setitem(FORMULAS, "shared", lambda c: c.num_attention_heads * c.head_dim)
    variants = {"shared": {}, "shared_sas": SAS, "shared_sas_base": SAS | {"simulation_cache": "base"}}
    for name, fields in variants.items():
        monkeypatch.setitem(test_cross_attention.VARIANTS, name, fields | {"attention_type": "shared"})


@pytest.mark.usefixtures("the_kind_of_the_contributors_page")
@pytest.mark.parametrize("simulation", SIMULATIONS)
def test_the_kind_of_the_contributors_page_is_one(simulation):
    """It passes what every kind passes."""
    for bias in (False, True):
        test_output_and_gradients_equal_the_reference("shared", simulation, bias)
    test_cached_numbers_are_the_formulas_and_what_is_really_cached("shared", simulation)
    for form in ("expanded", "base"):
        for cache in ("dynamic", "static"):
            test_cached_logits_equal_uncached_ones_with_left_padding("shared", simulation, form, cache)
    for side in ("left", "right"):
        TestBidirectional().test_padding_is_harmless("shared", simulation, side)
    test_continuous_batching_is_refused_with_the_reason("shared")


@pytest.mark.usefixtures("the_kind_of_the_contributors_page")
@pytest.mark.parametrize("variant", ["shared", "shared_sas", "shared_sas_base"])
def test_the_kind_of_the_contributors_page_crosses_and_sees(variant):
    """Cross-attention, images, and a tensor-parallel plan whose names are all there."""
    for implementation in ("eager", "sdpa"):
        test_cross_attention.test_everyone_sees_the_whole_source(variant, implementation)
    for cache in ("dynamic", "static"):
        test_cross_attention.test_the_source_is_read_once(variant, cache)
    config = SASViTConfig(**VIT_BASE | test_cross_attention.VARIANTS[variant])
    assert SASViTForImageClassification(config)(images(config)).logits.isfinite().all()
    model = model_of("shared", "plain", model_class=SASGPTModel)
    modules = {re.sub(r"\d+", "*", name) for name, _ in model.named_modules()}
    assert model.config.base_model_tp_plan.keys() <= modules
    split = {name.rpartition(".")[2] for name in model.config.base_model_tp_plan if ".self_attn." in name}
    assert split == {"q_proj", "kv_proj", "o_proj"}
