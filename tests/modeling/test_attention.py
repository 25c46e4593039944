"""What attention computes: against a loop over heads and tokens, masks and padding, positions, the score scale."""

import math

import pytest
import torch
from helpers import GPT_VARIANTS, MHA_VARIANTS, gpt, gpt_config, left_padded, token_ids

from sas_hf.modeling.kinds import make_attention
from sas_hf.modeling.positions import SASRotaryEmbedding


ROPE_VARIANTS = [name for name in GPT_VARIANTS if "learned" not in name and name != "super"]


def turn(vector: torch.Tensor, position: int, width: int, theta: float) -> torch.Tensor:
    """Rotate feature pairs (i, i + width/2) of the leading `width` features, as complex numbers."""
    half = width // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / width)
    pairs = torch.complex(vector[:half], vector[half:width]) * torch.exp(1j * position * frequencies)
    return torch.cat((pairs.real, pairs.imag, vector[width:]))


@pytest.mark.parametrize("variant", MHA_VARIANTS)
def test_attention_equals_a_loop_over_heads_and_tokens(variant):
    config = gpt_config(variant, attn_implementation="eager")
    layer = make_attention(config, layer_idx=0).double()
    hidden, positions = torch.randn(1, 6, 32, dtype=torch.float64), torch.tensor([[0, 1, 2, 5, 6, 9]])
    query = layer.q_simulation(layer.q_proj(hidden).view(1, 6, -1, 8))[0]
    key = layer.k_simulation(layer.k_proj(hidden).view(1, 6, -1, 8))[0]
    value = layer.v_simulation(layer.v_proj(hidden).view(1, 6, -1, 8))[0]

    heads, width = query.shape[1:]
    output = torch.zeros(6, heads, 8, dtype=torch.float64)
    for head in range(heads):
        key_head = head * key.shape[1] // heads
        value_head = head * value.shape[1] // heads
        queries, keys = query[:, head], key[:, key_head]
        if config.rotary_dim:
            turned = [(turn(q, p, config.rotary_dim, 1e4), turn(k, p, config.rotary_dim, 1e4))
                      for q, k, p in zip(queries, keys, positions[0].tolist(), strict=True)]  # fmt: skip
            queries, keys = (torch.stack(side) for side in zip(*turned, strict=True))
        for token in range(6):
            scores = keys[: token + 1] @ queries[token] / math.sqrt(width)
            output[token, head] = scores.softmax(0) @ value[: token + 1, value_head]
    groups = output.unflatten(1, (-1, 4)).flatten(2)
    if config.head_aggregation == "concat":
        expected = layer.o_proj(output.flatten(1) / groups.shape[1])
    else:
        expected = sum(layer.o_proj(groups[:, group]) for group in range(groups.shape[1])) / groups.shape[1]

    angles = SASRotaryEmbedding(config)(hidden, positions) if config.rotary_dim else None
    mask = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)
    found, _ = layer(hidden, position_embeddings=angles, attention_mask=mask)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)  # angles are computed in float32


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", GPT_VARIANTS)
def test_padding_changes_no_row(variant, side, implementation):
    model = gpt(variant, attn_implementation=implementation)
    ids, mask = left_padded(12, 7, 1)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, real in enumerate(mask.bool()):
            alone = model(ids[row, real][None]).logits[0]
            torch.testing.assert_close(logits[row, real], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", GPT_VARIANTS)
def test_no_token_sees_the_future(variant):
    model, ids = gpt(variant), token_ids(1, 12)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 67
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(dim=(0, 2))
    assert difference[:7].max() < 1e-5
    assert difference[7:].min() > 1e-3


@pytest.mark.parametrize("variant", GPT_VARIANTS)
def test_a_prepared_mask_is_used(variant):
    """A 4-D mask that hides the third token equals a padding mask that does."""
    model, ids = gpt(variant), token_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[:, 2] = 0
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[:, 2] = False
    visible[2, 2] = True
    positions = torch.arange(9)[None]
    with torch.no_grad():
        found = model(ids, attention_mask=visible.expand(2, 1, 9, 9), position_ids=positions).logits
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    others = [0, 1, 3, 4, 5, 6, 7, 8]
    torch.testing.assert_close(found[:, others], expected[:, others], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
def test_rotary_positions_are_relative(variant):
    """Simulation must not see positions: a shift of all of them changes nothing, a gap does."""
    model, ids = gpt(variant), token_ids(1, 10)
    positions = torch.arange(10)[None]
    gap = positions + 5 * (positions > 4)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(model(ids, position_ids=positions + 30).logits, logits, atol=1e-3, rtol=0)
        packed = model(ids, position_ids=gap, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(packed[:, :5], logits[:, :5], atol=1e-4, rtol=0)
    assert (packed[:, 5:] - logits[:, 5:]).abs().amax() > 0.05


@pytest.mark.parametrize("variant", ["learned", "sas_learned"])
def test_learned_positions(variant):
    model = gpt(variant)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(token_ids(1, 65))
    ids = token_ids(1, 10)
    with torch.no_grad():
        logits, shifted = model(ids).logits, model(ids, position_ids=torch.arange(3, 13)[None]).logits
    assert (logits - shifted).abs().max() > 0.1


def test_score_scale_is_a_field():
    """Queries scaled by 1/2 under a four times smaller `query_pre_attn_scalar` give the same scores."""
    model, ids = gpt("linear", query_pre_attn_scalar=12.0), token_ids(1, 10)
    other = gpt("linear", query_pre_attn_scalar=3.0)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(ids).logits
        assert (other(ids).logits - expected).abs().max() > 0.05
        for layer in other.model.layers:  # the linear ablation is affine: this halves its output
            features = layer.self_attn.q_simulation.features
            for parameter in (features.expansion.weight, features.expansion.bias, features.residual.bias):
                parameter.mul_(0.5)
        torch.testing.assert_close(other(ids).logits, expected, atol=1e-4, rtol=0)


def test_attention_dropout_acts_in_training_alone():
    model, ids = gpt("sas", attention_dropout=0.5), token_ids(1, 10)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("variant", ["learned", "sas_learned"])
def test_hidden_dropout_takes_embeddings_and_both_branches(variant):
    """When all is dropped nothing reaches the last norm; these variants' biases would fill any branch left out."""
    model, ids = gpt(variant, hidden_dropout=1.0), token_ids(1, 10)
    reached = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: reached.append(inputs[0].abs().max().item()))
    with torch.no_grad():
        model(ids)
        model.train()(ids)
    assert reached[0] > 1 and reached[1] == 0


def test_exactly_one_kind_of_input():
    model = gpt("sas")
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(token_ids(1, 3), inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize("variant", ["learned", "sas_learned", "super"])
def test_absolute_positions_count_real_tokens(variant):
    """Without `position_ids`, padding on the left moves no token."""
    model = gpt(variant)
    ids, mask = left_padded(9, 5)
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[1, 4:], model(ids[1:, 4:]).logits[0], atol=1e-4, rtol=0)
