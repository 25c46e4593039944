"""The report: every number with its circumstances, the papers' rows marked, differences with intervals, plots."""

import io
import json
import math

import numpy as np
import pytest
import rich.console
from matplotlib.container import BarContainer
from typer.testing import CliRunner

from sas_hf.cli import app
from sas_hf.eval import (
    EvaluationResult,
    Metric,
    PerplexityText,
    Report,
    SuiteColumn,
    SuiteResult,
    TaskResult,
    evaluate,
)
from sas_hf.eval.comparison import compare
from sas_hf.eval.plots import _bars, _perplexity_curves, _suite_bars, checkpoint_series
from sas_hf.eval.report import Grid
from sas_hf.report.printed import printed


def made_up(model, answers, parameters=353_450_000, **fields):
    """A result of sas_table1's first two columns from 0s and 1s per question."""
    tasks, columns = {}, {}
    for label, name, values in zip(("ARC-E", "ARC-C"), ("arc_easy", "arc_challenge"), answers, strict=True):
        score = Metric(float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))))
        count = len(values)
        tasks[name] = TaskResult(
            {"acc_norm": score}, count, count, "test", "a|b", 0, 1.0, scores={"acc_norm": values}, questions=f"{count}"
        )
        columns[label] = SuiteColumn("acc_norm", score, count, [name])
    average = Metric(sum(column.score.value for column in columns.values()) / 2, 0.01)
    result = EvaluationResult(
        model,
        parameters,
        tasks,
        dtype="float32",
        device="cpu",
        batch_size={"requested": "auto", "smallest": 3, "largest": 9},
        seconds=1.0,
        versions={"lm_eval": "0.4.13"},
        groups={"sas_table1": {"average": average}},
        suites={"sas_table1": SuiteResult(columns, average, complete=False, version=1.0)},
    )
    for name, value in fields.items():
        setattr(result, name, value)
    return result


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    first = [rng.integers(0, 2, 200).astype(float).tolist(), rng.integers(0, 2, 100).astype(float).tolist()]
    # The second knows what the first knows, and thirty answers more of the first task.
    wrong = [place for place, value in enumerate(first[0]) if value == 0][:30]
    better = [1.0 if place in wrong else value for place, value in enumerate(first[0])]
    return made_up("runs/a", first), made_up("runs/b", [better, first[1]])


def shown(report):
    console = rich.console.Console(width=200, file=io.StringIO())
    console.print(report.rich())
    return " ".join(console.file.getvalue().split())


def test_a_real_result_says_everything(checkpoint, benchmarks, tmp_path):
    result = evaluate(checkpoint, "sas_table1", data=benchmarks, limit=4, device="cpu")
    text, terminal = Report([result]).markdown(), shown(Report([result]))
    (row,) = [line for line in text.splitlines() if "| arc_easy | acc_norm |" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    score, sizes = result.tasks["arc_easy"].metrics["acc_norm"], result.batch_size
    assert cells[3:9] == [f"{score.value:.4f}", f"{score.stderr:.4f}", "validation", "4 of 6", "0", "float32"]
    assert cells[9] in (f"{sizes['smallest']} to {sizes['largest']}", str(sizes["largest"]))
    assert cells[10] == "1.0"
    for part in ("arc_easy, arc_challenge, sciq: evaluated on validation, which the folder has, instead of test",):
        assert part in text
    for part in (
        f"lm_eval {result.versions['lm_eval']}",
        "before a text without context",
        "Table 1 has no model of about",
    ):
        assert part in text and part in terminal
    assert f"{100 * result.suites['sas_table1'].average.value:.2f} ± " in text


def test_results_survive_their_file(checkpoint, benchmarks, tmp_path):
    result = evaluate(
        checkpoint, "sas_table1", columns=["PIQA"], data=benchmarks, output=tmp_path / "r.json", device="cpu"
    )
    assert EvaluationResult.load(tmp_path / "r.json") == result
    content = (tmp_path / "r.json").read_text()
    assert json.dumps(result.tasks["piqa"].scores["acc"]) in content  # on one line
    for broken in ("[1]", '{"tasks": 3}', "not json"):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ValueError, match=r"broken\.json"):
            EvaluationResult.load(tmp_path / "broken.json")


