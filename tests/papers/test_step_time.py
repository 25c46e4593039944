"""Table 4 of the SAS paper, in its tiniest setting: models, what is needed, kept and refused."""

import json
from itertools import pairwise

import pytest
import torch

from sas_hf.configurations import SIZES, named_config
from sas_hf.modeling import SASGPTForCausalLM
from sas_hf.modeling.kinds import make_attention
from sas_hf.papers.items import find_place
from sas_hf.papers.step_time import (
    MODELS,
    Need,
    check_fits,
    count_need,
    make_jobs,
    printed_times,
    step_config,
    step_time,
)
from sas_hf.papers.timing import MEASURED_NAME
from sas_hf.report.turns import beside_first


TINY = {"sizes": ["cpu"], "models": ("mha", "mla", "sas", "sas-k5"), "length": 8, "rounds": 2, "device": "cpu"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def memory_is_freed_as_ever(monkeypatch):
    """So that these tests leave the process's malloc as it is."""
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")


def run(folder, progress=lambda text: None, **arguments):
    place = find_place("sas", "table4", "cpu")
    return step_time(place, folder, "sas-hf paper sas table4", progress, **TINY | arguments)


@pytest.mark.parametrize("size", [size for size in SIZES if size != "cpu"])
def test_models_of_a_size_have_as_many_parameters(size):
    """In their attention; TPA has up to 8 % more with the printed heads, and SAS with those of its simulation."""
    shapes = {model: step_config(model, size) for model in MODELS}
    with torch.device("meta"):
        layers = {model: make_attention(config, layer_idx=0) for model, config in shapes.items()}
    counts = {model: sum(p.numel() for p in layer.parameters()) for model, layer in layers.items()}
    for model, count in counts.items():
        assert count == pytest.approx(counts["mha"], rel=0.08 if model in ("tpa", "sas", "sas-k5") else 0.03), model
    assert shapes["sas"].simulation_kernel_size == 1 and shapes["sas-k5"].simulation_kernel_size == 5
    assert counts["sas-k5"] > counts["sas"]


def test_every_printed_number_has_its_place():
    place = find_place("sas", "table4", "paper")
    paper = printed_times(place)
    assert {size for size, _ in paper} == set(place.at.arguments["sizes"]) and len(paper) == 5 * 6
    assert paper["125m", "sas"] == 68.07 and paper["10.6b", "mla"] == 637.78
    assert set(find_place("sas", "table4", "cpu").at.arguments["sizes"]) <= {size for size, _ in paper}


@pytest.mark.parametrize("model", ["mha", "sas"])
def test_what_a_model_needs(model):
    config = named_config(f"{model}-cpu", num_hidden_layers=4)
    need = count_need(config, 2, 16)
    assert need.parameters == SASGPTForCausalLM(config).num_parameters()
    matrices = sum(
        w.numel() for n, w in SASGPTForCausalLM(config).named_parameters() if w.ndim == 2 and "_sim" not in n
    )
    attended = config.num_simulated_heads * (config.simulated_head_dim + 16) if model == "sas" else 2 * 64
    least = 3 * 2 * 2 * 16 * (matrices + 4 * 16 * attended)  # forward and twice that backward; of every pair of tokens
    assert need.operations == least if model == "mha" else need.operations > least
    assert need.kept >= 4 * 4 * 2 * 16 * 64  # of every layer at least its input, queries, keys and values


def test_gradients_are_there_for_one_model_alone():
    jobs = make_jobs({"mha": named_config("mha-cpu"), "sas": named_config("sas-cpu")}, 1, 8, CPU, "float32")
    for job in jobs.values():
        job()
        assert all(parameter.grad is not None for parameter in job.model.parameters())
        job.reset()
        assert all(parameter.grad is None for parameter in job.model.parameters())
    assert torch.equal(jobs["mha"].ids, jobs["sas"].ids)


def test_weights_of_all_lie_in_the_same_memory():
    jobs = make_jobs({"mha": named_config("mha-cpu"), "sas": named_config("sas-cpu")}, 1, 8, CPU, "float32")
    memories = {name: {w.untyped_storage().data_ptr() for w in job.model.parameters()} for name, job in jobs.items()}
    assert memories["mha"] == memories["sas"] and len(memories["mha"]) == 1
    for job in jobs.values():
        places = sorted((w.storage_offset(), w.numel()) for w in job.model.parameters())
        assert all(place % 64 == 0 for place, _ in places)
        assert all(place + size <= after for (place, size), (after, _) in pairwise(places))
        assert torch.isfinite(job.model(input_ids=job.ids, labels=job.ids).loss)
        assert job.model.lm_head.weight is job.model.model.embed_tokens.weight


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder, told = tmp_path_factory.mktemp("steps"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
        return folder, run(folder, told.append), told


def test_a_size_that_is_not_printed_is_compared_with_nothing(measured):
    _, result, told = measured
    models = result.numbers["sizes"]["cpu"]["models"]
    assert list(models) == ["mha", "mla", "sas", "sas-k5"] and models["sas"]["heads"] == 12
    assert result.comparisons == [] and len(result.grids) == 1
    assert [row[0] for row in result.grids[0].rows] == list(models)
    assert result.figure is not None and told[0] == "cpu: counting" and told[-1].endswith(" left")


def test_printed_ratios_stand_beside_what_was_measured(measured, tmp_path):
    """A size that was measured before, of which times are made up here: 125M is too large for a test."""
    content = json.loads((measured[0] / MEASURED_NAME).read_text())
    times = {"mha": [1.0, 2.0], "mla": [1.2, 2.0], "sas": [0.9, 1.0], "sas-k5": [2.0, 4.2]}
    content["figures"]["125m"] = {"models": beside_first(times), "seconds": 60.0}
    (tmp_path / MEASURED_NAME).write_text(json.dumps(content))
    told = []
    result = run(tmp_path, told.append, sizes=["cpu", "125m"])
    assert told == ["cpu: counting", "125m: counting"]
    compared = {comparison.what: comparison for comparison in result.comparisons}
    assert list(compared) == ["mla over mha, 125m", "sas over mha, 125m", "sas-k5 over mha, 125m"]
    assert [c.agreement for c in compared.values()] == ["smaller", "contradicts", "agrees"]
    assert compared["sas over mha, 125m"].printed == compared["sas-k5 over mha, 125m"].printed == 68.07 / 36.20
    assert result.grids[1].rows[1][:4] == ["mla", "13", "123.1", "1,600"]
    assert result.seconds == 60.0 + content["figures"]["cpu"]["seconds"]


def test_models_that_took_no_turns_together_are_measured_anew(measured, tmp_path):
    (tmp_path / MEASURED_NAME).write_bytes((measured[0] / MEASURED_NAME).read_bytes())
    result = run(tmp_path, models=("mha", "sas", "tpa"))
    assert list(result.numbers["sizes"]["cpu"]["models"]) == ["mha", "sas", "tpa"]
    assert list(json.loads((tmp_path / MEASURED_NAME).read_text())["figures"]["cpu"]["models"]) == [
        "mha",
        "sas",
        "tpa",
    ]


def test_what_does_not_fit_is_refused_with_what_it_needs():
    needs = {"mha": Need(2**40, 1, 2**38), "sas": Need(2**40, 1, 2**39)}
    with pytest.raises(
        ValueError, match=r"'7b': .* in float32, need about 10,240.0 GiB \(4,096.0 of weights, 6,144.0"
    ):
        check_fits("7b", needs, CPU, "float32")
    with pytest.raises(ValueError, match="in bfloat16, need about 5,120.0 GiB"):
        check_fits("7b", needs, CPU, "bfloat16")
    check_fits("tiny", {"mha": Need(1000, 1, 1000)}, CPU, "float32")
    check_fits("7b", needs, torch.device("mps"), "float32")  # where what is free is not known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": ["10.6b"], "batch": 10**6}, r"`sizes` holds '10.6b': .* GiB are free on cpu"),
        ({"sizes": ["125"]}, "`sizes` holds '125'; it must be some of cpu, 125m, 350m"),
        ({"sizes": []}, "`sizes` and `models` must not be empty"),
        ({"models": ("mha", "sas-k7")}, "`models` holds 'sas-k7'"),
        ({"length": 2048}, "`length` is 2048; these models read at most 1024 tokens"),
        ({"rounds": 0}, "`rounds` is 0"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"device": "abacus"}, "`device` is 'abacus', which cannot be used"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())
