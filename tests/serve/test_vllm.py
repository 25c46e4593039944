"""vLLM with this package's plugin beside Transformers: the same tokens and log-probabilities, or a refusal in words.

Those that need vLLM are marked, and run where it is installed: `make test-vllm`.
"""

import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import train_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from sas_hf import (
    SASEncoderConfig,
    SASEncoderForMaskedLM,
    SASEncoderForSequenceClassification,
    SASEncoderModel,
    SASGPTConfig,
    SASGPTForCausalLM,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    SASGPTModel,
    SASSeq2SeqConfig,
    SASSeq2SeqForConditionalGeneration,
)
from sas_hf.hub import export_model
from sas_hf.modeling.attention_functions import ALL_ATTENTION_FUNCTIONS, sdpa_attention_forward
from sas_hf.modeling.key_store import STATE_ATTENTION, CachePlace, state_form
from sas_hf.serve.vllm import refuse_model, refuse_parallelism, set_pooling


SMOLLM2 = os.environ.get("SAS_HF_SMOLLM2")
TABLE = os.environ.get("SAS_HF_TABLE")  # a file that the numbers are written to, as in docs/serving.md

# The CPU kernel has heads of 32, 64, 80, 96, ... features.
BACKBONE = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
KINDS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "mla": {"attention_type": "mla", "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    "tpa": {"attention_type": "tpa"},
    "optimised": {"attention_type": "optimised"},
    "efficient": {"attention_type": "efficient"},
}
SIMULATIONS = {
    "none": {},
    "heads": {"num_simulated_heads": 12},
    "features": {"simulated_head_dim": 64},
    "both": {"num_simulated_heads": 8, "simulated_head_dim": 64},
    "kernel 3": {"num_simulated_heads": 8, "simulation_kernel_size": 3},
    "identity": {"num_simulated_heads": 8, "simulated_head_dim": 64, "simulation_act": "identity"},
}
BACKBONES = {
    "like GPT-2": {
        "position_embedding_type": "learned",
        "mlp_type": "plain",
        "norm_type": "layer_norm",
        "attention_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
        "tie_word_embeddings": False,
        **SIMULATIONS["both"],
    },
    "like SmolLM3 and OLMo 2": {
        "qk_norm": "all_heads",
        "no_rope_layers": [1, 0],
        "norm_position": "post",
        "query_pre_attn_scalar": 50,
        **KINDS["gqa"],
        **SIMULATIONS["heads"],
    },
    "like Qwen3 and Phi": {
        "qk_norm": "per_head",
        "use_parallel_residual": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        **KINDS["gqa"],
    },
}
CELLS = {f"{kind}, {name}": KINDS[kind] | SIMULATIONS[name] for kind in KINDS for name in SIMULATIONS}
CELLS |= BACKBONES
# The base form: what keys and values are made of is cached. (Of plain "mha", "gqa" and "mqa" they are made of nothing
# smaller, and the form is the same.)
BASE = {f"{name}, base": fields | {"simulation_cache": "base"} for name, fields in CELLS.items()}
PROMPTS = [[5, 77, 200, 41, 9, 120, 8, 8], [90, 31, 7], list(range(100, 130))]


def scattered(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far from their start, so that a wrong computation shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.08)
    return model.eval()


def write(folder: Path, model_class, config) -> str:
    torch.manual_seed(0)
    scattered(model_class(config)).save_pretrained(folder)
    return str(folder)


def served(tmp_path: Path, jobs: list[dict], **environment) -> list[dict]:
    """What vLLM makes of the jobs (vllm_jobs.py)."""
    asked, answered = tmp_path / "jobs.json", tmp_path / "results.jsonl"
    asked.write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("vllm_jobs.py")), str(asked), str(answered)]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in answered.read_text().splitlines()]


