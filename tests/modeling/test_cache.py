"""Cached forwards equal the uncached one: both cache forms, dynamic and static, padded, chunked, cropped, repeated.

Logits are compared, position by position, with those of one forward over the whole sequence without a cache.
"""

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
import transformers
from helpers import (
    CACHE_NAME,
    GPT_BASE,
    MHA_VARIANTS,
    PLAIN_VARIANTS,
    SAS,
    SAS_VARIANTS,
    TRANSFORMERS,
    gpt,
    gpt_config,
    left_padded,
    python_environment,
    returned_cache,
    token_ids,
)
from packaging.version import Version
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

import sas_hf
from sas_hf import SASGPTConfig, SASGPTForCausalLM


# The form of the cache means nothing without simulation.
CASES = [(name, "expanded") for name in PLAIN_VARIANTS]
CASES += [(name, form) for name in SAS_VARIANTS for form in ("expanded", "base")]
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=24),
}


@pytest.fixture(params=CASES, ids="-".join)
def model(request):
    variant, form = request.param
    return gpt(variant, simulation_cache=form)


@pytest.fixture(params=CACHES)
def new_cache(request):
    return CACHES[request.param]


@torch.no_grad()
def uncached(model, ids, positions=None):
    """Logits of one forward; the mask keeps jumps of the positions from reading as packed documents."""
    return model(ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False).logits


@torch.no_grad()
def cached(model, cache, ids, cuts, mask=None, positions=None):
    """Logits of successive forwards over `ids` up to each of `cuts`, with `cache` carried along."""
    logits, start = [], int(cache.get_seq_length())
    for stop in cuts:
        piece = slice(start, stop)
        output = model(
            ids[:, piece],
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=None if positions is None else positions[:, piece],
            cache=cache,
        )
        assert returned_cache(output) is cache
        logits.append(output.logits)
        start = stop
    return torch.cat(logits, dim=1)


def reset(cache):
    if isinstance(cache, DynamicCache) and Version("5.18") > TRANSFORMERS:
        pytest.skip("Before 5.18, a DynamicCache that is reset keeps its length: whatever the model.")
    cache.reset()