def test_the_paper_s_rows_of_the_model_s_size_are_marked(pair):
    text = Report(pair).markdown()
    rows = [line for line in text.splitlines() if line.startswith("| *paper: ")]
    assert len(rows) == 12
    assert "| *paper: SAS 350M, 50B tokens* | 60.44 | 31.66 |  |" in rows  # no average of two columns
    assert "the average is not the paper's" in text
    assert "paper: SAS 350M, 50B tokens" in shown(Report(pair))
    assert "paper: " not in Report(
        [made_up("x", [[0.0, 1.0], [1.0, 0.0]], parameters=135_000_000)]
    ).markdown().replace("the paper", "")


def test_the_paper_s_rows_of_another_size_are_shown_where_asked_for(pair, tmp_path):
    rows = [line for line in Report(pair, ["1.5B"]).markdown().splitlines() if line.startswith("| *paper: ")]
    assert rows and all("1.5B" in row for row in rows)
    with pytest.raises(ValueError, match=r"`paper_sizes` has '2B'; the papers' tables .* have 350M, 760M, 1.5B"):
        Report(pair, ["2B"])
    pair[0].save(tmp_path / "r.json")
    arguments = ["eval-report", str(tmp_path / "r.json"), "--report", str(tmp_path / "report")]
    run = CliRunner().invoke(app, [*arguments, "--paper-sizes", "760M"])
    assert run.exit_code == 0 and "760M" in (tmp_path / "report" / "report.md").read_text()


def test_what_guessing_would_give_stands_in_tables_and_pictures(checkpoint, benchmarks):
    result = evaluate(checkpoint, "sas_table1", data=benchmarks, device="cpu")
    choices = {"PIQA": 2, "WinoGrande": 2, "SocialIQA": 3, "HellaSwag": 4, "SciQ": 4}
    report = Report([result])
    for label, count in choices.items():
        assert report.chance("sas_table1")[label] == pytest.approx(1 / count), label
    (row,) = [line for line in report.markdown().splitlines() if line.startswith("| chance |")]
    assert "33.33" in row and row.count("50.00") == 2
    assert "what people want, feel or do next" in report.markdown()
    before = made_up("old", [[0.0, 1.0], [1.0, 0.0]])  # of a version that did not know it
    assert Report([result, before]).chance("sas_table1")["ARC-E"] == report.chance("sas_table1")["ARC-E"]
    axes = _suite_bars(report, "sas_table1").axes[0]
    levels = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert len(levels) == 8 and levels[3] == pytest.approx(50.0)  # seven columns and their average


def test_paired_differences(pair):
    first, second = pair
    by_name = {each.name: each for each in compare(first, second)}
    assert list(by_name) == ["sas_table1: ARC-E", "sas_table1: ARC-C", "sas_table1: average"]
    a, b = (np.array(result.tasks["arc_easy"].scores["acc_norm"]) for result in pair)
    each = by_name["sas_table1: ARC-E"]
    assert each.difference == pytest.approx((b - a).mean()) == pytest.approx(0.15)
    assert each.stderr == pytest.approx(np.std(b - a, ddof=1) / math.sqrt(200))
    reach = 1.97196 * each.stderr  # Student's t of 199 degrees of freedom
    assert (each.low, each.high) == pytest.approx((0.15 - reach, 0.15 + reach), abs=1e-6)
    assert each.significant and each.num_samples == 200
    # Far tighter than two independent means would be.
    assert each.stderr < 0.6 * math.hypot(*(result.tasks["arc_easy"].metrics["acc_norm"].stderr for result in pair))
    assert by_name["sas_table1: ARC-C"].difference == 0 and not by_name["sas_table1: ARC-C"].significant
    average = by_name["sas_table1: average"]
    assert (average.difference, average.stderr) == pytest.approx((0.075, each.stderr / 2))
    text = Report(pair).markdown()
    assert "| sas_table1: ARC-E | +15.00 |" in text and "Student's t" in text


