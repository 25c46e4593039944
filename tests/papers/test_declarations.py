"""The declarations of the papers' items: all of them build and resolve, and show every printed row."""

import functools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from sas_hf.data.tokenized_text import longest_text
from sas_hf.papers.items import PAPERS, SIZES, find_place, item_names, load_item, study_fields
from sas_hf.papers.training import plan_parts
from sas_hf.report.printed import printed
from sas_hf.training.models import config_loader, load_config
from sas_hf.training.tasks import find_task


ITEMS = [(paper, name) for paper in PAPERS for name in item_names(paper)]
PLACES = [
    find_place(paper, name, size)
    for paper, name in ITEMS
    for size in SIZES
    if load_item(paper, name).kind == "training" and getattr(load_item(paper, name), size) is not None
]
# What is printed, but no item of its own ("better"'s Figure 1, a drawing, is not even that).
WITHOUT_ITEM = {
    "sas": {
        "section4.3": "the parameters that the simulation adds, which the named configurations have to the number"
    },
    "better": {},
}
BUILT = 1_000_000_000  # larger models are configurations only: even without weights, they take seconds each

places = pytest.mark.parametrize("place", PLACES, ids=[f"{p.paper}-{p.name}-{p.size}" for p in PLACES])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With all files that any grid takes from the user; nothing reads them before a training."""
    folder = tmp_path_factory.mktemp("data")
    for place in PLACES:
        for part in place.parts:
            for fields in part.grid.data.values():
                for name in {"train", "validation"} & fields.keys():
                    path = folder / fields[name].replace("*", ".txt")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
    return folder


@functools.cache
def parts_of(paper, name, size, folder):
    return plan_parts(find_place(paper, name, size), Path("runs"), Path("study"), folder, None, [])


def planned(place, folder):
    return parts_of(place.paper, place.name, place.size, folder)


def test_every_table_and_figure_is_an_item_or_has_a_reason():
    for paper in PAPERS:
        shown = {load_item(paper, name).printed for name in item_names(paper)}
        assert set(printed(paper)) == shown | WITHOUT_ITEM[paper].keys()
        assert not shown & WITHOUT_ITEM[paper].keys()
    for paper, name in ITEMS:
        item = load_item(paper, name)
        assert name == item.printed  # so that nobody has to look for it
        assert item.missing or None not in (item.cpu, item.paper)


@places
def test_its_trainings_can_be_planned(place, folder):
    parts = planned(place, folder)
    runs = [run for part in parts for run in part.runs]
    assert len({part.place.at.grid for part in parts}) == len(parts)
    names = [name for part in parts for name in part.place.at.data]
    assert len(set(names)) == len(names)  # estimates and figures tell parts by them
    for part in parts:
        assert len(part.runs) == len(part.place.variants) * len(part.place.at.data) * len(part.place.at.seeds) > 0
    for run in runs:
        task, recipe = find_task(run.recipe.task), run.recipe
        assert task.is_validated(recipe)
        metrics = {metric.name for metric in task.possible_metrics(recipe)}
        assert set(place.item.metrics) <= metrics, recipe
        sizes = (recipe.batch_size, recipe.training["per_device_train_batch_size"])
        assert recipe.batch_size is None or sizes[0] % sizes[1] == 0


@places
def test_its_models_are_there(place, folder):
    for run in (run for part in planned(place, folder) for run in part.runs):
        task, recipe = find_task(run.recipe.task), run.recipe
        if recipe.task in ("image_classification", "text_classification"):  # the data say how many classes there are
            known = config_loader(recipe.model)()
            assert recipe.model.overrides.keys() <= known.to_dict().keys()
            config = config_loader(recipe.model)(**recipe.model.overrides)
        else:
            config = load_config(recipe.model, task.auto_class)
            assert recipe.data.sequence_length <= longest_text(config)
        if 12 * config.num_hidden_layers * config.hidden_size**2 < BUILT:
            build(task.name, config.to_json_string())


@functools.cache
def build(task, config):
    """Without memory for the weights, once for all items."""
    fields = json.loads(config)
    with torch.device("meta"):
        model = find_task(task).auto_class.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    assert model.num_parameters() > 0


@places
def test_it_names_what_is_printed(place):
    table, item = place.table, place.item
    columns = {*table.columns, "average"}
    assert set(item.metrics.values()) <= columns
    assert {*filter(None, [item.saved, place.at.counted])} <= columns
    variants = {name for part in place.parts for name in part.variants}
    assert set(item.against.values()) <= variants | set(item.against)
    for part in place.parts:
        assert set(part.variants) <= part.grid.variants.keys()
        for name in part.variants:
            base = item.against.get(name, part.variants[0])
            assert base in part.variants
            for labels in part.at.data.values():
                for label in labels if isinstance(labels, list) else [labels]:
                    part.printed_row(name, label)  # raises where there is none, or several
        assert part.numbers.keys() == (set(part.variants) if item.figure == "sweep" else set())
    if place.size == "paper":
        assert place.at.stands_for is None and all(part.at.stands_for is None for part in place.parts)
    else:
        assert all(part.at.stands_for for part in place.parts)


@pytest.mark.parametrize("paper, name", [key for key in ITEMS if load_item(*key).kind == "training"])
def test_every_printed_row_is_shown(paper, name):
    item = load_item(paper, name)
    place = find_place(paper, name, "paper")
    shown = [
        part.printed_row(variant, label)
        for part in place.parts
        for labels in part.at.data.values()
        for label in (labels if isinstance(labels, list) else [labels])
        for variant in part.variants
    ]
    assert [row for row in place.table.rows if row not in shown] == []
    known = {
        variant
        for size in SIZES
        if getattr(item, size)
        for part in find_place(paper, name, size).parts
        for variant in part.variants
    }
    assert item.rows.keys() | item.against.keys() <= known


def test_items_that_share_a_grid_mean_the_same_by_a_name(folder):
    meant = {}
    for place in PLACES:
        for run in (run for part in planned(place, folder) for run in part.runs):
            fields = run.recipe.to_dict()
            key = str(run.folder)
            assert meant.setdefault(key, fields) == fields, (place.paper, place.name, key)


def test_data_of_the_hub_or_of_a_folder(folder, tmp_path):
    place = find_place("better", "table5", "paper")
    assert study_fields(place, None)["data"] == {"mnist": {"train": "ylecun/mnist"}}
    assert study_fields(place, folder)["data"] == {"mnist": {"train": str(folder / "mnist")}}
    with pytest.raises(FileNotFoundError, match=r"has no .*mnist; better table5 needs mnist \(a folder of"):
        study_fields(place, tmp_path)
    part = find_place("sas", "table1", "paper").parts[0]
    hub = {"train": "HuggingFaceFW/fineweb-edu", "config": "sample-100BT"}
    assert study_fields(part, None)["data"] == {"fineweb-edu-350m-50b": hub}
    with pytest.raises(ValueError, match="give --data FOLDER that holds amazon/train"):
        study_fields(find_place("better", "table9", "paper"), None)