def assert_logits(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_prefill_steps_and_chunks(model, new_cache):
    ids = token_ids(2, 14)
    assert_logits(cached(model, new_cache(model), ids, (6, 7, 8, 11, 14)), uncached(model, ids))


def test_left_padding_at_prefill_and_at_every_step(model, new_cache):
    ids, mask = left_padded(14, 9, 7)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = cached(model, new_cache(model), ids, (9, 10, 11, 14), mask, positions)
    for row, real in enumerate(mask.bool()):
        assert_logits(logits[row, real], uncached(model, ids[row, real][None])[0])


def test_positions_with_gaps_and_restarts(model, new_cache):
    """Base keys are turned at use, so the cache must know where each of them stood."""
    ids = token_ids(2, 10)
    positions = torch.tensor([[0, 1, 2, 7, 8, 9, 3, 4, 20, 21], [5, 6, 7, 8, 0, 1, 2, 30, 31, 32]])
    logits = cached(model, new_cache(model), ids, (5, 6, 7, 10), torch.ones_like(ids), positions)
    assert_logits(logits, uncached(model, ids, positions))


def test_a_cache_that_is_reset_and_used_again(model, new_cache):
    cache = new_cache(model)
    long, short = token_ids(2, 14), token_ids(2, 8)
    cached(model, cache, long, (10, 11, 14), torch.ones_like(long), torch.arange(30, 44)[None].expand(2, -1))
    reset(cache)
    assert_logits(cached(model, cache, short, (4, 5, 6, 8)), uncached(model, short))


def test_a_cropped_cache(model):
    """As assisted decoding does with refused candidates."""
    cache = DynamicCache(config=model.config)
    ids = token_ids(2, 12)
    cached(model, cache, torch.cat((ids[:, :6], token_ids(2, 4)), dim=1), (6, 10))
    cache.crop(-4)
    assert_logits(cached(model, cache, ids, (7, 12)), uncached(model, ids)[:, 6:])


def test_a_repeated_cache(model):
    ids, mask = left_padded(12, 8)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    cached(model, cache, ids[:, :9], (9,), mask, positions)
    cache.batch_repeat_interleave(3)
    ids, mask, positions = (tensor.repeat_interleave(3, dim=0) for tensor in (ids, mask, positions))
    ids[:, 9:] = token_ids(6, 3)
    logits = cached(model, cache, ids, (10, 12), mask, positions)
    for row, real in enumerate(mask.bool()):
        assert_logits(logits[row], uncached(model, ids[row, real][None])[0, -3:])


@pytest.mark.parametrize(
    "change",
    [
        lambda cache, rows: cache.reorder_cache(rows),
        lambda cache, rows: cache.batch_select_indices(rows),
    ],
    ids=["reordered", "selected"],
)
def test_a_cache_whose_rows_move(model, change):
    """Rows with different padding change places, as when a server drops or reorders requests."""
    ids, mask = left_padded(12, 8)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    cached(model, cache, ids, (9,), mask, positions)
    rows = torch.tensor([1, 0])
    change(cache, rows)
    logits = cached(model, cache, ids[rows], (10, 12), mask[rows], positions[rows])
    for row, real in zip((0, 1), mask[rows].bool(), strict=True):
        assert_logits(logits[row], uncached(model, ids[rows][row, real][None])[0, -3:])


@pytest.mark.parametrize("model", [case for case in CASES if case[0] in MHA_VARIANTS], indirect=True, ids="-".join)
def test_cached_shapes(model, new_cache):
    """The form decides what is kept, in numbers per token."""
    config, cache = model.config, new_cache(model)
    cached(model, cache, token_ids(2, 9), (9,))
    length = 24 if isinstance(cache, StaticCache) else 9
    heads, width = config.num_key_value_heads, config.head_dim
    if config.simulates and config.simulation_cache == "expanded":
        heads, width = config.num_simulated_heads or heads, config.simulated_head_dim or width
    for layer in cache.layers:
        assert layer.keys.shape == (2, heads, length, width)
        assert layer.values.shape == (2, heads, length, config.head_dim)


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({}, 1_536),
        ({"num_simulated_heads": 36, "simulated_head_dim": 96}, 5_760),
        ({"num_simulated_heads": 36, "simulated_head_dim": 96, "simulation_cache": "base"}, 1_536),
    ],
    ids=["MHA", "expanded", "base"],
)
def test_numbers_per_token_at_125m(fields, numbers):
    model = SASGPTForCausalLM(SASGPTConfig(vocab_size=67, num_hidden_layers=1, intermediate_size=8, **fields))
    cache = returned_cache(model(token_ids(1, 1), use_cache=True))
    assert cache.layers[0].keys.numel() + cache.layers[0].values.numel() == numbers


def test_use_cache_decides_whether_a_cache_is_returned():
    model, ids = gpt("sas"), token_ids(1, 5)
    assert isinstance(returned_cache(model(ids, use_cache=True)), DynamicCache)
    assert returned_cache(model(ids, use_cache=False)) is None


ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
    },
}


def rope_model(rope_type: str, form: str, factor: float = 1.0, **overrides):
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, "partial_rotary_factor": factor} | ROPE_TYPES[rope_type]
    if rope_type == "longrope":
        for name in ("short_factor", "long_factor"):
            parameters[name] = (parameters[name] * 2)[: int(4 * factor)]
    fields = SAS | {"num_key_value_heads": 2, "rope_parameters": parameters, "simulation_cache": form}
    return gpt("mha", **(fields | overrides))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("form", ["expanded", "base"])
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_rope_types_within_the_trained_length(rope_type, form, factor, new_cache):
    model = rope_model(rope_type, form, factor)
    ids, mask = left_padded(14, 9)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = cached(model, new_cache(model), ids, (7, 8, 9, 14), mask, positions)
    for row, real in enumerate(mask.bool()):
        assert_logits(logits[row, real], uncached(model, ids[row, real][None])[0])


