"""`benchmarks/cost.py` in its tiniest setting: what it counts, whether rivals are what they are called, its file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_all_close, python_environment


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SAS = ["sas", "sas-kept", "sas-base", "sas-plain", "sas-no_products", "sas-no_blocks", "sas-no_mean"]
TINY = ["--layers", "1", "--vocabulary", "64", "--lengths", "64", "--contexts", "8", "--tokens", "2", "--threads", "1"]


def cost(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / "cost.py", *TINY, *options]
    return subprocess.run([str(part) for part in command], env=python_environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    parts = ["bytes", "held", "memory-train", "memory-prefill", "cache", "operations-mean"]
    models = ["mha", "llama", "paper", *SAS, "mla", "super"]
    run = cost("--models", *models, "--parts", *parts, "--output", folder / "counts.json")
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def counts(folder) -> dict[str, dict[str, float]]:
    """By part, then by model; one length or none."""
    figures = json.loads((folder / "counts.json").read_text())["figures"]
    return {
        part: {name: entry["value"] for name, entry in next(iter(places.values())).items()}
        for part, places in figures.items()
    }


def test_a_simulated_layer_saves_as_little_as_a_plain_one(counts):
    saved = counts["bytes"]
    assert saved["sas"] <= 1.5 * saved["mha"]
    assert saved["sas-kept"] > 8 * saved["mha"]
    assert saved["llama"] == saved["mha"]
    for name, value in counts["held"].items():  # without the layer's input, 768 numbers per token
        assert value == pytest.approx(saved[name] - 768 * 4, rel=0.01), name


def test_what_is_switched_off_is_off(counts):
    saved, prefill = counts["bytes"], counts["memory-prefill"]
    assert saved["sas-plain"] == saved["paper"]
    assert saved["sas-no_products"] == saved["sas-kept"]
    assert saved["sas-no_mean"] == saved["sas"] + 2 * 768 * 4
    assert prefill["sas-no_blocks"] > prefill["sas"] and prefill["sas-plain"] > prefill["sas"]


def test_caches_are_counted_in_real_ones(counts):
    expected = {"mha": 1536, "llama": 1536, "sas": 5760, "sas-base": 1536, "mla": 288, "super": 1536}
    assert {name: counts["cache"][name] for name in expected} == expected


def test_peak_memory_holds_all_gradients(counts):
    gradients = (64 * 768 + 4 * 768**2 + 3 * 768 * 2048 + 3 * 768) * 4 / 2**20
    peak = counts["memory-train"]
    assert gradients < peak["mha"] < 1.2 * gradients
    assert peak["llama"] == pytest.approx(peak["mha"], rel=0.01)
    assert peak["paper"] > peak["mha"]


def test_all_names_of_one_simulation_compute_the_same(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from cost_rivals import make_model

    shared = {"num_hidden_layers": 2, "vocab_size": 64, "bos_token_id": None, "eos_token_id": None}
    ids = torch.randint(64, (2, 70))
    for family in (["sas-x2", "sas-x2-plain", "sas-x2-no_mean", "paper-x2"], ["sas-k3", "sas-k3-plain", "paper-k3"]):
        first, *others = [
            {"logits": make_model(name, "125m", **shared)(ids, use_cache=False).logits} for name in family
        ]
        for other in others:
            assert_all_close(other, first, 1e-5)


def test_heads_alone_and_fused_simulation(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from cost_rivals import make_config

    sas, heads, fused = (make_config(name, "125m").to_dict() for name in ("sas", "sas-heads", "sas-fused"))
    assert {name for name in sas if sas[name] != heads[name]} == {"simulated_head_dim", "query_pre_attn_scalar"}
    assert {name for name in sas if sas[name] != fused[name]} == {"compile_simulation"}


@pytest.mark.parametrize("name", ["mha-compiled", "llama-compiled", "sas-compiled", "sas-kept-compiled"])
def test_compiled_models_are_the_models_they_are_named_after(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from cost_rivals import make_model

    shared = {"num_hidden_layers": 1, "vocab_size": 64, "bos_token_id": None, "eos_token_id": None}
    compiled, plain = (make_model(each, "125m", **shared) for each in (name, name.removesuffix("-compiled")))
    assert compiled._compiled_call_impl is not None and plain._compiled_call_impl is None
    assert compiled.config.to_dict() == plain.config.to_dict()


def test_timed_figures_are_ratios_and_are_kept(tmp_path):
    output, image = tmp_path / "cost.json", tmp_path / "cost.png"
    options = ["--models", "mha", "sas", "--rounds", "3", "--output", output]
    run = cost(*options, "--parts", "train")
    assert run.returncode == 0, run.stderr
    before = json.loads(output.read_text())["figures"]["train"]["64"]
    rounds = {name: before[name]["rounds"] for name in ("mha", "sas")}
    ratios = [sas / mha for sas, mha in zip(rounds["sas"], rounds["mha"], strict=True)]
    assert sorted(ratios) == [before["sas"][field] for field in ("smallest", "ratio", "largest")]
    assert before["mha"]["ratio"] == 1

    more = ["train", "layer", "prefill", "decode-static", "decode-dynamic", "layer-decode"]
    run = cost(*options, "--parts", *more, "--lengths", 64, 32, "--plot", image)
    assert run.returncode == 0, run.stderr
    figures = json.loads(output.read_text())["figures"]
    assert figures["train"]["64"] == before  # not measured again
    assert figures["train"].keys() == {"64", "32"} and figures["layer-decode"]["8"]["sas"]["value"] > 0
    assert "layer-decode, 8" in run.stdout and image.read_bytes().startswith(b"\x89PNG")

    refused = cost(*options, "--parts", "train", "--batch", "2")
    assert refused.returncode == 2 and "holds figures with batch 1, not 2" in refused.stderr
    assert json.loads(output.read_text())["figures"] == figures


@pytest.mark.parametrize(
    "name, message",
    [("mah", "unknown kind"), ("mha-k5", "is not known"), ("sas-no_luck", "is not known"), ("super-sas", "simulated")],
)
def test_unknown_models_are_refused(name, message, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from cost_rivals import make_config

    with pytest.raises(ValueError, match=message):
        make_config(name, "125m")


def test_the_command_refuses_before_any_work(tmp_path):
    run = cost("--models", "mha", "sas-no_luck", "--output", tmp_path / "cost.json")
    assert run.returncode == 2 and "'sas-no_luck' is not known" in run.stderr
    assert not list(tmp_path.iterdir())
