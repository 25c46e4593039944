"""Tests that every architecture must pass, and what each must tell about itself to be tested.

A test file joins the two: `class TestSASGPTLoading(SASGPT, LoadingTests)`. A new architecture adds its description
here; a new attention kind adds a line to its variants.
"""

import json

import pytest
import torch
from helpers import (
    CHECKPOINTING,
    ENCODER_VARIANTS,
    GPT_VARIANTS,
    SEQ2SEQ_VARIANTS,
    VIT_VARIANTS,
    all_tensors,
    assert_all_close,
    assert_identical,
    encoder,
    gpt,
    gradients,
    images,
    seq2seq,
    token_ids,
    vit,
)

from sas_hf import (
    SASEncoderForMaskedLM,
    SASGPTForCausalLM,
    SASSeq2SeqForConditionalGeneration,
    SASViTForImageClassification,
)
from sas_hf.modeling import fused_simulation


class Architecture:
    """What the shared tests need to know. Subclasses fill in all of it."""

    variants: dict[str, dict]
    compiled_variants: tuple[str, ...]
    layer_class: str
    model_class: type

    def make(self, variant: str, **overrides):
        raise NotImplementedError

    def inputs(self, model, batch: int = 2) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def predict(self, model, **inputs) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits


class SASGPT(Architecture):
    variants = GPT_VARIANTS
    compiled_variants = ("mha", "sas_learned")
    layer_class = "SASGPTDecoderLayer"
    model_class = SASGPTForCausalLM

    def make(self, variant: str, **overrides):
        return gpt(variant, **overrides)

    def inputs(self, model, batch: int = 2) -> dict[str, torch.Tensor]:
        return {"input_ids": token_ids(batch, 14)}


class SASViT(Architecture):
    variants = VIT_VARIANTS
    compiled_variants = ("vit", "sas_k5_gqa", "super_mean")
    layer_class = "SASViTLayer"
    model_class = SASViTForImageClassification

    def make(self, variant: str, **overrides):
        return vit(variant, **overrides)

    def inputs(self, model, batch: int = 2) -> dict[str, torch.Tensor]:
        return {"pixel_values": images(model.config, batch)}


class SASEncoder(Architecture):
    variants = ENCODER_VARIANTS
    compiled_variants = ("mha", "sas_rope", "super")
    layer_class = "SASEncoderLayer"
    model_class = SASEncoderForMaskedLM

    def make(self, variant: str, **overrides):
        return encoder(variant, **overrides)

    def inputs(self, model, batch: int = 2) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, 14, dtype=torch.long)
        mask[-1, 9:] = 0
        inputs = {"input_ids": token_ids(batch, 14), "attention_mask": mask}
        types = model.config.type_vocab_size
        return inputs | ({"token_type_ids": torch.randint(types, (batch, 14))} if types else {})


class SASSeq2Seq(Architecture):
    variants = SEQ2SEQ_VARIANTS
    compiled_variants = ("mha", "sas_rope", "super", "places")
    layer_class = "SASDecoderLayer"
    model_class = SASSeq2SeqForConditionalGeneration

    def make(self, variant: str, **overrides):
        return seq2seq(variant, **overrides)

    def inputs(self, model, batch: int = 2) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, 11, dtype=torch.long)
        mask[-1, 7:] = 0
        target = token_ids(batch, 8, vocab_size=model.config.decoder_vocab_size)
        return {"input_ids": token_ids(batch, 11), "attention_mask": mask, "decoder_input_ids": target}


