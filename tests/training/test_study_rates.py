"""The learning rate of each variant of a study: real searches, one of which diverges; what is kept and refused."""

import json

import pytest
import yaml
from rich.console import Console
from test_study import PLAIN, STUDY, write_study

from sas_hf.training.estimates import estimate
from sas_hf.training.folders import DIVERGED_NAME
from sas_hf.training.recipe import load_recipe
from sas_hf.training.study import load_study, plan_runs, run_study
from sas_hf.training.study_rates import RateChoice, at_rate, best_rate
from sas_hf.training.study_report import StudyReport
from sas_hf.training.tasks import Metric


# Without AdamW's bounds and a limit to the gradients a rate can be too high for any model.
SEARCH = {
    "recipe": STUDY["recipe"]
    | {"training": STUDY["recipe"]["training"] | {"max_steps": 8, "optim": "sgd", "max_grad_norm": 0.0}},
    "variants": {"mha": {"model": {"overrides": PLAIN}}},
    "learning_rates": [9.0, 0.1, 0.01],
    "seeds": [3],
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Folder, report and messages of a study of which one rate diverges."""
    folder, messages = tmp_path_factory.mktemp("searched"), []
    report = run_study(load_study(write_study(folder, **SEARCH)), progress=messages.append)
    return folder, report, messages


def test_a_variants_seeds_have_the_rate_that_ended_best(searched):
    folder, report, messages = searched
    named = [message.partition(": ")[2].partition(" (")[0] for message in messages]
    assert named == ["mha, rate 9", "mha, rate 0.1", "mha, rate 0.01", "mha, seed 3"]
    assert "(learning rate 0.1; about" in messages[-1]
    ended = {
        rate: json.loads((folder / f"out/mha/rate-{rate}/all_results.json").read_text())["eval_loss"]
        for rate in (0.1, 0.01)
    }
    assert ended[0.1] < ended[0.01]
    recipes = {
        path.parent.name: yaml.safe_load(path.read_text()) for path in (folder / "out").glob("mha/*/recipe.yaml")
    }
    rates = {place: recipe["training"]["learning_rate"] for place, recipe in recipes.items()}
    assert rates == {"rate-9.0": 9.0, "rate-0.1": 0.1, "rate-0.01": 0.01, "seed-3": 0.1}
    assert {place: recipe["training"]["seed"] for place, recipe in recipes.items()} == {
        "rate-9.0": 10**6, "rate-0.1": 10**6, "rate-0.01": 10**6, "seed-3": 3,
    }  # fmt: skip
    # The recipe's own are 3e-3 and a floor of 3e-4.
    assert all(recipe["minimum_learning_rate"] == pytest.approx(rates[p] / 10) for p, recipe in recipes.items())
    (choice,) = report.rates
    assert choice == RateChoice("mha", "", 0.1, {9.0: None} | ended) and choice.edge is None
    assert [run.seed for run in report.runs] == [3]  # the others do not count
    saved = json.loads((folder / "out/study.json").read_text())
    assert saved["rates"][0]["tried"][0] == {"rate": 9.0, "loss": None} and saved["rates"][0]["rate"] == 0.1
    assert f"| mha | {ended[0.01]:.4f} | {ended[0.1]:.4f}* | diverged |" in (folder / "out/study.md").read_text()


def test_what_has_been_tried_is_kept_and_cannot_change(searched):
    """A training that diverged is not begun again; seeds may come, rates may not; nor may they be another study's."""
    folder, _, _ = searched
    out = folder / "out"
    assert "NaN or infinite" in json.loads((out / "mha/rate-9.0" / DIVERGED_NAME).read_text())["error"]
    kept = {file: file.stat().st_mtime_ns for file in out.glob("mha/*/*") if file.is_file()}
    messages = []
    run_study(load_study(folder / "study.yaml"), progress=messages.append)
    assert all("has ended, kept" in message for message in messages) and len(messages) == 4
    assert {file: file.stat().st_mtime_ns for file in kept} == kept

    def refuses(message, overrides=(), **fields):
        with pytest.raises(FileExistsError, match=message):
            run_study(load_study(write_study(folder, **SEARCH | fields)), overrides)
        assert {file: file.stat().st_mtime_ns for file in kept} == kept

    refuses(r"another study \(learning_rates: \[9.0, 0.1, 0.01\] there, \[0.1, 0.01\] now", learning_rates=[0.1, 0.01])
    refuses(r"another study \(learning_rates: \[9.0, 0.1, 0.01\] there, \[\] now", learning_rates=[])
    other = {"output": str(folder / "other"), "runs": str(out)}
    refuses(r"Run mha, rate 9: .*training.weight_decay: 0.1 there, 0.2 now", ["training.weight_decay=0.2"], **other)
    # Before the first search, though which rate the seeds will have is not known yet:
    refuses(r"Run mha, seed 3: .*training.learning_rate: 0.1 there, 0.2 now", learning_rates=[0.2, 0.3], **other)


def test_shares_of_a_rate():
    """Of the simulation and of the floor; the recipe's own rate leaves all as it is."""
    recipe = load_recipe("cpu", ["simulation_learning_rate=6.0e-4"])
    assert recipe.training["learning_rate"] == 3e-3 and at_rate(recipe, 3e-3) == recipe
    other = at_rate(recipe, 6e-3)
    found = (other.training["learning_rate"], other.minimum_learning_rate, other.simulation_learning_rate)
    assert found == pytest.approx((6e-3, 6e-4, 1.2e-3)) and recipe.training["learning_rate"] == 3e-3
    plain = load_recipe("cpu", ["minimum_learning_rate=null", "training.learning_rate=null"])
    assert (
        at_rate(plain, 1e-4).training["learning_rate"] == 1e-4 and at_rate(plain, 1e-4).minimum_learning_rate is None
    )


def test_the_best_heeds_what_is_better():
    assert best_rate({1.0: 0.3, 2.0: 0.2, 3.0: None}, Metric("loss", "loss")) == 2.0
    assert best_rate({1.0: 0.3, 2.0: 0.2, 3.0: None}, Metric("bleu", "BLEU", higher_is_better=True)) == 1.0
    assert best_rate({1.0: None}, Metric("loss", "loss")) is None


def test_the_table_of_rates_fits_a_terminal_and_tells_edges(searched):
    tried = {1e-5 * 2**power: 4.0 - power / 8 for power in range(12)}
    names = ("standard-attention", "optimised-attention")
    rates = [RateChoice(names[0], "", max(tried), tried), RateChoice(names[1], "", min(tried), tried)]
    report = StudyReport(searched[1].runs, rates=rates)
    grids = [grid for grid in report.grids() if grid.title == "Learning rates"]
    assert max(grid.width for grid in grids) <= 80
    assert sum(len(grid.header) - 1 for grid in grids) == 12
    assert f"{names[0]} got the highest rate tried; {names[1]} got the lowest rate tried." in grids[-1].caption
    assert grids[-1].rows[0][-1] == "2.6250*"
    console = Console(width=80)
    with console.capture() as shown:
        for grid in grids:
            console.print(grid.rich())
    assert max(map(len, shown.get().splitlines())) <= 80


def test_searches_are_among_what_a_study_will_take(tmp_path):
    """One rate alone is every variant's, and needs none."""
    study = load_study(write_study(tmp_path, **SEARCH))
    (line,) = estimate(plan_runs(study)).lines
    assert line.runs == 4
    study.learning_rates = [0.1]
    (run,) = plan_runs(study)
    assert (run.seed, run.recipe.training["learning_rate"], run.searches) == (3, 0.1, ())
    with pytest.raises(ValueError, match="'training.learning_rate=1' sets what .* give it as `learning_rates`"):
        plan_runs(study, ["training.learning_rate=1"])