def expected(folder: str, prompts: list[list[int]] = PROMPTS, new: int = 12) -> list[dict]:
    """Transformers' greedy tokens, and the log-probabilities of all tokens but the first."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        with torch.no_grad():
            scores = model(whole).logits.log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])[:, 0]
        rows.append({"tokens": whole[0, len(prompt) :].tolist(), "scores": scores.tolist()})
    return rows


def worst(answers: list[dict], rows: list[dict]) -> float:
    """The largest difference of log-probabilities; the tokens must be equal."""
    assert [answer["tokens"] for answer in answers] == [row["tokens"] for row in rows]
    return max(abs(difference) for difference in differences(answers, rows))


def differences(answers: list[dict], rows: list[dict]) -> list[float]:
    """Of log-probabilities: of the last tokens, where some were not asked for."""
    return [
        theirs - ours
        for answer, row in zip(answers, rows, strict=True)
        for theirs, ours in zip(answer["scores"], row["scores"][-len(answer["scores"]) :], strict=True)
    ]


# What is refused, and what is told to vLLM: without it.


def test_nothing_of_vllm_is_imported_before_it_calls():
    """Nor Transformers, when the room is imported; and vLLM finds the plugin."""
    code = "import sys, sas_hf.serve; assert not {'vllm', 'transformers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, sas_hf.serve.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    (point,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="sas_hf")
    assert point.load().__module__ == "sas_hf.serve.vllm"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SASGPTConfig(**BACKBONE, attention_type="super", architectures=["SASGPTForCausalLM"]), "'super'.*in one row"),
        (SASGPTConfig(**BACKBONE, architectures=["SASGPTForQuestionAnswering"]), "QuestionAnswering'.*it serves"),
        (SASGPTConfig(**BACKBONE, architectures=["SASGPTForTokenClassification"]), "TokenClassification'.*it serves"),
        (SASSeq2SeqConfig(architectures=["SASSeq2SeqForConditionalGeneration"]), "SASSeq2Seq.*it serves SASGPT"),
        (
            SASGPTConfig(
                **BACKBONE,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                architectures=["SASGPTForCausalLM"],
            ),
            "'rope_type'.` 'dynamic'.*longest text",
        ),
    ],
)
def test_what_vllm_would_serve_wrongly_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        refuse_model(config)


def test_what_vllm_serves_is_not_refused():
    for fields in CELLS.values():
        refuse_model(SASGPTConfig(**BACKBONE | fields, architectures=["SASGPTForCausalLM"]))
    refuse_model(SASEncoderConfig(architectures=["SASEncoderModel"]))


@pytest.mark.parametrize("name", CELLS)
def test_heads_are_shared_out_only_where_they_have_nothing_in_common(name):
    config = SASGPTConfig(**BACKBONE | CELLS[name])
    refuse_parallelism(config, SimpleNamespace(tensor_parallel_size=1))
    if name in ("mha, none", "gqa, none"):
        refuse_parallelism(config, SimpleNamespace(tensor_parallel_size=2))
        with pytest.raises(ValueError, match="`tensor_parallel_size` .3. must divide `num_key_value_heads`"):
            refuse_parallelism(config, SimpleNamespace(tensor_parallel_size=3))
    else:
        with pytest.raises(ValueError, match="`tensor_parallel_size` is 2, but .* made of one another"):
            refuse_parallelism(config, SimpleNamespace(tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (SASGPTConfig(classifier_pooling="last"), "LAST"),
        (SASGPTConfig(classifier_pooling="mean"), "MEAN"),
        (SASEncoderConfig(classifier_pooling="first"), "CLS"),
    ],
)
def test_a_classifier_reads_what_it_was_trained_to_read(config, told):
    pooler = SimpleNamespace(seq_pooling_type="whatever vLLM chose")
    architecture = f"{type(config).__name__.removesuffix('Config')}ForSequenceClassification"
    model = SimpleNamespace(hf_config=config, architecture=architecture, pooler_config=pooler)
    set_pooling(model, {"seq_pooling_type": "model_default"})
    assert pooler.seq_pooling_type == told


def test_heads_that_vllm_made_no_room_for_are_refused():
    """It takes the sizes from the configuration, and without the plugin those before simulation."""
    config = SASGPTConfig(**BACKBONE | SIMULATIONS["heads"], attn_implementation="eager")
    model = SASGPTForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.attn = SimpleNamespace(num_heads=4, num_kv_heads=4, head_size=32)
    model.config._attn_implementation = "vllm"
    with pytest.raises(
        ValueError, match="room for 4 heads and 4 key/value heads of 32 features, but .* 12 and 12 of 32"
    ):
        model(torch.tensor([PROMPTS[0]]))


@pytest.mark.parametrize(
    "name", ["gqa, both", "mla, none", "mla, both", "tpa, heads", "optimised, heads", "efficient, none"]
)
def test_an_engine_can_hold_what_keys_and_values_are_made_of(name, monkeypatch):
    """It gets the smallest state there is, and all that keys and values need besides are the angles."""
    model = scattered(SASGPTForCausalLM(SASGPTConfig(**BACKBONE | CELLS[name], simulation_cache="base")))
    ids = torch.tensor([PROMPTS[0]])
    wanted = model(ids).logits
    angles = model.model.rotary_emb(wanted, torch.arange(ids.shape[1])[None])
    held = []

    def attend(layer, query, first, second, attention_mask, **kwargs):
        assert attention_mask is None
        held.append(first[0, :, 0].numel() + second[0, :, 0].numel())
        form, place = state_form(layer.config), CachePlace(layer, None, None, {})
        key, value, _ = form.from_cache(layer, (first, second), place, angles, None)
        return sdpa_attention_forward(layer, query, key, value, None, scaling=layer.scaling)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, STATE_ATTENTION, attend)
    model.config._attn_implementation = STATE_ATTENTION
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    latents = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    sizes = {"gqa": 2 * 2 * 32, "tpa": 4 * (4 + 32), "optimised": 2 * 128, "efficient": 128}
    assert held == [sizes.get(name.split(",")[0]) or sum(latents)] * 2


# What vLLM computes, beside Transformers.


def generate_job(folder: str, calls: list[list[list[int]]] | None = None, **arguments) -> dict:
    return {"task": "generate", "model": folder, "prompts": calls or [PROMPTS], **arguments}


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict[str, tuple[dict, list[dict]]]:
    """Of each cell, what vLLM answers and what Transformers does: all in one process of vLLM's."""
    folder = tmp_path_factory.mktemp("cells")
    wanted = os.environ.get("SAS_HF_CELLS", "")  # a regular expression, to look at some alone
    fields = {name: own for name, own in (CELLS | BASE).items() if re.search(wanted, name)}
    models = {
        name: write(folder / name, SASGPTForCausalLM, SASGPTConfig(**BACKBONE | own)) for name, own in fields.items()
    }
    references = {name: expected(model) for name, model in models.items()}
    eager = "SAS_HF_COMPILED" not in os.environ  # vLLM compiles unless told otherwise; it takes three times as long
    found = served(folder, [generate_job(model, enforce_eager=eager) for model in models.values()])
    return {name: (result, references[name]) for name, result in zip(models, found, strict=True)}