def train_step(model, inputs: dict, direction: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and all gradients of their product with `direction`."""
    model.zero_grad()
    logits = model(**inputs).logits
    (logits * direction).sum().backward()
    return logits.detach(), gradients(model)


class BackendTests:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)], ids=str)
    def test_eager_and_sdpa_agree_with_gradients(self, variant, dtype, tolerance):
        """Norms are computed in float32 whatever the type, hence not the full accuracy of float64."""
        model = self.make(variant).to(dtype)
        inputs = self.inputs(model)
        direction = torch.randn_like(self.predict(model, **inputs))
        results = {}
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            assert model.config._attn_implementation == implementation
            results[implementation] = train_step(model, inputs, direction)
        (logits, grads), (expected, expected_grads) = results["sdpa"], results["eager"]
        torch.testing.assert_close(logits, expected, atol=tolerance * 10, rtol=0)
        assert len(expected_grads) == len(list(model.parameters()))
        assert_all_close(grads, expected_grads, tolerance)

    def test_attention_weights_are_returned(self, variant):
        model = self.make(variant, attn_implementation="eager")
        inputs = self.inputs(model)
        with torch.no_grad():
            output = model(**inputs, output_attentions=True, output_hidden_states=True)
        config = model.config
        if config.is_encoder_decoder:
            return check_attention_weights_of_all_places(config, output)
        heads = config.num_simulated_heads or config.num_attention_heads
        assert len(output.attentions) == config.num_hidden_layers
        assert len(output.hidden_states) == config.num_hidden_layers + 1
        batch, tokens = output.hidden_states[0].shape[:2]
        for weights in output.attentions:
            assert weights.shape == (batch, heads, tokens, tokens)
            torch.testing.assert_close(weights.sum(-1), torch.ones(batch, heads, tokens))
            if getattr(config, "is_causal", False):
                assert not weights.triu(1).any()

    def test_compiles_without_graph_breaks(self):
        for variant in self.compiled_variants:
            torch._dynamo.reset()
            model = self.make(variant)
            inputs = self.inputs(model)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(self.predict(compiled, **inputs), self.predict(model, **inputs))

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
    def test_activation_checkpointing_changes_nothing(self, variant, reentrant):
        model = self.make(variant).train()
        inputs = self.inputs(model)
        direction = torch.randn_like(self.predict(model, **inputs))
        logits, expected = train_step(model, inputs, direction)
        calls = []
        for module in model.modules():
            if type(module).__name__ == self.layer_class:
                next(module.children()).register_forward_pre_hook(lambda *_: calls.append(1))
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
        checkpointed, found = train_step(model, inputs, direction)
        assert len(calls) == 2 * model.config.num_hidden_layers  # the layers did run again
        # Not to the bit: without gradients, PyTorch may choose another kernel for a product that broadcasts.
        torch.testing.assert_close(checkpointed, logits, atol=1e-5, rtol=0)
        assert_all_close(found, expected, 1e-6)


def check_attention_weights_of_all_places(config, output) -> None:
    source, target = output.encoder_last_hidden_state.shape[1], output.logits.shape[1]
    places = {
        "encoder": (output.encoder_attentions, config.encoder_layers, source, source),
        "decoder": (output.decoder_attentions, config.decoder_layers, target, target),
        "cross": (output.cross_attentions, config.decoder_layers, target, source),
    }
    for name, (attentions, layers, queries, keys) in places.items():
        place = config.place(name)
        heads = place.num_simulated_heads or place.num_attention_heads
        assert len(attentions) == layers, name
        for weights in attentions:
            assert weights.shape == (2, heads, queries, keys), name
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, queries))
            assert name != "decoder" or not weights.triu(1).any()
            assert name == "decoder" or not weights[-1, :, :, 7:].any()  # padding
    assert len(output.encoder_hidden_states) == config.encoder_layers + 1
    assert len(output.decoder_hidden_states) == config.decoder_layers + 1


class LoadingTests:
    def test_save_and_load_is_exact(self, variant, tmp_path):
        model = self.make(variant)
        inputs = self.inputs(model)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert not loaded.training
        assert_identical(all_tensors(loaded), all_tensors(model))
        assert torch.equal(self.predict(loaded, **inputs), self.predict(model, **inputs))
        assert {file.name for file in tmp_path.iterdir()} <= {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }

    def test_configuration_survives_the_disk(self, variant, tmp_path):
        config = self.make(variant).config
        config.save_pretrained(tmp_path)
        loaded = type(config).from_pretrained(tmp_path)
        assert loaded.to_dict() | {"architectures": None} == config.to_dict() | {"architectures": None}
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == config.model_type

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_loads_in_half_precision(self, variant, dtype, tmp_path):
        model = self.make(variant)
        inputs = self.inputs(model)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert_identical(dict(loaded.named_parameters()), {name: p.to(dtype) for name, p in model.named_parameters()})
        assert_identical(dict(loaded.named_buffers()), dict(model.named_buffers()))  # angles stay in float32
        logits, expected = self.predict(loaded, **inputs), self.predict(model, **inputs)
        assert logits.dtype == dtype
        difference = (logits.float() - expected).square().mean().sqrt()
        assert difference < (0.15 if dtype == torch.bfloat16 else 0.04) * expected.std()

    @pytest.mark.parametrize("place", ["cpu", "auto", "disk"])
    def test_loads_through_the_meta_device(self, variant, place, tmp_path, monkeypatch):
        """With `device_map` weights are placed one by one; "disk" leaves the second layer there until it is used."""
        if place == "disk":  # what fetches the weights makes the fast paths step aside, which differ in last digits
            monkeypatch.setattr(fused_simulation, "is_plain", lambda simulation: False)
        model = self.make(variant)
        inputs = self.inputs(model)
        model.save_pretrained(tmp_path / "model")
        device_map = second_layer_on_disk(model, self.layer_class) if place == "disk" else place
        loaded = type(model).from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off"
        )
        assert any(p.device.type == "meta" for p in loaded.parameters()) == (place == "disk")
        torch.testing.assert_close(self.predict(loaded, **inputs), self.predict(model, **inputs))

    def test_weights_missing_from_a_checkpoint_start_as_in_a_new_model(self, variant, tmp_path):
        """No parameter may keep what the memory held."""
        config = self.make(variant).config
        new = self.model_class(config)
        new.save_pretrained(tmp_path, state_dict={"nothing": torch.zeros(1)})
        loaded = self.model_class.from_pretrained(tmp_path)
        for name, parameter in new.named_parameters():
            other, spread = loaded.get_parameter(name), parameter.std().item()
            if spread == 0:  # zeros or ones
                assert torch.equal(other, parameter), name
            else:
                assert spread / 2.5 < other.std().item() < spread * 2.5, name
        assert_identical(dict(loaded.named_buffers()), dict(new.named_buffers()))


def second_layer_on_disk(model, layer_class: str) -> dict[str, str]:
    """A device map that names every module above the layers, as Accelerate wants it."""
    layers = [name for name, module in model.named_modules() if type(module).__name__ == layer_class]
    places = {}
    for name, _ in model.named_modules():
        holds_layers = any(layer.startswith(f"{name}.") for layer in layers) or name == ""
        if not holds_layers and not any(name.startswith(f"{placed}.") for placed in places):
            places[name] = "disk" if name == layers[1] else "cpu"
    return places