def short_rope_model(rope_type: str, **overrides):
    """A model whose angles change past 12 tokens."""
    model_length = 12 if rope_type == "dynamic" else 24
    parameters = {"rope_type": rope_type, "rope_theta": 1e4} | ROPE_TYPES[rope_type]
    if rope_type == "longrope":
        parameters["original_max_position_embeddings"] = 12
    model = rope_model(
        "default", "base", rope_parameters=parameters, max_position_embeddings=model_length, **overrides
    )
    ids = token_ids(1, 20)
    assert (uncached(model, ids)[:, :9] - uncached(model, ids[:, :9])).abs().max() > 0.01
    return model


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_lengths_that_change_the_angles_fit_the_base_cache(rope_type, new_cache):
    """Past the trained length all angles change. Base keys are turned anew at every step, so one layer stays exact."""
    model = short_rope_model(rope_type, num_hidden_layers=1)
    ids = token_ids(2, 20)
    # Transformers' dynamic angles remember the longest input, hence from short to long.
    expected = [uncached(model, ids[:, :stop])[:, -1] for stop in (10, 13, 14, 20)]
    uncached(model, ids[:, :5])
    logits = cached(model, new_cache(model), ids, (10, 13, 14, 20))
    assert_logits(logits[:, [9, 12, 13, 19]], torch.stack(expected, dim=1))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_reset_cache_forgets_positions_that_changed_the_angles(rope_type, new_cache):
    model = short_rope_model(rope_type)
    cache = new_cache(model)
    cached(model, cache, token_ids(2, 20), (20,))
    reset(cache)
    ids = token_ids(2, 9)
    assert_logits(cached(model, cache, ids, (7, 9)), uncached(model, ids))


def test_a_copied_cache_serves_many_continuations(model):
    """A prompt computed once, its cache copied for each continuation."""
    prompt, (ids, mask) = DynamicCache(config=model.config), left_padded(12, 8)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cached(model, prompt, ids[:, :8], (8,), mask, positions)
    for _ in range(2):
        ids[:, 8:] = token_ids(2, 4)
        logits = cached(model, copy.deepcopy(prompt), ids, (9, 12), mask, positions)
        for row, real in enumerate(mask.bool()):
            assert_logits(logits[row], uncached(model, ids[row, real][None])[0, -4:])


def test_rows_of_a_copied_cache_move_alone(model):
    """What is done to the rows of the copy leaves the original as it was."""
    cache, (ids, mask) = DynamicCache(config=model.config), left_padded(12, 8)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cached(model, cache, ids, (9,), mask, positions)
    copied, rows = copy.deepcopy(cache), torch.tensor([1])
    copied.batch_select_indices(rows)
    expected = [uncached(model, ids[row, real][None])[0, -3:] for row, real in enumerate(mask.bool())]
    assert_logits(cached(model, copied, ids[rows], (12,), mask[rows], positions[rows])[0], expected[1])
    assert_logits(cached(model, cache, ids, (12,), mask, positions), torch.stack(expected))


def saved_and_loaded(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [saved_and_loaded, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_cache_goes_on_after_it_was_saved(model, new_cache, again):
    """Prefixes kept on a disk, or sent to another process."""
    ids, mask = left_padded(12, 8)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = new_cache(model)
    cached(model, cache, ids, (9,), mask, positions)
    loaded = again(cache)
    assert [type(loaded), repr(loaded)] == [type(cache), repr(cache)]
    loaded.reorder_cache(torch.tensor([1, 0]))
    rows = torch.tensor([1, 0])
    logits = cached(model, loaded, ids[rows], (10, 12), mask[rows], positions[rows])
    for row, real in zip((0, 1), mask[rows].bool(), strict=True):
        assert_logits(logits[row], uncached(model, ids[rows][row, real][None])[0, -3:])


@pytest.mark.parametrize("change", ["batch_select_indices", "batch_repeat_interleave", "crop"])
def test_rows_of_a_loaded_cache_move(change):
    model, (ids, mask) = gpt("sas", simulation_cache="base"), left_padded(12, 8)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    cached(model, cache, ids, (9,), mask, positions)
    cache = saved_and_loaded(cache)
    rows, start = torch.tensor([1] if change == "batch_select_indices" else [0, 1]), 9
    if change == "crop":
        cache.crop(-2)
        start = 7
    elif change == "batch_select_indices":
        cache.batch_select_indices(rows)
    else:
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([0, 0, 1, 1])
    logits = cached(model, cache, ids[rows], (10, 12), mask[rows], positions[rows])
    for row, real in enumerate(mask[rows].bool()):
        assert_logits(logits[row], uncached(model, ids[rows][row, real][None])[0, start - 12 :])


OTHER_PROCESS = """
import pickle
import sys
from pathlib import Path
import torch
from sas_hf import SASGPTForCausalLM

for folder in map(Path, sys.argv[1:]):
    model = SASGPTForCausalLM.from_pretrained(folder)
    saved = torch.load(folder / "inputs.pt")
    caches = [torch.load(folder / "cache.pt", weights_only=False)]
    caches.append(pickle.loads((folder / "cache.pickle").read_bytes()))
    with torch.no_grad():  # positions are counted on from the cache there
        logits = [model(saved["ids"], attention_mask=saved["mask"], cache=cache).logits for cache in caches]
    torch.save(torch.stack(logits), folder / "logits.pt")
"""
SIMULATED_KINDS = ["sas", "head_only", "sas_learned", "mla_sas", "tpa_sas", "optimised_sas", "efficient_sas"]
SAVED = [(name, "expanded") for name in ("mha", "gqa", "learned", "mla", "tpa", "optimised", "efficient", "super")]
SAVED += [(name, form) for name in SIMULATED_KINDS for form in ("expanded", "base")]


def test_caches_are_read_by_another_process(tmp_path):
    """Of every kind and form."""
    (ids, mask), expected = left_padded(12, 8), {}
    for variant, form in SAVED:
        for kind, new in CACHES.items():
            model, folder = gpt(variant, simulation_cache=form), tmp_path / f"{variant}-{form}-{kind}"
            cache = new(model)
            cached(model, cache, ids, (9,), mask, (mask.cumsum(-1) - 1).clamp(min=0))
            model.save_pretrained(folder)
            torch.save({"ids": ids[:, 9:], "mask": mask}, folder / "inputs.pt")
            torch.save(cache, folder / "cache.pt")
            (folder / "cache.pickle").write_bytes(pickle.dumps(cache))
            with torch.no_grad():
                expected[folder] = model(ids[:, 9:], attention_mask=mask, cache=cache).logits
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, *map(str, expected)], check=True, env=python_environment())
    for folder, logits in expected.items():
        for found in torch.load(folder / "logits.pt"):
            torch.testing.assert_close(
                found, logits, atol=2e-4, rtol=0, msg=lambda m, name=folder.name: f"{name}: {m}"
            )