@pytest.fixture(scope="module")
def numbers() -> Iterator[dict[str, str]]:
    """Filled by tests: of each cell the largest difference, and the tokens that are equal where not all are."""
    found = {}
    yield found
    if TABLE:
        lines = ["| | | " + " | ".join(SIMULATIONS) + " |", "|---|---|" + "---|" * len(SIMULATIONS)]
        for kind, form in itertools.product(KINDS, ("", ", base", ", encoder")):
            row = (found.pop(f"{kind}, {name}{form}", "·") for name in SIMULATIONS)
            lines.append(f"| {kind} | {form[2:] or 'expanded'} | " + " | ".join(row) + " |")
        lines += ["", *(f"- {name}: {number}" for name, number in found.items())]
        Path(TABLE).write_text("\n".join(lines).replace("e-0", "e-") + "\n")


@pytest.mark.vllm
@pytest.mark.parametrize("name", CELLS | BASE)
def test_tokens_and_log_probabilities(cells, numbers, name):
    """A batch of mixed lengths, of every kind under every simulation, in both forms of the cache."""
    if name not in cells:
        pytest.skip("not among SAS_HF_CELLS")
    result, rows = cells[name]
    assert "error" not in result, result["error"]
    answers = result["answers"][0]
    pairs = [
        pair for a, row in zip(answers, rows, strict=True) for pair in zip(a["tokens"], row["tokens"], strict=True)
    ]
    equal = sum(a == b for a, b in pairs)
    difference = max(map(abs, differences(answers, rows)))
    numbers[name] = f"{difference:.1e}" + f", {equal} of {len(pairs)} tokens" * (equal < len(pairs))
    assert equal == len(pairs)
    assert difference < 2e-5


