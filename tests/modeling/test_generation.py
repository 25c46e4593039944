"""`generate` in its modes, packed documents and the bidirectional encoder.

What was generated is judged by its logits: each step's must equal those of one uncached forward over the result.
"""

import pytest
import torch
from helpers import CACHE_NAME, GPT_VARIANTS, PLAIN_VARIANTS, SAS_VARIANTS, gpt, left_padded, returned_cache, token_ids
from transformers import DynamicCache


CASES = [(name, "expanded") for name in PLAIN_VARIANTS]
CASES += [(name, form) for name in SAS_VARIANTS for form in ("expanded", "base")]
NEW = 6


@pytest.fixture(params=CASES, ids="-".join)
def model(request):
    variant, form = request.param
    return gpt(variant, simulation_cache=form, pad_token_id=0)


def generate(model, ids, mask=None, **options):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@torch.no_grad()
def judged(model, sequences, mask=None):
    """Logits that one forward per row gives for the generated tokens, `[B, NEW, vocabulary]`."""
    padded = 0 if mask is None else (mask == 0).sum(-1).tolist()
    rows = []
    for row, ids in enumerate(sequences):
        ids = ids[padded[row % len(padded)] if padded else 0 :]
        rows.append(model(ids[None], use_cache=False).logits[0, -NEW - 1 : -1])
    return torch.stack(rows)


def assert_judged(model, output, mask=None):
    logits = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(logits, judged(model, output.sequences, mask), atol=3e-4, rtol=0)
    return logits


@pytest.mark.parametrize("cache", [None, "static", "no cache"])
def test_greedy_with_padded_prompts(model, cache):
    ids, mask = left_padded(9, 5, 2)
    options = {"use_cache": False} if cache == "no cache" else {"cache_implementation": cache}
    output = generate(model, ids, mask, do_sample=False, **options)
    logits = assert_judged(model, output, mask)
    assert torch.equal(output.sequences[:, -NEW:], logits.argmax(-1))


def test_prefill_in_chunks(model):
    ids, mask = left_padded(9, 5)
    assert_judged(model, generate(model, ids, mask, do_sample=False, prefill_chunk_size=4), mask)


def test_sampling_is_seeded(model):
    ids, mask = left_padded(7, 4)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(generate(model, ids, mask, do_sample=True, temperature=1.5, num_return_sequences=3))
    assert results[0].sequences.shape == (6, 7 + NEW)
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert not torch.equal(results[0].sequences, results[2].sequences)
    assert_judged(model, results[2], mask.repeat_interleave(3, dim=0))


def test_beam_search(model):
    """The score of a beam is the mean log-probability of its tokens."""
    ids, mask = left_padded(8, 5)
    output = generate(
        model, ids, mask, do_sample=False, num_beams=4, num_return_sequences=2, output_scores=True, early_stopping=True
    )
    mask = mask.repeat_interleave(2, dim=0)
    chosen = judged(model, output.sequences, mask).log_softmax(-1).gather(-1, output.sequences[:, -NEW:, None])
    torch.testing.assert_close(output.sequences_scores, chosen.squeeze(-1).mean(-1), atol=1e-4, rtol=0)
    assert (output.sequences_scores[::2] >= output.sequences_scores[1::2]).all()


@pytest.mark.usefixtures("tolerate_deprecations")
def test_assisted_decoding(model):
    """The assistant's refused candidates are cropped from the cache."""
    assistant = gpt("mha", pad_token_id=0, num_hidden_layers=1)
    ids = token_ids(1, 7)
    output = generate(model, ids, do_sample=False, assistant_model=assistant)
    assert_judged(model, output)
    assert torch.equal(output.sequences, generate(model, ids, do_sample=False).sequences)


def test_prompt_lookup_decoding(model):
    ids = token_ids(1, 4).repeat(1, 3)
    assert_judged(model, generate(model, ids, do_sample=False, prompt_lookup_num_tokens=3))


def test_generation_continues_from_a_cache(model):
    ids = token_ids(1, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
    assert_judged(model, generate(model, ids, do_sample=False, **{CACHE_NAME: cache}))


def test_inputs_embeds(model):
    ids, mask = left_padded(9, 5)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "output_logits": True}
    output = model.generate(inputs_embeds=embeds, return_dict_in_generate=True, **options)
    expected = generate(model, ids, mask, do_sample=False)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-5, rtol=0)


def test_logits_to_keep():
    model, ids = gpt("sas"), token_ids(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        for keep, chosen in ((1, slice(-1, None)), (4, slice(-4, None)), (torch.tensor([0, 3, 5]), [0, 3, 5])):
            torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, logits[:, chosen])


DOCUMENTS = (6, 4, 1, 5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("variant", GPT_VARIANTS)
def test_packed_documents_equal_separate_ones(variant, is_causal, implementation):
    model = gpt(variant, is_causal=is_causal, attn_implementation=implementation)
    ids = token_ids(2, sum(DOCUMENTS))
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).expand(2, -1)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(document).logits for document in ids.split(DOCUMENTS, dim=1)], dim=1)
        one_row = model(ids[:1], position_ids=positions[:1]).logits  # with a new cache too
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(one_row, packed[:1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", GPT_VARIANTS)
def test_bidirectional_encoder(variant, implementation):
    """Every token sees every other, and padding on either side changes nothing."""
    model = gpt(variant, is_causal=False, attn_implementation=implementation)
    ids = token_ids(1, 10)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 67
    with torch.no_grad():
        assert (model(ids).logits - model(changed).logits).abs().amax(dim=(0, 2)).min() > 1e-3
        assert returned_cache(model(ids, use_cache=True)) is None
        for side in (1, -1):
            padded, mask = (tensor[:, ::1] if side == 1 else tensor.flip(1) for tensor in left_padded(10, 6))
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(padded, attention_mask=mask, position_ids=positions).logits
            for row, real in enumerate(mask.bool()):
                alone = model(padded[row, real][None]).logits[0]
                torch.testing.assert_close(logits[row, real], alone, atol=1e-4, rtol=0)


def test_bidirectional_encoder_does_not_generate():
    with pytest.raises(ValueError, match="is_causal"):
        gpt("sas", is_causal=False).generate(token_ids(1, 4), max_new_tokens=2)
