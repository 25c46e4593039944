"""What a recipe trains: adapters or chosen parameters, and nothing else."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from helpers import encoder, gpt, returned_cache, seq2seq, token_ids, vit
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from sas_hf.training.adapters import add_lora, choose_trainable, lora_config, prepare_parameters
from sas_hf.training.recipe import ModelRecipe


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "expansion"], "init_lora_weights": False}


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_trains_its_targets_only_and_comes_back_from_disk(tmp_path):
    tokens = token_ids(2, 9)
    torch.manual_seed(1)
    model = prepare_parameters(gpt("sas"), ModelRecipe(lora=LORA)).eval()
    names = trained_names(model)
    assert names and all("lora_" in name for name in names)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "v_proj", "expansion"}
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    plain = gpt("sas")
    assert not torch.allclose(plain(tokens).logits, model(tokens).logits)
    assert torch.equal(PeftModel.from_pretrained(plain, tmp_path)(tokens).logits, model(tokens).logits)


def test_an_image_classifier_takes_adapters_too():
    names = trained_names(add_lora(vit("sas"), {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}))
    kinds = {name.rsplit(".default", 1)[0].rpartition(".")[2] for name in names}
    assert kinds == {"lora_A", "lora_B", "modules_to_save"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_module": ["q_proj"]}, "`model.lora` has no field 'target_module'; did you mean 'target_modules'?"),
        ({"r": 4}, "`model.lora.target_modules` is missing"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "loftq"}, "which peft refuses: "),
    ],
)
def test_wrong_fields_are_refused_without_a_model(fields, message):
    with pytest.raises(ValueError) as error:
        lora_config(fields)
    assert message in str(error.value)


def test_a_target_that_is_no_layer_is_refused():
    """peft itself says nothing as long as another target is there."""
    model = gpt("sas")
    with pytest.raises(ValueError, match="`model.lora.target_modules` names 'q_prj', but no layer: there is q_proj"):
        add_lora(model, {"target_modules": ["v_proj", "q_prj"]})
    assert not any("lora" in name for name, _ in model.named_modules())


def test_only_matching_parameters_train():
    model = prepare_parameters(gpt("sas"), ModelRecipe(trainable=[r"layers\.1\..*expansion", r"^model\.norm"]))
    named = dict(model.named_parameters())
    expected = {name for name in named if ("layers.1." in name and "expansion" in name) or name == "model.norm.weight"}
    assert len(expected) > 2 and trained_names(model) == expected


def test_a_tied_parameter_has_either_name():
    model = gpt("mha", tie_word_embeddings=True)
    choose_trainable(model, ["lm_head"])
    assert trained_names(model) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["norm", "expansio_n"], "'expansio_n', which matches no parameter; there are model.embed_tokens.weight"),
    ],
)
def test_patterns_that_choose_nothing_are_refused_and_change_nothing(patterns, message):
    model = gpt("sas")
    with pytest.raises(ValueError) as error:
        choose_trainable(model, patterns)
    assert message in str(error.value)
    assert trained_names(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("variant", ["sas", "sas_k5_gqa", "sas_learned"])
def test_every_row_of_a_batch_has_its_own_adapter(variant):
    """Also on the head convolutions, whose layers see rows then."""
    model, ids = gpt(variant), token_ids(2, 6)
    with torch.no_grad():
        expected = [model(ids, use_cache=False).logits]
        fields = {"r": 2, "init_lora_weights": False}
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "expansion", "residual"], **fields), "one")
        model.add_adapter("two", LoraConfig(target_modules=["v_proj", "expansion"], **fields))
        model.eval()
        for name in ("one", "two"):
            model.set_adapter(name)
            expected.append(model(input_ids=ids, use_cache=False).logits)
        names = ["__base__"] * 2 + ["one"] * 2 + ["two"] * 2
        found = model(input_ids=ids.repeat(3, 1), adapter_names=names, use_cache=False).logits
    assert all((one - other).abs().max() > 0.1 for one, other in pairwise(expected))
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-4, rtol=0)


@pytest.mark.parametrize("variant", ["sas", "efficient", "qk_norm"])
def test_replicated_layers(variant):
    """peft's `layer_replication`: the second layer twice, each time with an adapter of its own."""
    ids = token_ids(2, 8)
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], init_lora_weights=False)
    model = get_peft_model(gpt(variant, simulation_cache="base"), config).eval()
    expected = model(input_ids=ids, use_cache=False).logits
    model(input_ids=ids, labels=ids).loss.backward()
    assert len([name for name, parameter in model.named_parameters() if parameter.grad is not None]) == 3 * 2
    with torch.no_grad():
        first = model(input_ids=ids[:, :6], use_cache=True)
        rest = model(input_ids=ids[:, 6:], cache=returned_cache(first))
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), expected, atol=2e-4, rtol=0)