@pytest.mark.vllm
@pytest.mark.parametrize("form", ["expanded", "base"])
def test_the_ways_of_an_engine(tmp_path, form):
    """Prefixes that are found in the cache, prompts in chunks, requests that wait, compiled code."""
    config = SASGPTConfig(**BACKBONE | SIMULATIONS["both"], simulation_cache=form)
    model = write(tmp_path / "model", SASGPTForCausalLM, config)
    long = [list(range(10, 100)), [*range(10, 90), 3, 4, 5]]
    rows, long_rows = expected(model), expected(model, long)
    chunks = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True, "max_num_seqs": 2}
    prefix = {"enable_prefix_caching": True, "block_size": 32, "prompt_scores": False}
    jobs = [
        generate_job(model, [long[:1], long[1:]], **prefix),
        generate_job(model, [PROMPTS, long], **chunks),
        generate_job(model, [PROMPTS, long], enforce_eager=False),
    ]
    results = served(tmp_path, jobs)
    assert not [result["error"] for result in results if "error" in result]
    (first, second), in_chunks, compiled = (result["answers"] for result in results)
    assert first[0]["cached"] == 0 and second[0]["cached"] == 64  # two whole blocks of what both begin with
    assert worst(first + second, long_rows) < 2e-5
    for short_answers, long_answers in (in_chunks, compiled):
        assert worst(short_answers, rows) < 2e-5
        assert worst(long_answers, long_rows) < 2e-5


@pytest.mark.vllm
@pytest.mark.parametrize("form", ["expanded", "base"])
def test_bfloat16_is_as_far_off_as_in_transformers(tmp_path, form):
    config = SASGPTConfig(**BACKBONE | SIMULATIONS["both"], simulation_cache=form)
    model = write(tmp_path / "model", SASGPTForCausalLM, config)
    prompts = [list(range(10, 100)), list(range(150, 250))]
    exact = expected(model, prompts, new=1)
    rounded_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = [rounded_model(torch.tensor([prompt])).logits[0, :-1].float() for prompt in prompts]
    scores = [
        {"scores": row.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()}
        for row, prompt in zip(logits, prompts, strict=True)
    ]
    (result,) = served(tmp_path, [generate_job(model, [prompts], dtype="bfloat16", max_tokens=1)])
    for rows in (exact, result["answers"][0]):
        for row in rows:
            del row["scores"][-1]  # of tokens that may differ
    theirs = torch.tensor(differences(scores, exact)).abs().mean()
    ours = torch.tensor(differences(result["answers"][0], exact)).abs().mean()
    assert 0 < ours < 1.5 * theirs


@pytest.mark.vllm
def test_other_tasks(tmp_path, numbers):
    """Classifiers and embeddings: the pooled tokens are those of training, or the last of a decoder."""
    both, three = SIMULATIONS["both"], {"num_labels": 3}
    encoder = {**BACKBONE, "max_position_embeddings": 128, "layer_norm_eps": 1e-5}
    base, mean = {"simulation_cache": "base"}, {"classifier_pooling": "mean"}
    classifier, reader = SASGPTForSequenceClassification, SASEncoderForSequenceClassification
    made = {
        "classifier": (classifier, SASGPTConfig(**BACKBONE | both | three)),
        "classifier, mean": (classifier, SASGPTConfig(**BACKBONE | both | three | mean)),
        "classifier, base": (classifier, SASGPTConfig(**BACKBONE | both | three | base)),
        "encoder, classifier": (reader, SASEncoderConfig(**encoder | both | three)),
        "encoder, classifier, mean, no pooler": (
            reader,
            SASEncoderConfig(**encoder | KINDS["gqa"] | three | mean, pooler_act=None),
        ),
        "encoder, several labels": (
            reader,
            SASEncoderConfig(**encoder | both | three, problem_type="multi_label_classification"),
        ),
        "embeddings": (SASGPTForCausalLM, SASGPTConfig(**BACKBONE | both)),
        "embeddings, like GPT-2": (SASGPTForCausalLM, SASGPTConfig(**BACKBONE | BACKBONES["like GPT-2"])),
        "embeddings, no head": (SASGPTModel, SASGPTConfig(**BACKBONE | both)),
        "embeddings, base": (SASGPTModel, SASGPTConfig(**BACKBONE | both | base)),
        "embeddings, both directions": (SASGPTModel, SASGPTConfig(**BACKBONE | both, is_causal=False)),
        "encoder, rope": (SASEncoderModel, SASEncoderConfig(**encoder | both, position_embedding_type="rope")),
        "encoder, masked words": (SASEncoderForMaskedLM, SASEncoderConfig(**encoder | both)),
    }
    for kind, name in itertools.product(KINDS, ("none", "both")):
        config = SASEncoderConfig(**encoder | KINDS[kind] | SIMULATIONS[name])
        made[f"{kind}, {name}, encoder"] = SASEncoderModel, config
    jobs, rows = [], []
    for name, (model_class, config) in made.items():
        folder = write(tmp_path / name, model_class, config)
        embeds = model_class not in (classifier, reader)
        if embeds:  # vLLM asks it how long a text may be
            train_tokenizer(300).save_pretrained(folder)
        job = {"task": "embed" if embeds else "classify", "model": folder, "prompts": [PROMPTS]}
        jobs.append(job | ({"runner": "pooling", "skip_tokenizer_init": False} if embeds else {}))
        model = (AutoModel if embeds else AutoModelForSequenceClassification).from_pretrained(folder)
        with torch.no_grad():
            outputs = [model(torch.tensor([prompt])) for prompt in PROMPTS]
        if embeds:
            token = 0 if config.model_type == "sas_encoder" else -1
            pooled = torch.stack([output.last_hidden_state[0, token] for output in outputs])
            rows.append(torch.nn.functional.normalize(pooled))
        else:
            logits = torch.cat([output.logits for output in outputs])
            rows.append(logits.sigmoid() if config.problem_type else logits.softmax(-1))
    for name, result, row in zip(made, served(tmp_path, jobs), rows, strict=True):
        assert "error" not in result, (name, result["error"])
        difference = (torch.tensor(result["answers"][0]) - row).abs().max().item()
        numbers[name] = f"{difference:.1e}"
        assert difference < 1e-5, name


