"""Text is made on a GPU as on the CPU: caches, compiled steps, CUDA graphs, continuous batching, quantised weights."""

import importlib.util

import pytest
import torch
from against_cpu import DEVICES, FIELDS
from helpers import CACHE_NAME, gpt, left_padded, token_ids
from transformers import BitsAndBytesConfig, GenerationConfig, StaticCache
from transformers.generation import ContinuousBatchingConfig


GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 66}
KINDS = [("mha", "expanded"), ("sas", "expanded"), ("sas", "base"), ("sas_k5_gqa", "expanded"), ("mla_sas", "base")]


def pair(variant: str, form: str, device: str):
    """The same model on the device in float32, and on the CPU in float64 by the definition."""
    fields = FIELDS if "sas" in variant else {"hidden_size": 256, "max_position_embeddings": 128}
    model = gpt(variant, **fields, simulation_cache=form)
    definition = gpt(variant, **fields, simulation_cache=form, attn_implementation="eager").double()
    definition.load_state_dict(model.state_dict())
    return model.to(device), definition


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("variant", "form"), KINDS)
def test_greedy_text(variant, form, cache, device):
    """With padded prompts. On a GPU Transformers compiles the steps of a static cache by itself."""
    model, definition = pair(variant, form, device)
    ids, mask = left_padded(9, 6)
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    found = model.generate(ids.to(device), attention_mask=mask.to(device), **GREEDY, **options)
    assert found.tolist() == definition.generate(ids, attention_mask=mask, **GREEDY).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "form"), KINDS)
def test_a_decoded_token_in_a_cuda_graph(variant, form):
    """Captured once, replayed with another token."""
    model, definition = pair(variant, form, "cuda")
    ids, cache = token_ids(1, 7), StaticCache(config=model.config, max_cache_len=16)
    stream, token = torch.cuda.Stream(), ids[:, 4:5].cuda()
    with torch.no_grad():
        model(ids[:, :4].cuda(), **{CACHE_NAME: cache})
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(token, **{CACHE_NAME: cache})  # the fifth token, and what is made once
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, **{CACHE_NAME: cache}).logits
        expected = definition(ids).logits
        for place in (5, 6):
            token.copy_(ids[:, place : place + 1])
            graph.replay()
            distance = (logits[0, 0].double().cpu() - expected[0, place]).norm() / expected[0, place].norm()
            assert distance < 5e-3


@pytest.mark.gpu
def test_a_cuda_graph_that_would_forget_positions_is_refused():
    model, _ = pair("sas", "base", "cuda")
    cache, token = StaticCache(config=model.config, max_cache_len=16), token_ids(1, 1).cuda()
    with torch.no_grad(), pytest.raises(ValueError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(token, **{CACHE_NAME: cache})


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "form"), KINDS)
def test_decoding_waits_for_nothing(variant, form):
    model, _ = pair(variant, form, "cuda")
    ids, mask = (tensor.cuda() for tensor in left_padded(9, 6))
    with torch.no_grad():
        static = StaticCache(config=model.config, max_cache_len=16)
        model(ids, **{CACHE_NAME: static})
        for given in ({}, {"attention_mask": torch.cat((mask, mask[:, -1:]), dim=1)}):
            dynamic = model(ids, attention_mask=mask if given else None, use_cache=True)[CACHE_NAME]
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(ids[:, :1], **{CACHE_NAME: dynamic}, **given)
                if not given:
                    model(ids[:, :1], **{CACHE_NAME: static})
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("variant", "form"), [("mha", "expanded"), ("sas", "base")])
def test_continuous_batching(variant, form, device):
    model, definition = pair(variant, form, device)
    prompts = [token_ids(length).tolist() for length in (5, 21, 1)]
    config = GenerationConfig(**GREEDY)
    pool = ContinuousBatchingConfig(page_size=8, num_blocks=32, max_batch_tokens=16)
    served = model.generate_batch(prompts, generation_config=config, continuous_batching_config=pool)
    for prompt, answer in zip(prompts, served.values(), strict=True):
        expected = definition.generate(torch.tensor([prompt]), generation_config=config)[0]
        assert answer.generated_tokens == expected[len(prompt) :].tolist()


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits, tmp_path):
    """Near the same model in float64, as near as rounded weights are; the simulation keeps its numbers."""
    model, definition = pair("sas", "expanded", "cpu")
    model.save_pretrained(tmp_path)
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    quantised = type(model).from_pretrained(tmp_path, quantization_config=config, device_map="cuda").eval()
    simulated = quantised.model.layers[0].self_attn.q_simulation.heads.expansion.weight
    assert simulated.dtype.is_floating_point
    ids = token_ids(2, 9)
    with torch.no_grad():
        found, expected = quantised(ids.cuda()).logits.double().cpu(), definition(ids).logits
    assert (found - expected).norm() < (0.15 if bits == 8 else 0.5) * expected.norm()
    assert (found - expected).norm() > 1e-4 * expected.norm()  # and quantised it is
    assert quantised.generate(ids.cuda(), **GREEDY).shape[1] > ids.shape[1]
