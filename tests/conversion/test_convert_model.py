"""A converted model computes its source's function, and every copy of a head can learn something of its own."""

import copy

import peft
import pytest
import torch
from tiny_llama import AWKWARD, tiny_llama, tiny_llama_config
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.activations import ACT2FN

from sas_hf.conversion import ConversionError, ConversionOptions, compare_models, convert_model, gradient_differences
from sas_hf.conversion.start import GRID, balanced_deviations
from sas_hf.modeling.simulation import FeatureSimulation, HeadSimulation


OPTIONS = {
    "default": ConversionOptions(),
    "kernel 5, doubled heads": ConversionOptions(num_simulated_heads=30, simulation_kernel_size=5, perturbation=2.0),
    "heads only": ConversionOptions(simulated_head_dim=0),
    "features only": ConversionOptions(num_simulated_heads=0, simulated_head_dim=21),
    "values' features only": ConversionOptions(
        num_simulated_heads=0, simulated_head_dim=0, simulate_value_features=True
    ),
    "linear": ConversionOptions(simulation_act="identity", simulation_kernel_size=3),
    "beyond the paper": ConversionOptions(simulate_value_features=True, head_aggregation="concat"),
}


def windows(count: int = 3, length: int = 40) -> list[torch.Tensor]:
    return [torch.randint(300, (1, length)) for _ in range(count)]


def test_every_shape_is_exact_in_float32(awkward_llama):
    fidelity = compare_models(awkward_llama, convert_model(awkward_llama), windows())
    assert fidelity.is_exact, fidelity
    assert fidelity.argmax_agreement == 1.0
    assert fidelity.mean_kl < 1e-9


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_exact_in_float64(name):
    """RMSNorm rounds to float32 inside, which bounds a whole model; one attention layer is exact to 1e-9."""
    source = LlamaModel(tiny_llama_config(**AWKWARD["mqa"])).eval().double()
    options = OPTIONS[name]
    converted = convert_model(source, options)
    ids = windows(1)[0]
    difference = (converted(ids).last_hidden_state - source(ids).last_hidden_state).abs().max()
    assert difference <= 1e-5

    hidden_states = torch.randn(1, 40, 60, dtype=torch.float64)
    rotary = source.rotary_emb(hidden_states, torch.arange(40)[None])
    expected, _ = source.layers[0].self_attn(hidden_states, rotary)
    actual, _ = converted.layers[0].self_attn(hidden_states, rotary)
    assert (actual - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("act", ["prelu", "xielu"])
def test_an_activation_with_numbers_of_its_own_starts_as_transformers_makes_it(act):
    source = tiny_llama("gqa")
    converted = convert_model(source, ConversionOptions(simulation_act=act))
    assert compare_models(source, converted, windows()).is_exact
    activations = [part.act for part in converted.modules() if isinstance(part, (HeadSimulation, FeatureSimulation))]
    assert len(activations) == 3 * (3 + 2)  # heads of queries, keys and values, features of queries and keys
    for found in activations:
        for name, tensor in ACT2FN[act].state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor.float()), name


@pytest.mark.parametrize(
    "source_class",
    [LlamaModel, LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering],
)
def test_other_heads_are_carried_over(source_class):
    config = tiny_llama_config(**AWKWARD["gqa"], pad_token_id=0)
    config.id2label, config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    source = source_class(config).eval()
    converted = convert_model(source)
    assert compare_models(source, converted, windows()).is_exact
    assert converted.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_bfloat16_weights_are_converted_exactly(awkward_llama):
    source = awkward_llama
    for parameter in source.parameters():  # `source.bfloat16()` would round the rotary frequencies too
        parameter.data = parameter.data.bfloat16()
    converted = convert_model(source)
    assert converted.dtype == torch.bfloat16
    assert compare_models(source.float(), converted.float(), windows()).is_exact


def test_copies_of_a_head_learn_different_things(awkward_llama):
    converted = convert_model(awkward_llama)
    batch = torch.randint(300, (4, 60))
    shares = gradient_differences(converted, batch)
    assert shares["query"] > 1 / 3
    assert shares["key"] > 1 / 3