PROMPTS = {
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"),
}
# Those that cache keys and values can have a prefix.
PROMPTED = [("prefix", name) for name in ("mha", "sas", "sas_k5_gqa", "optimised_sas", "super", "sas_learned")]
PROMPTED += [
    (kind, name) for kind in ("prompt", "p-tuning") for name in ("sas", "mla", "tpa_sas", "efficient", "super", "mqa")
]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft to Transformers 5.24
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("kind", "variant"), PROMPTED)
def test_prompts_are_learnt_and_heeded_when_text_is_made(kind, variant, use_cache):
    """peft 0.21 looks for the cache under its old name: Llama of Transformers 5.24 forgets its prefix there."""
    model, ids = gpt(variant, simulation_cache="base"), token_ids(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    without = model.generate(ids, **options)
    model = get_peft_model(model, PROMPTS[kind]())
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.eval()
    expected = ids
    for _ in range(4):
        with torch.no_grad():
            logits = model(input_ids=expected, use_cache=False).logits
        expected = torch.cat((expected, logits[:, -1:].argmax(-1)), dim=1)
    assert not torch.equal(expected, without)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)


METHODS = {
    "LoRA": lambda: LoraConfig(r=4),
    "PiSSA": lambda: LoraConfig(r=4, init_lora_weights="pissa"),
    "AdaLoRA": lambda: AdaLoraConfig(total_step=10),
    "LoHa": lambda: LoHaConfig(r=2),
    "VeRA": lambda: VeraConfig(r=4),
    "IA3": lambda: IA3Config(),
}
MODELS = {
    "gpt": (lambda: gpt("sas_k5_gqa"), {"q_proj", "v_proj"}, {"k_proj", "v_proj", "down_proj"}),
    "mla": (lambda: gpt("mla_sas"), {"q_b_proj", "kv_b_proj"}, {"kv_b_proj", "down_proj"}),
    "tpa": (
        lambda: gpt("tpa_sas"),
        {f"{side}_{factor}_proj" for side in "qv" for factor in ("head", "feature")},
        {f"{side}_{factor}_proj" for side in "kv" for factor in ("head", "feature")} | {"down_proj"},
    ),
    "optimised": (lambda: gpt("optimised_sas"), {"q_proj"}, {"k_proj", "down_proj"}),
    "efficient": (lambda: gpt("efficient_sas"), {"q_proj"}, {"down_proj"}),
    "super": (lambda: gpt("super"), {"q_proj"}, {"down_proj"}),
    "encoder": (lambda: encoder("sas_k5_gqa"), {"q_proj", "v_proj"}, {"k_proj", "v_proj", "down_proj"}),
    "seq2seq": (lambda: seq2seq("sas_k5_gqa"), {"q_proj", "v_proj"}, {"k_proj", "v_proj", "down_proj"}),
    "vit": (lambda: vit("sas_k5_gqa"), {"q_proj", "v_proj"}, {"k_proj", "v_proj", "fc2"}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_methods_have_targets_where_nobody_names_them(kind, method):
    """The linear maps that stand for those that Llama has by default, and no convolution, which some refuse."""
    make, projections, scaled = MODELS[kind]
    model = get_peft_model(make(), METHODS[method]())
    targets = {name.rpartition(".")[2] for name in model.base_model.targeted_module_names}
    assert targets == (scaled if method == "IA3" else projections)
    assert trained_names(model)


def test_a_users_own_targets_are_not_replaced():
    model = get_peft_model(gpt("sas"), LoraConfig(r=4, target_modules=["o_proj"]))
    assert {name.rpartition(".")[2] for name in model.base_model.targeted_module_names} == {"o_proj"}


@pytest.mark.parametrize("order", ["import peft, sas_hf", "import sas_hf, peft", "import sas_hf.modeling, peft"])
def test_peft_knows_our_models_in_every_order_of_imports(order):
    code = f"{order}\nfrom peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets"
    code += "\nassert 'q_proj' in targets['sas_gpt'] and 'q_proj' not in targets['bert']"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_liger_says_that_it_does_nothing(tmp_path):
    """As the Trainer's `use_liger_kernel` asks it; alone it would pass over a model that it does not know."""
    pytest.importorskip("liger_kernel.transformers.monkey_patch", reason="liger-kernel is not installed, with Triton")
    from transformers.integrations.liger import apply_liger_kernel

    for model in (gpt("mha"), encoder("mha"), seq2seq("mha"), vit("vit")):
        with pytest.raises(ValueError, match="Liger has no kernels for SAS models; leave it out."):
            apply_liger_kernel(model, None)
