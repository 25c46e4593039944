"""Variants with another's cost: widths against counted weights, steps by timed ones; resumed, and refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from test_study import STUDY, write_study

from sas_hf.training import rehearsal, study_matched
from sas_hf.training.rehearsal import Pace
from sas_hf.training.sizes import count_parameters, meta_model
from sas_hf.training.study import load_study, plan_runs, run_study
from sas_hf.training.study_matched import RATIO_NAME, at_steps, at_width
from sas_hf.training.tasks import find_task


WIDE = {"variant": "mha", "to": "sas", "by": "parameters"}
LONG = {"variant": "mha", "to": "sas", "by": "seconds"}
MATCHED = {"matched": {"wide": WIDE, "long": LONG}, "learning_rates": [3e-3, 1e-3], "seeds": [3]}


def parameters(recipe):
    return count_parameters(meta_model(recipe, find_task(recipe.task).model_config(recipe)))[0]


def test_as_many_parameters_as_fit(tmp_path):
    runs = {run.variant: run for run in plan_runs(load_study(write_study(tmp_path, matched={"wide": WIDE})))}
    mha, sas, wide = (runs[name].recipe for name in ("mha", "sas", "wide"))
    assert list(runs) == ["mha", "sas", "wide"] and runs["wide"].folder == tmp_path / "out/wide/seed-5"
    width = wide.model.overrides["intermediate_size"]
    assert width > 32 and wide == replace(at_width(mha, width), training=wide.training)
    assert parameters(mha) < parameters(wide) <= parameters(sas) < parameters(at_width(mha, width + 1))


@pytest.fixture(scope="module")
def matched(tmp_path_factory):
    folder, messages = tmp_path_factory.mktemp("matched"), []
    report = run_study(load_study(write_study(folder, **MATCHED)), progress=messages.append)
    return folder, report, messages


def test_as_many_seconds(matched):
    """By their ratio; with the rate of the variant that it is, and its own place in the report."""
    folder, report, messages = matched
    out = folder / "out"

    kept = json.loads((out / "long" / RATIO_NAME).read_text())
    ratio, seconds = kept["ratio"], kept["seconds_per_step"]
    assert ratio == seconds["sas"] / seconds["mha"] and min(seconds.values()) > 0
    recipe = yaml.safe_load((out / "long/seed-3/recipe.yaml").read_text())
    steps = recipe["training"]["max_steps"]
    assert steps == max(1, round(6 * ratio)) and recipe["training"]["warmup_steps"] == max(1, round(steps / 6))
    of = yaml.safe_load((out / "mha/seed-3/recipe.yaml").read_text())
    for name in ("wide", "long"):
        theirs = yaml.safe_load((out / name / "seed-3/recipe.yaml").read_text())
        assert theirs["training"]["learning_rate"] == of["training"]["learning_rate"]
        assert not list((out / name).glob("rate-*"))
    assert [summary.variant for summary in report.summaries] == ["mha", "sas", "wide", "long"]
    assert [choice.variant for choice in report.rates] == ["mha", "sas"]
    width = next(match.width for match in report.matches)
    assert (
        f"run 7 of 8: wide, seed 3 (learning rate {of['training']['learning_rate']:g}; mha with width" in messages[6]
    )
    assert messages[7] == "steps of mha and of sas are timed side by side"
    assert f"mha with {steps:,} steps" in messages[8]
    document = (out / "study.md").read_text()
    assert f"| wide | mha | sas | parameters | width {width:,} |" in document
    assert f"| long | mha | sas | seconds | {steps:,} steps |" in document
    assert json.loads((out / "study.json").read_text())["matches"][1]["steps"] == steps


def test_the_ratio_is_measured_once(matched, monkeypatch):
    folder, _, _ = matched
    monkeypatch.setattr(study_matched, "steps_side_by_side", lambda recipes: [1.0, 9.0])
    messages = []
    run_study(load_study(folder / "study.yaml"), progress=messages.append)
    assert all("has ended, kept" in message for message in messages) and len(messages) == 8
    ratio = folder / "out/long" / RATIO_NAME
    kept = ratio.read_text()
    ratio.write_text(kept.replace('"to": "sas"', '"to": "gqa"'))
    with pytest.raises(FileExistsError, match=r"the ratio of other variants \({'to': 'gqa'}\)"):
        run_study(load_study(folder / "study.yaml"))
    ratio.write_text(kept)
    changed = load_study(
        write_study(folder, **MATCHED | {"matched": {"long": LONG | {"variant": "sas", "to": "mha"}}})
    )
    with pytest.raises(FileExistsError, match=r"more or other `matched` \(wide, long\)"):
        run_study(changed)


def test_steps_keep_the_share_of_their_warm_up(tmp_path):
    recipe = plan_runs(load_study(write_study(tmp_path)))[0].recipe
    training = at_steps(recipe, 30).training
    assert (training["max_steps"], training["warmup_steps"]) == (30, 5)
    share = at_steps(at_steps(recipe, 6), 30)
    share.training["warmup_steps"] = 0.25
    assert at_steps(share, 60).training["warmup_steps"] == 0.25


def test_steps_are_timed_in_turns(tmp_path, monkeypatch):
    """A step is its rows and what comes once; medians of rounds, in which all have their turn."""
    first, second = (run.recipe for run in plan_runs(load_study(write_study(tmp_path)))[:2])
    second = replace(second, training=second.training | {"gradient_accumulation_steps": 3})
    turns, rows = [], first.training["per_device_train_batch_size"]

    def rehearse(recipe, config, lengths, count):
        assert (lengths, count) == ((recipe.data.sequence_length,), rows)
        turns.append(config.num_simulated_heads)
        return Pace(row=float(len(turns)), optimiser=0.5, kept=0, rows=count, steps=3)

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    assert rehearsal.steps_side_by_side([first, second]) == [5.0 * rows + 0.5, 6.0 * 3 * rows + 0.5]
    simulated = plan_runs(load_study(tmp_path / "study.yaml"))[1].recipe.model.overrides["num_simulated_heads"]
    assert turns == [None, simulated] * rehearsal.ROUNDS


def test_steps_are_not_timed_in_several_processes(tmp_path, monkeypatch):
    run = plan_runs(load_study(write_study(tmp_path, matched={"long": LONG})))[-1]
    monkeypatch.setattr(study_matched, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="is measured in one process; begin the study in one"):
        run.timing.measure()
    assert not run.timing.path.parent.exists()


@pytest.mark.parametrize(
    ("matched", "message"),
    [
        ({"sas": WIDE}, "`matched` has the name 'sas', which is that of a variant"),
        ({"a b": WIDE}, "`matched` has the name 'a b'; a name is text"),
        ({"wide": {"variant": "mha", "to": "sas"}}, "`matched.wide` is .*; it must be of the form {variant: NAME"),
        ({"wide": WIDE | {"by": "tokens"}}, "`matched.wide` is .*; it must be of the form"),
        ({"wide": WIDE | {"to": "gqa"}}, "`matched.wide.to` is 'gqa', which is no variant, nor matched above it"),
        ({"a": WIDE | {"variant": "b"}, "b": WIDE | {"variant": "a"}}, "`matched.a.variant` is 'b', which is no"),
        ({"wide": WIDE | {"to": "wide"}}, "`matched.wide.to` is 'wide', which is no variant"),
        ({"a": LONG, "b": WIDE | {"to": "a"}}, r"whose steps are known only when .* made of \(mha, sas\)"),
        ({"a": WIDE | {"variant": "sas"}}, "'sas' as `variant` and as `to`; they must differ"),
        (
            {"a": WIDE | {"variant": "sas", "to": "mha"}},
            "a`, sas with the parameters of mha: it has .* match the other",
        ),
    ],
    ids=str,
)
def test_refused(matched, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan_runs(load_study(write_study(tmp_path, matched=matched)))


def test_epochs_have_no_steps_to_match(tmp_path):
    recipe = STUDY["recipe"] | {"training": STUDY["recipe"]["training"] | {"max_steps": None, "num_train_epochs": 1}}
    study = load_study(write_study(tmp_path, recipe=recipe, matched={"long": LONG}))
    with pytest.raises(ValueError, match="`matched.long`, mha with the seconds of sas: it goes by epochs"):
        plan_runs(study)