def test_copies_do_not_even_learn_parallel_things(awkward_llama):
    """Adam ignores the length of a gradient, so copies with parallel gradients would stay copies."""
    converted = convert_model(awkward_llama)
    batch = torch.randint(300, (4, 60))
    converted(input_ids=batch, labels=batch).loss.backward()
    for layer in converted.model.layers:
        for simulation in (layer.self_attn.q_simulation, layer.self_attn.k_simulation):
            gradient = simulation.heads.expansion.weight.grad.flatten(1)
            if gradient.shape[1] == 1:
                continue  # one key/value head: two numbers are always parallel
            first, second = gradient.unflatten(0, (-1, layer.self_attn.num_heads))[:2]
            cosines = torch.nn.functional.cosine_similarity(first, second, dim=-1)
            assert cosines.abs().min() < 0.99


def test_copies_that_could_only_differ_by_a_number_are_refused():
    """A linear simulation mixes the only value head with nothing: the copies' gradients are parallel."""
    source = tiny_llama("mqa")
    for act in ("identity", "linear"):
        with pytest.raises(ValueError, match=f"`simulation_act` is '{act}'.*one key/value head.*stay.*_size=3"):
            convert_model(source, ConversionOptions(simulation_act=act))
    batch = torch.randint(300, (4, 60))
    linear = convert_model(source, ConversionOptions(simulation_act="identity", simulation_kernel_size=3))
    linear(input_ids=batch, labels=batch).loss.backward()
    for layer in linear.model.layers:
        gradient = layer.self_attn.q_simulation.heads.expansion.weight.grad.flatten(1)
        first, second = gradient.unflatten(0, (-1, layer.self_attn.num_heads))[:2]
        assert torch.nn.functional.cosine_similarity(first, second, dim=-1).abs().max() < 0.99
    for heads in (0, source.config.num_attention_heads):  # no copies
        convert_model(source, ConversionOptions(num_simulated_heads=heads, simulation_act="identity"))


def test_without_perturbation_copies_are_dead():
    """What the perturbation is for: this is the state it prevents."""
    converted = convert_model(tiny_llama("gqa"), ConversionOptions(perturbation=0.0))
    shares = gradient_differences(converted, torch.randint(300, (2, 40)))
    assert shares["query"] < 1e-5


def test_source_keeps_its_weights_to_itself():
    source = tiny_llama("gqa")
    before = copy.deepcopy(source.state_dict())
    converted = convert_model(source)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    for name, weight in source.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_score_scale_and_rotary_parameters_are_the_sources():
    source = tiny_llama("llama3-rope")
    config = convert_model(source).config
    assert config.rope_parameters == source.config.rope_parameters
    assert config.head_dim == source.config.head_dim
    assert config.query_pre_attn_scalar == source.config.head_dim


@pytest.mark.parametrize(("shape", "num_heads"), [((36, 4, 1), 12), ((12, 2, 5), 6), ((50, 5, 3), 5)])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_deviations_cancel_exactly_and_fit_bfloat16(shape, num_heads, scale):
    deviations = balanced_deviations(torch.Size(shape), num_heads, scale, torch.Generator().manual_seed(0))
    assert torch.equal(deviations.unflatten(0, (-1, num_heads)).sum(0), torch.zeros(num_heads, *shape[1:]))
    assert torch.equal(deviations / GRID, (deviations / GRID).round())
    assert (1 + deviations).abs().max() < 4
    assert torch.equal((1 + deviations).bfloat16().float(), 1 + deviations)


def test_an_unsupported_class_is_refused():
    source = BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=10))
    with pytest.raises(
        ConversionError, match="model_type.*bloom.*gpt2, gpt_neox, helium, llama, marian, mbart, mistral"
    ):
        convert_model(source)


def with_adapter(model):
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)


def with_a_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, arguments, output: output * 2)


def with_a_pre_hook(model):
    model.lm_head.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))


def with_another_forward(model):
    model.model.norm.forward = lambda states: states


def with_another_module(model):
    model.model.layers[0].mlp = torch.nn.Identity()


def with_a_layer_less(model):
    del model.model.layers[1]


def with_a_field_changed_later(model):
    model.config.num_hidden_layers = 2


def with_another_epsilon(model):
    model.model.norm.variance_epsilon = 0.5


def with_another_scale(model):
    model.model.layers[2].self_attn.scaling = 1.0


def without_a_mask(model):
    model.model.layers[0].self_attn.is_causal = False


def with_a_head_of_its_own(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)


