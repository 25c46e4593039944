"""Variants with another's cost: widths against counted weights, steps against the logs; resumed, and refused."""

import json
from dataclasses import replace

import pytest
import yaml
from test_study import STUDY, write_study

from sas_hf.training.reporting import read_log
from sas_hf.training.sizes import count_parameters, meta_model
from sas_hf.training.study import load_study, plan_runs, run_study
from sas_hf.training.study_matched import RATIO_NAME, at_steps, at_width, seconds_per_step
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
    """By the runs that tried the rates; with the rate of the variant that it is, and its own place in the report."""
    folder, report, messages = matched
    out = folder / "out"

    def by_hand(variant):
        medians = []
        for rate in ("rate-0.003", "rate-0.001"):
            speeds = sorted(line["tokens_per_second"] for line in read_log(out / variant / rate) if "loss" in line)
            assert len(speeds) == 3
            medians.append(8 * 32 / speeds[1])
        return sum(medians) / 2

    ratio = json.loads((out / "long" / RATIO_NAME).read_text())["ratio"]
    assert ratio == pytest.approx(by_hand("sas") / by_hand("mha"))
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
    assert f"mha with {steps:,} steps" in messages[7]
    document = (out / "study.md").read_text()
    assert f"| wide | mha | sas | parameters | width {width:,} |" in document
    assert f"| long | mha | sas | seconds | {steps:,} steps |" in document
    assert json.loads((out / "study.json").read_text())["matches"][1]["steps"] == steps


def test_the_ratio_is_measured_once(matched):
    """The times of the originals change; the ratio that was kept still holds, and so do the runs."""
    folder, _, _ = matched
    logs = list((folder / "out/sas").glob("rate-*/log.jsonl"))
    before = {path: path.read_text() for path in logs}
    for path in logs:
        lines = [json.loads(line) for line in before[path].splitlines()]
        slower = [line | {"tokens_per_second": line.get("tokens_per_second", 0) / 9} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in slower))
    messages = []
    run_study(load_study(folder / "study.yaml"), progress=messages.append)
    assert all("has ended, kept" in message for message in messages) and len(messages) == 8
    ratio = folder / "out/long" / RATIO_NAME
    kept = ratio.read_text()
    ratio.write_text(kept.replace('"to": "sas"', '"to": "gqa"'))
    with pytest.raises(FileExistsError, match=r"the ratio of other variants \({'to': 'gqa'}\)"):
        run_study(load_study(folder / "study.yaml"))
    ratio.write_text(kept)
    for path, text in before.items():
        path.write_text(text)
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


def test_what_has_not_ended_times_nothing(matched):
    folder, _, _ = matched
    rates = [folder / "out/mha" / rate for rate in ("rate-0.003", "rate-0.001")]
    assert seconds_per_step(rates) > 0
    assert seconds_per_step([folder / "out/none/seed-1"]) is None


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