def test_a_dropped_cache_is_freed_at_once(model, new_cache):
    """By its last reference, not when the collector runs: caches are what fills an accelerator."""
    ids, mask = left_padded(12, 8)
    gc.disable()
    try:
        cache = new_cache(model)
        cached(model, cache, ids, (9, 12), mask)
        caches = [cache, copy.deepcopy(cache), saved_and_loaded(cache)]
        memory = [weakref.ref(each.layers[layer].keys) for each in caches for layer in (0, 1)]
        memory += [weakref.ref(each) for each in caches]
        del cache, caches
        output = model(ids, attention_mask=mask, use_cache=True)  # beside a graph
        memory += [weakref.ref(returned_cache(output)), weakref.ref(returned_cache(output).layers[0].values)]
        del output
        output = model.generate(ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True)
        memory.append(weakref.ref(returned_cache(output)))
        del output
        assert [reference() for reference in memory] == [None] * len(memory)
    finally:
        gc.enable()


SLIDING = {
    "dynamic": lambda window: DynamicSlidingWindowLayer(sliding_window=window),
    "static": lambda window: StaticSlidingWindowLayer(max_cache_len=24, sliding_window=window),
}


@pytest.mark.parametrize("model", SAVED, indirect=True, ids="-".join)
@pytest.mark.parametrize("kind", SLIDING)
@pytest.mark.parametrize("cuts", [range(1, 13), (3, 5, *range(6, 13))], ids=["tokens", "prefill"])
def test_a_cache_that_forgets(model, kind, cuts):
    """Of the last tokens alone, each at its own position: as if the others had been hidden."""
    window, ids, places = 5, token_ids(2, 12), torch.arange(12)
    seen = (places[:, None] >= places) & (places[:, None] - places < window)
    mask = torch.zeros(2, 1, 12, 12).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache = Cache(layers=[SLIDING[kind](window) for _ in model.model.layers])
    assert_logits(cached(model, cache, ids, cuts), expected)


@pytest.mark.parametrize("variant", ["mha", "sas", "efficient", "super", "qk_norm"])
def test_a_copied_layer_has_a_place_of_its_own_in_the_cache(variant):
    """Layers appended to a model (depth up-scaling) bear the index of those they were copied from."""
    model = gpt(variant, simulation_cache="base")
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers = 3
    ids = token_ids(2, 9)
    expected = uncached(model, ids)
    assert (expected - gpt_of_two(model, ids)).abs().max() > 0.1
    assert_logits(cached(model, DynamicCache(config=model.config), ids, (5, 6, 9)), expected)
    assert_logits(cached(model, DynamicCache(), ids, (5, 6, 9)), expected)