def with_other_frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def with_whole_numbers(model):
    weight = model.lm_head.weight.detach()
    model.model.norm.weight = torch.nn.Parameter(torch.ones_like(weight[0], dtype=torch.int8), requires_grad=False)


def left_on_the_disk(model):
    model.model.layers[0].to("meta")


def with_a_parametrised_weight(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


NOT_AS_CONFIGURED = {
    with_adapter: "self_attn.q_proj is a peft.*merge_and_unload",
    with_a_hook: r"model.layers.1.mlp \(LlamaMLP\) has a hook",
    with_a_pre_hook: r"lm_head \(Linear\) has a hook",
    with_another_forward: r"model.norm \(LlamaRMSNorm\) has a hook or another `forward`",
    with_another_module: "model.layers.0.mlp is a torch.*Identity, but a .*LlamaMLP in a LlamaForCausalLM",
    with_a_layer_less: "model.layers.2 is absent",
    with_a_field_changed_later: "model.layers.2 is a .*LlamaDecoderLayer, but absent",
    with_another_epsilon: r"model.norm \(LlamaRMSNorm\) has variance_epsilon = 0.5, but 1e-06",
    with_another_scale: "self_attn .* has scaling = 1.0, but 0.28",
    without_a_mask: "self_attn .* has is_causal = False, but True",
    with_a_head_of_its_own: "`tie_word_embeddings` is true, but the head has weights of its own",
    with_other_frequencies: "inv_freq`. are not those of its `rope_parameters`",
    with_whole_numbers: "model.norm.weight is stored as torch.int8",
    left_on_the_disk: "is not in memory",
    with_a_parametrised_weight: "up_proj is a .*Parametrized",
}


@pytest.mark.parametrize(
    ("change", "message"), NOT_AS_CONFIGURED.items(), ids=lambda item: getattr(item, "__name__", "")
)
def test_a_model_that_is_not_what_its_configuration_says_is_refused(change, message):
    source = tiny_llama("gqa")
    change(source)
    with pytest.raises(ConversionError, match=message):
        convert_model(source)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
def test_an_adapted_model_is_refused_with_the_way_out():
    source = peft.get_peft_model(tiny_llama("gqa"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConversionError, match="PeftModel has no SAS counterpart.*merge_and_unload"):
        convert_model(source)
    merged = source.merge_and_unload()
    assert compare_models(merged, convert_model(merged), windows()).is_exact


def test_a_model_that_was_used_and_trained_before_is_none_such():
    source = tiny_llama("gqa")
    getattr(source, "activation_checkpointing_enable", source.gradient_checkpointing_enable)()
    source.enable_input_require_grads()
    source.train()
    source(windows(1)[0], output_hidden_states=True)  # Transformers leaves hooks that collect them
    source.resize_token_embeddings(310)
    source.eval()
    assert compare_models(source, convert_model(source), windows()).is_exact


def test_equal_matrices_count_as_tied():
    source = tiny_llama("gqa")
    source.lm_head.weight = torch.nn.Parameter(source.lm_head.weight.detach().clone())
    assert compare_models(source, convert_model(source), windows()).is_exact


@torch.no_grad()
def test_frequencies_that_were_cast_with_the_model_are_its_own():
    source = tiny_llama("gqa").bfloat16().float()  # the buffers too: rounded, as `model.bfloat16()` leaves them
    narrow = tiny_llama("gqa").bfloat16()
    converted = convert_model(narrow)
    assert torch.equal(converted.model.rotary_emb.inv_freq, narrow.model.rotary_emb.inv_freq)
    ids = windows(1, 128)[0]
    difference = (converted.float()(ids).logits - source(ids).logits).abs().max()
    assert difference <= 1e-5 * source(ids).logits.abs().max()


def test_the_generation_configuration_is_not_shared():
    source = tiny_llama("gqa")
    convert_model(source).generation_config.max_length = 7
    assert source.generation_config.max_length != 7


@pytest.mark.parametrize("perturbation", [float("nan"), -1.0, 1e9])
def test_a_perturbation_out_of_range_is_refused(perturbation):
    with pytest.raises(ValueError, match="`perturbation` is .*from 0 to 4.24"):
        convert_model(tiny_llama("gqa"), ConversionOptions(perturbation=perturbation))
    largest = ConversionOptions(perturbation=4.24)
    assert compare_models(tiny_llama("gqa"), convert_model(tiny_llama("gqa"), largest), windows()).is_exact