@pytest.mark.vllm
def test_texts_of_a_pair_are_told_apart(tmp_path, numbers):
    """As a reranker's, by token types: also by code that was compiled before any were given."""
    fields = BACKBONE | SIMULATIONS["both"] | {"num_labels": 3}
    folder = write(tmp_path / "pairs", SASEncoderForSequenceClassification, SASEncoderConfig(**fields))
    untyped_config = SASEncoderConfig(**fields, type_vocab_size=0)
    untyped = write(tmp_path / "untyped", SASEncoderForSequenceClassification, untyped_config)
    prompts = [PROMPTS[0], PROMPTS[2]]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rows, alike = [], []
    with torch.no_grad():
        for prompt in prompts:
            ids, types = torch.tensor([prompt]), torch.tensor([[0] * 3 + [1] * (len(prompt) - 3)])
            rows.append(model(ids, token_type_ids=types).logits.softmax(-1))
            alike.append(model(ids).logits.softmax(-1))
    assert (torch.cat(rows) - torch.cat(alike)).abs().max() > 1e-2
    job = {"task": "pairs", "prompts": [prompts]}
    jobs = [job | {"model": folder}, job | {"model": folder, "enforce_eager": False}, job | {"model": untyped}]
    eager, compiled, refused = served(tmp_path, jobs)
    for name, result in {"eager": eager, "compiled": compiled}.items():
        difference = (torch.tensor(result["answers"][0]) - torch.cat(rows)).abs().max().item()
        numbers[f"encoder, texts of a pair, {name}"] = f"{difference:.1e}"
        assert difference < 1e-5, name
    assert "`type_vocab_size` is 0" in refused["error"]


@pytest.mark.vllm
def test_what_cannot_be_served_is_refused_at_the_start(tmp_path):
    """In words, before a request is answered."""
    widths = write(tmp_path / "width", SASGPTForCausalLM, SASGPTConfig(**BACKBONE, simulated_head_dim=48))
    mixing = write(tmp_path / "super", SASGPTForCausalLM, SASGPTConfig(**BACKBONE, attention_type="super"))
    both = write(tmp_path / "both", SASGPTForCausalLM, SASGPTConfig(**BACKBONE | SIMULATIONS["both"]))
    sees_all = write(tmp_path / "both ways", SASGPTForCausalLM, SASGPTConfig(**BACKBONE, is_causal=False))
    tokens = write(tmp_path / "tokens", SASGPTForTokenClassification, SASGPTConfig(**BACKBONE))
    translation = SASSeq2SeqConfig(
        vocab_size=300, hidden_size=64, num_attention_heads=2, encoder_layers=1, decoder_layers=1
    )
    seq2seq = write(tmp_path / "seq2seq", SASSeq2SeqForConditionalGeneration, translation)
    cases = [
        ({"model": widths}, "no heads of 48 features (`simulated_head_dim`)"),
        ({"model": mixing}, "`attention_type='super'`"),
        ({"model": both, "tensor_parallel_size": 2}, "`tensor_parallel_size` is 2"),
        ({"model": sees_all}, "`is_causal` is False"),
        ({"model": tokens, "runner": "pooling"}, "'SASGPTForTokenClassification'"),
        ({"model": seq2seq}, "'SASSeq2SeqForConditionalGeneration'"),
        (
            {"model": both, "hf_overrides": {"simulation_cache": "base"}, "kv_cache_dtype": "fp8"},
            "`kv_cache_dtype` is 'fp8'",
        ),
    ]
    results = served(tmp_path, [{"task": "start", "prompts": [], **arguments} for arguments, _ in cases])
    for result, (arguments, words) in zip(results, cases, strict=True):
        assert words in result.get("error", ""), (arguments, result)