def test_a_small_gain_is_not_sold_as_one():
    """0.4 points on 1,000 questions, gained on 52 and lost on 48."""
    first = [0.0] * 52 + [1.0] * 48 + [1.0] * 900
    second = [1.0] * 52 + [0.0] * 48 + [1.0] * 900
    found = compare(made_up("a", [first, [0.0, 1.0]]), made_up("b", [second, [0.0, 1.0]]))[0]
    assert found.difference == pytest.approx(0.004) and not found.significant


def test_a_task_of_the_harness_may_have_a_perplexity_of_its_own(pair):
    for result in pair:
        score = {"perplexity": Metric(12.5, 0.5), "acc": Metric(0.5, 0.1)}
        result.tasks["lambada_openai"] = TaskResult(score, 4, 4, "test", "x", 0, 1.0, scores={"acc": [0.0, 1.0] * 2})
    text = Report(pair).markdown()
    assert "| lambada_openai | perplexity | 12.5000 |" in text and "Perplexity by context length" not in text
    assert "lambada_openai: acc" in {each.name for each in compare(*pair)}


def test_few_samples_need_a_larger_difference():
    """Four questions whose differences are 2.5 standard errors from zero: beyond 1.96, within 3.18 of Student's t."""
    first = [0.0, 0.0, 0.0, 0.0]
    second = [0.05, 0.15, 0.2, 0.4]
    found = compare(made_up("a", [first, [0.0, 1.0]]), made_up("b", [second, [0.0, 1.0]]))[0]
    assert 1.96 < found.difference / found.stderr < 3.18 and not found.significant


def test_different_questions_are_not_compared(pair):
    first, second = pair
    second.tasks["arc_easy"].questions = "others"
    with pytest.raises(ValueError, match="runs/a and runs/b were asked different questions in task 'arc_easy'"):
        compare(first, second)
    assert "Not compared: runs/a and runs/b" in Report(pair).markdown()


def test_files(pair, tmp_path):
    paths = Report(pair).save(tmp_path / "new" / "report")
    names = ["report.md", "report.json", "benchmarks-sas_table1.png", "benchmarks-sas_table1.svg"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "new" / "report").iterdir()) == sorted(names)
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    picture = paths[3].read_text()
    assert picture.startswith("<?xml") and "ARC-E" in Report(pair).markdown()
    content = json.loads(paths[1].read_text())
    assert content["comparisons"]["differences"]["b"][0]["difference"] == pytest.approx(0.15)
    assert content["papers"]["sas_table1"][0]["model"] == "MHA"
    assert EvaluationResult.from_dict(content["results"][0]) == pair[0]


def test_checkpoints_of_a_training_are_a_curve(pair, tmp_path):
    first, second = pair
    first.model, second.model, first.step, second.step = "runs/checkpoint-200", "runs/checkpoint-100", 200, 100
    elsewhere = made_up("other/checkpoint-100", [[0.0, 1.0], [1.0, 0.0]], step=100)
    (members,) = checkpoint_series([first, second, elsewhere]).values()
    assert [result.step for result in members] == [100, 200]
    paths = Report(pair).save(tmp_path)
    assert {"training.png", "training.svg"} <= {path.name for path in paths}
    assert "![training](training.png)" in (tmp_path / "report.md").read_text()


def test_results_from_elsewhere(tmp_path):
    """Not all that is reported is lm-evaluation-harness's: images, for instance."""
    score = Metric(0.75, 0.02)
    task = TaskResult({"accuracy": score, "loss": Metric(0.7, None)}, 400, 400, "test", "images", None, None)
    result = EvaluationResult(
        "vit", 300_000, {"mnist": task}, "float32", "cpu", {"requested": 8, "smallest": 8, "largest": 8}, 1.0, {}
    )
    result.save(tmp_path / "vit.json")
    report = Report([EvaluationResult.load(tmp_path / "vit.json"), result])
    paths = report.save(tmp_path / "report")
    assert (
        "| vit.json" not in report.markdown()
        and "| mnist | accuracy | 0.7500 | 0.0200 | test | 400 |" in report.markdown()
    )
    assert {"benchmarks.png"} <= {path.name for path in paths}


