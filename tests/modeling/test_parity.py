"""Without simulation the model is Llama, or GPT-2, number for number; with an idle simulation too."""

import pytest
import torch
from helpers import GPT2_BACKBONE, GPT_BASE, left_padded, scramble, token_ids
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sas_hf import SASGPTConfig, SASGPTForCausalLM


ROPE = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0, 1.2, 1.4, 1.6],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 16,
    },
}


def llama_pair(**fields):
    fields = GPT_BASE | fields
    llama = scramble(LlamaForCausalLM(LlamaConfig(**fields)))
    ours = SASGPTForCausalLM(SASGPTConfig(**({"tie_word_embeddings": False} | fields))).eval()
    report = ours.load_state_dict(llama.state_dict())  # the same keys
    assert not report.missing_keys and not report.unexpected_keys
    return ours, llama


@torch.no_grad()
def assert_same(ours, theirs, tolerance, **inputs):
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=tolerance, rtol=0)


@pytest.mark.parametrize("rope_type", ROPE)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_equals_llama(rope_type, kv_heads):
    ours, llama = llama_pair(
        num_key_value_heads=kv_heads,
        max_position_embeddings=32,
        rope_parameters={"rope_type": rope_type, "rope_theta": 1e4} | ROPE[rope_type],
    )
    for length in (10, 24, 40):  # within and past the lengths that change the angles
        assert_same(ours, llama, 1e-5, input_ids=token_ids(2, length))
    ids, mask = left_padded(12, 7)
    assert_same(ours, llama, 1e-5, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "fields",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 12},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-2, "hidden_act": "gelu"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_equals_llama_with_its_options(fields, implementation):
    ours, llama = llama_pair(attn_implementation=implementation, **fields)
    assert_same(ours, llama, 1e-5, input_ids=token_ids(2, 14))


def test_gradients_equal_llamas():
    ours, llama = llama_pair(num_key_value_heads=2)
    ids = token_ids(2, 14)
    for model in (ours, llama):
        model(ids, labels=ids).loss.backward()
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-4)


def gpt2_state_dict(gpt2: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """GPT-2's tensors under our names; its `Conv1D` stores weights transposed, and q, k, v as one."""
    theirs, ours = gpt2.state_dict(), {}
    ours["model.embed_tokens.weight"] = ours["lm_head.weight"] = theirs["transformer.wte.weight"]
    ours["model.embed_positions.weight"] = theirs["transformer.wpe.weight"]
    for kind in ("weight", "bias"):
        ours[f"model.norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for index in range(gpt2.config.n_layer):
            source, target = f"transformer.h.{index}.", f"model.layers.{index}."
            qkv = theirs[f"{source}attn.c_attn.{kind}"].chunk(3, dim=-1)
            for name, tensor in zip("qkv", qkv, strict=True):
                ours[f"{target}self_attn.{name}_proj.{kind}"] = tensor.T if tensor.ndim == 2 else tensor
            for old, new in (
                ("attn.c_proj", "self_attn.o_proj"),
                ("mlp.c_fc", "mlp.up_proj"),
                ("mlp.c_proj", "mlp.down_proj"),
            ):
                tensor = theirs[f"{source}{old}.{kind}"]
                ours[f"{target}{new}.{kind}"] = tensor.T if tensor.ndim == 2 else tensor
            ours[f"{target}input_layernorm.{kind}"] = theirs[f"{source}ln_1.{kind}"]
            ours[f"{target}post_attention_layernorm.{kind}"] = theirs[f"{source}ln_2.{kind}"]
    return ours


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_gpt2(implementation):
    gpt2_config = GPT2Config(
        vocab_size=67,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        initializer_range=0.3,
        attn_implementation=implementation,
    )
    gpt2 = scramble(GPT2LMHeadModel(gpt2_config))
    ours = SASGPTForCausalLM(SASGPTConfig(**GPT_BASE, **GPT2_BACKBONE, attn_implementation=implementation)).eval()
    ours.load_state_dict(gpt2_state_dict(gpt2))
    assert_same(ours, gpt2, 1e-5, input_ids=token_ids(2, 64))
    ids, mask = left_padded(12, 7)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert_same(ours, gpt2, 1e-5, input_ids=ids, attention_mask=mask, position_ids=positions)


@pytest.mark.parametrize("groups", [1, 3])
def test_an_idle_simulation_changes_nothing(groups):
    """Heads copied, features padded with zeros, residuals zero, the source's scale: attention is the base's."""
    plain = scramble(SASGPTForCausalLM(SASGPTConfig(**GPT_BASE, num_key_value_heads=2)))
    config = SASGPTConfig(
        **GPT_BASE,
        num_key_value_heads=2,
        num_simulated_heads=4 * groups,
        simulated_head_dim=12,
        simulation_kernel_size=3,
        query_pre_attn_scalar=8,
    )
    simulated = SASGPTForCausalLM(config).eval()
    state = simulated.state_dict() | plain.state_dict()
    for name, tensor in state.items():
        if "_simulation" in name:
            state[name] = torch.zeros_like(tensor)
        if name.endswith("features.expansion.weight"):
            state[name] = torch.eye(12, 8)
        if name.endswith("heads.expansion.weight"):
            inputs = tensor.shape[1]
            for head in range(4 * groups):
                state[name][head, (head % 4) * inputs // 4, 1] = 1
    simulated.load_state_dict(state)
    assert_same(simulated, plain, 2e-5, input_ids=token_ids(2, 14))
