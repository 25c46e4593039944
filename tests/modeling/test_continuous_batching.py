"""Transformers' continuous batching gives what `generate` gives, or refuses with the reason."""

import pytest
import torch
from helpers import SAS_VARIANTS, gpt, token_ids
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig


NOT_SERVED = ("mla_", "tpa_", "efficient_")  # they cache something else than heads of keys and values
SERVED = ["mha", "gqa", "mqa", "learned", "optimised"]
SERVED += [f"{name}-base" for name in SAS_VARIANTS if not name.startswith(NOT_SERVED)]


def served_model(case: str, implementation: str = "sdpa"):
    variant, _, form = case.partition("-")
    return gpt(variant, simulation_cache=form or "expanded", attn_implementation=implementation)


def generation_config() -> GenerationConfig:
    return GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=66)


def assert_equals_generate(model, implementation, prompts, **options):
    """Same tokens, and the same log-probabilities of them as one forward over the whole gives."""
    pool = ContinuousBatchingConfig(page_size=8, num_blocks=32, return_logprobs=True, **options)
    served = model.generate_batch(prompts, generation_config=generation_config(), continuous_batching_config=pool)
    model.set_attn_implementation(implementation)
    assert len(served) == len(prompts)
    for prompt, answer in zip(prompts, served.values(), strict=True):
        expected = model.generate(torch.tensor([prompt]), generation_config=generation_config())[0]
        tokens = answer.generated_tokens
        assert tokens == expected[len(prompt) :].tolist()
        with torch.no_grad():
            logits = model(expected[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logits.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(answer.logprobs), chosen, atol=1e-3, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", SERVED)
def test_generate_batch_equals_generate(case, implementation):
    """Requests of different lengths, more tokens than one batch takes, and a prefix that two of them share."""
    model = served_model(case, implementation)
    prompts = [token_ids(length).tolist() for length in (5, 3, 21, 1)]
    prompts.append(prompts[2][:17] + token_ids(3).tolist())
    assert_equals_generate(model, implementation, prompts, max_batch_tokens=16)


def test_the_pool_cannot_hold_simulated_heads():
    with pytest.raises(ValueError, match="simulation_cache"):
        served_model("sas-expanded").generate_batch([[1, 2, 3]], generation_config=generation_config())


def test_block_tables_are_refused():
    pool = ContinuousBatchingConfig(max_blocks_per_request=4)
    with pytest.raises(ValueError, match="max_blocks_per_request"):
        served_model("sas-base").generate_batch(
            [[1, 2, 3]], generation_config=generation_config(), continuous_batching_config=pool
        )