def gpt_of_two(model, ids):
    model.config.num_hidden_layers = 2
    logits = uncached(model, ids)
    model.config.num_hidden_layers = 3
    return logits


@pytest.mark.parametrize("form", ["expanded", "base"])
def test_compiled_decoding_with_a_static_cache(form):
    """Prefill plainly, then decode through one graph, as `generate` does on accelerators."""
    torch._dynamo.reset()
    model, ids = gpt("sas_k5_gqa", simulation_cache=form), token_ids(2, 12)
    cache = CACHES["static"](model)
    cached(model, cache, ids, (6,))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = getattr(cache.layers[0], "key_positions", None)
    logits = cached(compiled, cache, ids, range(7, 13))
    assert_logits(logits, uncached(model, ids)[:, 6:])
    assert getattr(cache.layers[0], "key_positions", None) is before  # written in place, as CUDA graphs need it
    assert (before is not None) == (form == "base")


def test_a_misspelt_form_on_a_live_model_is_refused():
    model = gpt("sas")
    model.config.simulation_cache = "bas"
    with pytest.raises(ValueError, match="`simulation_cache` is 'bas'.*'expanded', 'base'"):
        model(token_ids(1, 2))


def test_a_cache_of_another_form_is_refused():
    """As prefix tuning makes it, from the configuration's `num_key_value_heads` and `head_dim`."""
    model, cache = gpt("sas"), DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8), layer)
    with pytest.raises(ValueError, match=r"holds 4 heads of 8 features.*caches 12 of 12.*simulation_cache='base'"):
        model(token_ids(1, 2), cache=cache)
    model.config.simulation_cache = "base"
    model(token_ids(1, 2), cache=cache)


@pytest.mark.filterwarnings("default:`past_key_values` is deprecated")  # as Llama says it, see below
def test_the_cache_is_taken_under_both_of_its_names():
    """As Transformers 5.23's `generate` and older code pass it, and as 5.24's."""
    model, ids = gpt(**SAS), token_ids(1, 4)
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    with torch.no_grad():
        first = model(ids, **{CACHE_NAME: caches[0]}).logits
        second = model(ids, past_key_values=caches[1]).logits
    assert torch.equal(first, second)
    assert [cache.get_seq_length() for cache in caches] == [4, 4]


NAMED_ALIKE = [name for name in dir(sas_hf) if name.startswith("SASGPT") and not name.endswith("Config")]


@pytest.mark.parametrize("name", NAMED_ALIKE)
def test_the_old_name_of_the_cache_is_deprecated_where_llama_deprecates_it(name, tolerate_deprecations):
    """From Transformers 5.24 on: in the arguments of every model, and in what it gives."""
    said, given = [], []
    for package, prefix, config in (
        (transformers, "Llama", transformers.LlamaConfig(**GPT_BASE)),
        (sas_hf, "SASGPT", gpt_config("mha")),
    ):
        model = getattr(package, name.replace("SASGPT", prefix))(config).eval()
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            output = model(token_ids(1, 3), past_key_values=DynamicCache(config=model.config))
            expected = getattr(output, CACHE_NAME, None)
            given.append((list(output), hasattr(output, "past_key_values") and output.past_key_values is expected))
        said.append([(one.category, str(one.message).replace(prefix, "X")) for one in caught])
    assert said[1] == said[0] and given[1][1] == given[0][1]
    assert len(said[1]) == (CACHE_NAME == "cache")


def test_a_cache_that_is_only_read_is_not_returned():
    """`generate(use_cache=False)` would hand it in again, beside all the tokens it holds by then."""
    model, ids = gpt("sas"), token_ids(1, 6)
    cache = DynamicCache(config=model.config)
    cached(model, cache, ids, (3,))
    assert returned_cache(model(ids[:, 3:], cache=cache, use_cache=False)) is None


@pytest.mark.parametrize("kind", ["mla", "tpa", "efficient", "efficient_sas"])
def test_kinds_that_cache_no_such_keys_and_values_say_what_serves_instead(kind):
    model, cache = gpt(kind, simulation_cache="base"), DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8), layer)
    name = model.config.attention_type
    with pytest.raises(ValueError, match=f"4 heads of 8 features.*{name}.*prompt tuning, p-tuning and LoRA do"):
        model(token_ids(1, 2), cache=cache)
