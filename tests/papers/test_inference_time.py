"""Table 4 of "You Need to Pay Better Attention", in its tiniest setting: models, ratios, what is kept and refused."""

import json
import statistics
import subprocess
import sys

import pytest
import torch
from helpers import python_environment

from sas_hf.papers.inference_time import (
    DATA_SETS,
    HEADS,
    KINDS,
    Inference,
    classifier_config,
    inference_time,
    make_jobs,
    printed_seconds,
    random_samples,
)
from sas_hf.papers.items import find_place
from sas_hf.papers.timing import MEASURED_NAME


SOME = ("standard", "efficient", "sas")
TINY = {"samples": {"imdb": 4, "mnist": 2}, "heads": (1, 4), "kinds": SOME, "rounds": 3, "batch": 3}


def run(folder, progress=lambda text: None, **arguments):
    place = find_place("better", "table4", "cpu")
    return inference_time(place, folder, "sas-hf paper better table4", progress, **TINY | arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder, told = tmp_path_factory.mktemp("inference"), []
    return folder, run(folder, told.append), told


@pytest.mark.parametrize("size", ["cpu", "paper"])
def test_the_declaration_has_every_data_set(size):
    assert list(find_place("better", "table4", size).at.arguments["samples"]) == list(DATA_SETS)


def test_every_printed_number_has_its_place():
    paper = printed_seconds(find_place("better", "table4", "cpu"))
    assert set(paper) == {(d, kind, h) for d in DATA_SETS for kind in KINDS if kind != "sas" for h in HEADS}
    assert paper["mnist", "standard", 4] == 5.27 and paper["amazon", "super", 8] == 2.77


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_models_differ_in_kind_and_heads_alone(data_set):
    for heads in HEADS:
        plain, ours = (classifier_config(data_set, kind, heads) for kind in ("standard", "sas"))
        assert plain.num_attention_heads == ours.num_attention_heads == heads
        assert plain.head_dim == ours.head_dim == plain.hidden_size // heads
        assert ours.num_simulated_heads == 3 * heads and 2 * ours.simulated_head_dim == 3 * ours.head_dim
        for kind in ("optimised", "efficient", "super"):
            config = classifier_config(data_set, kind, heads)
            fields = config.to_dict() | {"attention_type": "mha"}
            assert config.attention_type == kind and fields == plain.to_dict()


def test_all_samples_are_seen_in_batches():
    config = classifier_config("imdb", "standard", 1)
    jobs = make_jobs({"standard": config}, samples=5, batch=2)
    seen = []
    jobs["standard"].model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments[0]))
    jobs["standard"]()
    assert [len(batch) for batch in seen] == [2, 2, 1]
    assert torch.equal(torch.cat(seen), random_samples(config, 5))
    assert seen[0].shape == (2, 32) and seen[0].min() > 0  # whole texts: nothing is padding
    assert isinstance(jobs["standard"], Inference) and not jobs["standard"].model.training


def test_times_are_scaled_and_ratios_are_of_the_same_round(measured):
    _, result, _ = measured
    parts = result.numbers["parts"]
    assert list(parts) == ["IMDB, h = 1", "IMDB, h = 4", "MNIST, h = 1", "MNIST, h = 4"]
    for part in parts.values():
        models = part["models"]
        assert list(models) == list(SOME)
        for entry in models.values():
            ratios = [a / b for a, b in zip(entry["rounds"], models["standard"]["rounds"], strict=True)]
            assert entry["ratio"] == statistics.median(ratios) and len(ratios) == 3
            assert entry["seconds"] == pytest.approx(5000 * statistics.median(entry["rounds"]))
        assert models["efficient"]["operations_of_a_sample"] < models["standard"]["operations_of_a_sample"]
    raw = json.loads((measured[0] / MEASURED_NAME).read_text())["figures"]["MNIST, h = 1"]["models"]["sas"]
    assert raw["rounds"] == parts["MNIST, h = 1"]["models"]["sas"]["rounds"]


def test_printed_ratios_stand_beside_ours(measured):
    _, result, _ = measured
    compared = {comparison.what: comparison for comparison in result.comparisons}
    assert len(compared) == 2 * 2  # and sas, which the paper does not have, is compared with nothing
    one = compared["efficient over standard, MNIST, h=4"]
    entry = result.numbers["parts"]["MNIST, h = 4"]["models"]["efficient"]
    assert one.printed == 4.71 / 5.27 and one.n == 3 and one.neutral == 1
    assert (one.low, one.ours, one.high) == (entry["smallest"], entry["ratio"], entry["largest"])
    rows = result.grids[0].rows
    assert ["paper: efficient", "4", "0.170", "4.71"] in rows
    assert sum(row[0] == "sas" for row in rows) == 2 and not any(row[0] == "paper: sas" for row in rows)
    assert "IMDB 4, MNIST 2" in result.grids[0].caption and result.figure is not None


def test_the_time_left_is_told(measured):
    _, _, told = measured
    assert told[:2] == ["IMDB, h = 1: making 3 models", "IMDB, h = 1: warming up, standard"]
    assert told[-1].startswith("MNIST, h = 4: round 3 of 3, sas; about ") and told[-1].endswith(" left")
    assert len(told) == 4 * (1 + 3 * 4)


def test_what_is_measured_is_not_measured_again(measured):
    folder, result, _ = measured
    told = []
    again = run(folder, told.append)
    assert told == [] and again.numbers == result.numbers and again.seconds == result.seconds
    before = json.loads((folder / MEASURED_NAME).read_text())["figures"]
    more = run(folder, told.append, heads=(8,))
    assert {text.partition(":")[0] for text in told} == {"IMDB, h = 8", "MNIST, h = 8"} == set(more.numbers["parts"])
    after = json.loads((folder / MEASURED_NAME).read_text())["figures"]
    assert {name: after[name] for name in before} == before and len(after) == 6  # nothing is taken away


def test_other_settings_are_refused(measured):
    folder, _, _ = measured
    before = (folder / MEASURED_NAME).read_bytes()
    with pytest.raises(ValueError, match=r"measured.json holds figures with rounds 3, not 2"):
        run(folder, rounds=2)
    content = json.loads(before)
    content["settings"]["device"] = "another machine"
    (folder / MEASURED_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"holds figures with device 'another machine'"):
        run(folder)
    (folder / MEASURED_NAME).write_bytes(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": (3,)}, "`heads` holds 3, into which the 32 features of imdb cannot be split"),
        ({"heads": ()}, "`heads` is empty"),
        ({"samples": {"cifar10": 4}}, r"`samples` is \['cifar10'\]; it must be some of mnist, cifar100"),
        ({"samples": {"imdb": 0}}, "`samples.imdb` is 0; it must be at least 1"),
        ({"kinds": ("standard", "supper")}, r"`kinds` is \['standard', 'supper'\]"),
        ({"rounds": 0}, "`rounds` is 0"),
        ({"batch": 0}, "`batch` is 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_processes_that_would_slow_each_other_down_are_refused(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sas_hf"]
    command += ["paper", "better", "table4", "--output", str(tmp_path / "item")]
    shown = subprocess.run(command, env=python_environment(), capture_output=True, text=True)
    assert shown.returncode != 0 and not (tmp_path / "item").exists()
    assert "better table4 is measured by one process, and 2 were started" in shown.stderr
