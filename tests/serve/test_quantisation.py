"""Quantised models: each library, as Transformers calls it, takes the linear maps and leaves the simulation alone.

Each model is compared with one whose linear maps hold what the quantised ones stand for, in plain float32: the
simulation, the attention and the cache must compute the same around them.
"""

import importlib

import peft
import pytest
import torch
from helpers import assert_identical, encoder, gpt, gradients, images, seq2seq, token_ids, vit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, QuantoConfig, TorchAoConfig

import sas_hf


# Layers of groups of 32 numbers and of bitsandbytes' 64.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
SIMULATED = SHAPE | {"simulated_head_dim": 24}
KINDS = {
    "mha": lambda: gpt("mha", **SHAPE),
    "sas": lambda: gpt("sas", **SIMULATED),
    "kernel 5, base form": lambda: gpt("sas_k5_gqa", simulation_cache="base", **SIMULATED),
    "mla": lambda: gpt("mla_sas", **SIMULATED | {"q_lora_rank": 64, "kv_lora_rank": 64}),
    "tpa": lambda: gpt("tpa_sas", **SIMULATED),
    "optimised": lambda: gpt("optimised_sas", **SIMULATED),
    "efficient": lambda: gpt("efficient_sas", **SIMULATED),
    "super": lambda: gpt("super", **SHAPE),
    "encoder": lambda: encoder("sas_k5_gqa", **SIMULATED),
    "seq2seq": lambda: seq2seq("sas_k5_gqa", **SIMULATED),
    "vit": lambda: vit("sas_k5_gqa", num_labels=32, **SIMULATED),
}


def torchao(bits: int) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if bits == 8:
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    groups = quantization.PerGroup(32)
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups))


def bitsandbytes(**fields) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(**fields)


def quanto(weights: str) -> QuantoConfig:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return QuantoConfig(weights=weights)


QUANTISERS = {
    "torchao int8": lambda: torchao(8),
    "torchao int4": lambda: torchao(4),
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "quanto int8": lambda: quanto("int8"),
}


def dequantised(layer: nn.Module) -> torch.Tensor | None:
    """What a quantised linear map's weight stands for; `None` where the layer is not quantised."""
    weight = getattr(layer, "weight", None)
    if weight is None or type(weight) in (nn.Parameter, torch.Tensor):
        return None
    if type(layer).__name__ == "Linear8bitLt":
        return weight.CB * weight.SCB[:, None] / 127
    if type(layer).__name__ == "Linear4bit":
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(weight, weight.quant_state)
    return weight.dequantize()


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": images(model.config)}
    ids = {"input_ids": token_ids(2, 9)}
    return ids | {"decoder_input_ids": token_ids(2, 5)} if model.config.is_encoder_decoder else ids


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_numbers_are_those_of_the_weights_it_has(kind, quantiser, tmp_path):
    torch.manual_seed(0)
    config, model = QUANTISERS[quantiser](), KINDS[kind]()
    model.save_pretrained(tmp_path)
    quantised = type(model).from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    taken = {name: dequantised(layer) for name, layer in quantised.named_modules()}
    taken = {name: weight for name, weight in taken.items() if weight is not None}
    assert any("down_proj" in name or "fc2" in name for name in taken)
    assert not any("_simulation" in name for name in taken)
    inputs = inputs_of(model)
    before = model(**inputs).logits
    for name, weight in taken.items():
        model.get_submodule(name).weight.copy_(weight)
    # bitsandbytes quantises what enters an int8 layer, too, and its kernel for nf4 computes in bfloat16
    tolerance = {"bitsandbytes int8": 0.1, "bitsandbytes nf4": 0.02}.get(quantiser, 1e-5)
    found, expected = quantised(**inputs).logits, model(**inputs).logits
    assert (found - expected).norm() < tolerance * expected.norm()
    assert (before - expected).norm() > 1e-3 * expected.norm()  # and quantised it is


@pytest.mark.parametrize("quantiser", QUANTISERS)
@torch.no_grad()
def test_text_is_made_and_what_is_saved_is_what_was_quantised(quantiser, tmp_path):
    torch.manual_seed(0)
    gpt("sas_k5_gqa", **SIMULATED).save_pretrained(tmp_path / "float")
    load, greedy = sas_hf.SASGPTForCausalLM.from_pretrained, {"max_new_tokens": 6, "do_sample": False}
    model = load(tmp_path / "float", quantization_config=QUANTISERS[quantiser](), device_map="cpu").eval()
    ids = token_ids(2, 7)
    text, logits = model.generate(ids, **greedy), model(ids).logits
    assert torch.equal(text, model.generate(ids, use_cache=False, **greedy))
    if not model.hf_quantizer.is_serializable():
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / "quantised")
        return
    model.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised", device_map="cpu").eval()
    for either in (again, model):  # saving must not change a model, either
        assert torch.equal(either(ids).logits, logits)
    assert torch.equal(again.generate(ids, **greedy), text)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@torch.no_grad()