@pytest.mark.vllm
def test_exports_with_and_without_the_plugin(tmp_path):
    """Without it vLLM runs the export's own code, and knows the heads before simulation alone."""
    folders = {}
    for name in ("gqa, none", "mla, none", "mha, both", "mha, heads"):
        model = write(tmp_path / name, SASGPTForCausalLM, SASGPTConfig(**BACKBONE | CELLS[name]))
        folders[name] = str(tmp_path / f"{name}, exported")
        export_model(model, folders[name])
    classifier = write(tmp_path / "c", SASGPTForSequenceClassification, SASGPTConfig(**BACKBONE))
    export_model(classifier, tmp_path / "classifier")
    rows = {name: expected(str(tmp_path / name)) for name in folders}
    jobs = [generate_job(folder, trust_remote_code=True) for folder in folders.values()]
    asks = {"task": "classify", "model": str(tmp_path / "classifier"), "prompts": [PROMPTS], "runner": "pooling"}
    jobs.append({**asks, "trust_remote_code": True})

    for name, result in zip(folders, served(tmp_path, jobs[:-1]), strict=False):
        assert worst(result["answers"][0], rows[name]) < 2e-5
    without = served(tmp_path, jobs, VLLM_PLUGINS="")
    for name, result in zip(folders, without, strict=False):
        if name == "gqa, none":
            assert worst(result["answers"][0], rows[name]) < 2e-5
        elif name == "mla, none":  # vLLM takes it for DeepSeek's
            assert "error" in result
        else:
            assert "Install `sas_hf` beside vLLM" in result["error"], result
    assert "Install `sas_hf` beside vLLM" in without[-1]["error"], without[-1]


@pytest.mark.vllm
def test_the_openai_server(tmp_path):
    """In processes of its own, which find the plugin by themselves; whole answers and streamed ones."""
    config = SASGPTConfig(**BACKBONE | SIMULATIONS["both"])
    model = write(tmp_path / "model", SASGPTForCausalLM, config)
    train_tokenizer(300).save_pretrained(model)
    (row,) = expected(model, [PROMPTS[0]])
    port = "8731"
    arguments = ["--model", model, "--port", port, "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(1)
        asked = {
            "model": model,
            "prompt": PROMPTS[0],
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

        def post(**more):
            body = json.dumps(asked | more).encode()
            url, header = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
            return urllib.request.urlopen(urllib.request.Request(url, body, header)).read().decode()

        assert json.loads(post())["choices"][0]["token_ids"] == row["tokens"]
        lines = [json.loads(line[6:]) for line in post(stream=True).splitlines() if line.startswith("data: {")]
        streamed = [token for line in lines for token in line["choices"][0].get("token_ids") or []]
        assert streamed == row["tokens"]
        assert len(lines) > 3
    finally:
        server.terminate()
        server.wait()


@pytest.mark.vllm
@pytest.mark.skipif(SMOLLM2 is None, reason="SAS_HF_SMOLLM2 names no folder with SmolLM2-135M")
def test_a_converted_checkpoint_writes_what_its_source_writes(tmp_path):
    """16 prompts x 64 tokens, both in vLLM."""
    from sas_hf.conversion import convert_checkpoint

    convert_checkpoint(SMOLLM2, tmp_path / "sas")
    prompts = [list(range(1000 * i, 1000 * i + 5 + i)) for i in range(1, 17)]
    arguments = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 1 << 30, "max_tokens": 64}
    source, converted = served(
        tmp_path,
        [
            generate_job(model, [prompts], prompt_scores=False, **arguments)
            for model in (SMOLLM2, str(tmp_path / "sas"))
        ],
    )
    equal = [a["tokens"] == b["tokens"] for a, b in zip(source["answers"][0], converted["answers"][0], strict=True)]
    assert sum(equal) == 16