def test_perplexities_have_a_table_and_a_curve(checkpoint, text, tmp_path):
    (tmp_path / "text.txt").write_text(text[:3000])
    result = evaluate(checkpoint, perplexity=PerplexityText(tmp_path / "text.txt", (32, 64), 16), device="cpu")
    report = Report([result])
    grid = report.grids()[0]
    assert grid.header == ["model", "per token", "32", "64"]
    value = result.tasks["perplexity@32"].metrics["perplexity"]
    assert grid.rows[0][2] == f"{value.value:#.4g} ± {value.stderr:#.2g}"
    assert "sliding windows of stride 16" in report.markdown()
    assert {"perplexity.png", "perplexity.svg"} <= {path.name for path in report.save(tmp_path / "report")}
    (axes,) = _perplexity_curves(report).axes
    assert axes.get_xticks().tolist() == [32, 64]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32", "64"]


def test_an_unknown_standard_error_is_not_drawn():
    figure = _bars({"model": {"one question": Metric(1.0, None), "many": Metric(0.5, 0.1)}}, "accuracy, %", {})
    bars = next(container for container in figure.axes[0].containers if isinstance(container, BarContainer))
    for caps in bars.errorbar.lines[1]:
        assert np.isnan(np.asarray(caps.get_ydata(), float)).tolist() == [True, False]


def test_nothing_to_report():
    with pytest.raises(ValueError, match="no results"):
        Report([])


def test_the_longest_suite_can_be_read_on_a_narrow_terminal():
    """80 columns for the nine benchmarks, their average and the paper's rows: no number is broken."""
    row = ["runs/smollm2-135m", *["100.00 ± 10.00"] * 10]
    paper_row = ["paper: SAS 1.5B, 50B tokens", *["66.84"] * 10]
    columns = [*printed("sas")["table8"].columns, "average"]
    console = rich.console.Console(width=80, file=io.StringIO())
    console.print(Grid("sas_table8", ["model", *columns], [row, paper_row]).rich())
    text = console.file.getvalue()
    assert text.count("100.00") == text.count("±10.00") == text.count("66.84") == 10
    assert {"paper:", "tokens"} <= set(text.split())


def test_a_report_that_cannot_be_written_is_known_first(checkpoint, data, tmp_path, never_loaded):
    (tmp_path / "file").touch()
    places = {tmp_path / "file": "a file; name a folder", tmp_path / "file" / "report": "no file can be written"}
    for place, reason in places.items():
        done = CliRunner().invoke(
            app, ["eval", str(checkpoint), "--tasks", "arc_easy", "--data", str(data), "--report", str(place)]
        )
        assert done.exit_code == 1
        assert "`report` is" in done.output and reason in done.output


def test_a_mistake_leaves_no_empty_report(checkpoint, data, tmp_path):
    command = ["eval", str(checkpoint), "--tasks", "nothing", "--data", str(data)]
    assert CliRunner().invoke(app, [*command, "--report", str(tmp_path / "report")]).exit_code == 1
    assert not (tmp_path / "report").exists()


def test_commands(checkpoint, benchmarks, hub, text, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "160"})

    (tmp_path / "text.txt").write_text(text[:2000])
    options = [
        "--tasks",
        "sas_table1",
        "--columns",
        "PIQA,SciQ",
        "--data",
        benchmarks,
        "--limit",
        3,
        "--device",
        "cpu",
    ]
    options += ["--perplexity", tmp_path / "text.txt", "--context-lengths", "32,64"]
    done = run("eval", checkpoint, checkpoint, *options, "--report", tmp_path / "report")
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [len(result["tasks"]) for result in content["results"]] == [4, 4]
    assert all(each["difference"] == 0 for each in content["comparisons"]["differences"][f"{checkpoint} (2)"])

    assert run("eval", checkpoint, *options, "--output", tmp_path / "one.json").exit_code == 0
    assert run("eval-report", tmp_path / "one.json", "--report", tmp_path / "again").exit_code == 0
    assert (tmp_path / "again" / "report.md").is_file()

    done = run("eval-data", tmp_path / "offline", "--tasks", "piqa,sciq")
    assert done.exit_code == 0 and "5 files below" in " ".join(done.output.split())
    assert run("eval", checkpoint, "--tasks", "nothing", "--data", benchmarks).exit_code == 1
    assert run("eval", checkpoint).exit_code == 1