def test_a_4_bit_model_that_has_run_on_a_cpu_trains_merges_and_saves_as_before(nested, tmp_path):
    """bitsandbytes would pack its weights anew, in a form that gives no gradients and that nobody else reads."""
    config = bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    torch.manual_seed(0)
    gpt("sas_k5_gqa", **SIMULATED).save_pretrained(tmp_path)
    ids, adapter = token_ids(2, 7), peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)

    def load():
        return sas_hf.SASGPTForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()

    def adapted():
        torch.manual_seed(1)
        return peft.get_peft_model(load(), adapter).eval()

    @torch.enable_grad()
    def trained(model):
        model.train()(ids, labels=ids).loss.backward()
        return gradients(model)

    fresh, evaluated = adapted(), adapted()
    evaluated(ids)
    assert_identical(trained(evaluated), trained(fresh))
    fresh, evaluated = adapted(), adapted()
    evaluated(ids)
    assert torch.equal(evaluated.merge_and_unload()(ids).logits, fresh.merge_and_unload()(ids).logits)
    fresh, evaluated = load(), load()
    evaluated(ids)
    assert_identical(evaluated.model.layers[0].state_dict(), fresh.model.layers[0].state_dict())
    assert torch.equal(evaluated.dequantize()(ids).logits, fresh.dequantize()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantise", [False, True])
@torch.no_grad()
def test_a_simulation_has_the_dtype_of_its_model(dtype, quantise, tmp_path):
    config = QUANTISERS["torchao int8"]() if quantise else None
    gpt("sas").save_pretrained(tmp_path)
    load = sas_hf.SASGPTForCausalLM.from_pretrained
    model = load(tmp_path, quantization_config=config, dtype=dtype, device_map="cpu")
    simulation = model.model.layers[0].self_attn.q_simulation
    assert {parameter.dtype for parameter in simulation.parameters()} == {dtype}
    assert model(token_ids(1, 5)).logits.isfinite().all()


@torch.no_grad()
def test_what_the_user_names_is_left_alone_beside_the_simulation(tmp_path):
    config = QUANTISERS["torchao int8"]()
    config.modules_to_not_convert = [".*down_proj"]
    gpt("sas").save_pretrained(tmp_path)
    model = sas_hf.SASGPTForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    layers = model.model.layers[0].named_modules()
    taken = {name.rpartition(".")[2] for name, layer in layers if dequantised(layer) is not None}
    assert taken == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


@pytest.mark.parametrize("kind", ["mha", "sas", "kernel 5, base form", "mla"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@torch.no_grad()
def test_pytorchs_dynamic_quantisation(kind):
    """It takes linear maps of no other class: never the simulation."""
    torch.manual_seed(0)
    model, ids = KINDS[kind](), token_ids(2, 9)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.model.layers[0].mlp.down_proj) is not nn.Linear
    for name, layer in quantised.named_modules():
        if type(layer).__module__.startswith("torch.ao"):
            assert "_simulation" not in name
            if callable(getattr(layer, "weight", None)):
                model.get_submodule(name).weight.copy_(layer.weight().dequantize())
    found, expected = quantised(ids).logits, model(ids).logits
    assert (found - expected).norm() < 0.1 * expected.norm()  # what enters a layer is quantised, too
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert quantised.generate(ids, **greedy).shape == (2, 13)


@pytest.mark.parametrize("kind", ["sas", "mla"])
def test_gptqmodel_finds_the_linear_maps_where_they_are(kind):
    """It looks through a model by itself, but takes a layer of the simulation for one of attention's own."""
    auto = pytest.importorskip("gptqmodel.models.auto", reason="gptqmodel is not installed")
    from gptqmodel.quantization.config import METHOD

    definition, model = auto.MODEL_MAP["sas_gpt"], KINDS[kind]()
    *path, _, blocks = definition.__new__(definition)._auto_detect_module_tree(model, METHOD.GPTQ)
    layer = model.get_submodule(".".join(path))[0]
    found = {f"{block}.{name}" for block, names in blocks.items() for name in names}
    assert found == {name for name, part in layer.named_modules() if type(part) is nn.Linear}
    assert "self_attn.o_proj" in found and "mlp.down_proj" in found
