"""What a recipe trains: adapters or chosen parameters, and nothing else."""

from itertools import pairwise

import pytest
import torch
from helpers import gpt, returned_cache, token_ids, vit
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
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
