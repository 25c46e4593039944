"""What a recipe trains: adapters or chosen parameters, and nothing else."""

import pytest
import torch
from helpers import gpt, token_ids, vit
from peft import PeftModel

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
