"""The translators of a study on a test file: scores over seeds, and paired bootstrap against its first variant.

    sas-hf paper better table3 --data FOLDER
    python benchmarks/translation.py runs/papers/cpu/better-table3/study test.parquet

Each run's translations are kept beside its model (`test.json`) and not made again.
"""

import argparse
import math
import statistics
from pathlib import Path

import yaml

from sas_hf.eval import EvaluationResult, evaluate_translation
from sas_hf.report.tables import Grid
from sas_hf.report.translation import score_differences
from sas_hf.training.reporting import read_log
from sas_hf.training.study_results import mean_and_deviation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study that has ended")
    parser.add_argument("pairs", help="test file, with the columns that were trained on")
    options = parser.parse_args()
    study = yaml.safe_load((options.study / "declaration.yaml").read_text())
    runs = Path(study.get("runs") or options.study, *list(study["data"])[:1])
    found = {
        variant: [evaluated(runs / variant / f"seed-{seed}", options.pairs) for seed in study["seeds"]]
        for variant in study["variants"]
    }
    for grid in (scores(options.study, found), differences(found, study["seeds"])):
        print(grid.markdown())


def evaluated(run: Path, pairs: str) -> EvaluationResult:
    """Of the run's model on the test pairs, greedily."""
    path = run / "test.json"
    if path.is_file():
        return EvaluationResult.load(path)
    data = yaml.safe_load((run / "recipe.yaml").read_text())["data"]
    columns = {name: data[name] for name in ("source_column", "target_column", "source_language", "target_language")}
    return evaluate_translation(run, pairs, **columns, num_beams=1, output=path)


def scores(study: Path, found: dict[str, list[EvaluationResult]]) -> Grid:
    rows = []
    for variant, results in found.items():
        metrics = [result.tasks["translation"].metrics for result in results]
        cells = []
        for name, scale, digits in (("bleu", 1, 2), ("chrf", 1, 2), ("token_accuracy", 100, 2), ("loss", 1, 4)):
            mean, deviation = mean_and_deviation([scale * each[name].value for each in metrics])
            cells.append(f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else ""))
        seconds = [seconds_per_epoch(Path(result.model)) for result in results]
        time = "-" if None in seconds else f"{statistics.mean(seconds):.0f}"
        rows.append([variant, f"{results[0].num_parameters:,}", *cells, time, str(len(results))])
    task = next(iter(found.values()))[0].tasks["translation"]
    caption = f"{task.num_samples:,} pairs of {task.data}, greedily; mean ± standard deviation over seeds; "
    caption += "; ".join(task.details["signatures"].values()) + "."
    header = ["attention", "parameters", "BLEU", "chrF", "token accuracy, %", "loss", "seconds per epoch", "n"]
    return Grid("Translations of the test pairs", header, rows, caption)


def seconds_per_epoch(run: Path) -> float | None:
    """Of training alone, at the median speed of the log; `None` where that has none."""
    speeds = [line["steps_per_second"] for line in read_log(run) if line.get("steps_per_second")]
    if not speeds:
        return None
    last = max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    state = yaml.safe_load((last / "trainer_state.json").read_text())
    return math.ceil(state["global_step"] / state["epoch"]) / statistics.median(speeds)


def differences(found: dict[str, list[EvaluationResult]], seeds: list[int]) -> Grid:
    """Of every other kind to the first, seed by seed and of all seeds' translations together."""
    first, *others = found
    rows = []
    for variant in others:
        runs = list(zip(found[first], found[variant], strict=True))
        pairs = [(str(seed), [both]) for seed, both in zip(seeds, runs, strict=True)]
        pairs.append(("all", runs))
        for name, both in pairs:
            before, after, references = [], [], []
            for one, other in both:
                before += [sample["hypothesis"] for sample in one.tasks["translation"].samples]
                after += [sample["hypothesis"] for sample in other.tasks["translation"].samples]
                references += [sample["reference"] for sample in other.tasks["translation"].samples]
            language = both[0][0].tasks["translation"].details["language"]
            for metric, each in score_differences(before, after, references, language).items():
                interval = f"{each.low:+.2f} to {each.high:+.2f}"
                rows.append([variant, name, metric, f"{each.difference:+.2f}", interval, f"{each.p_value:.3f}"])
    header = ["attention", "seed", "score", f"minus {first}", "95 % interval", "p"]
    caption = "Paired bootstrap over pairs, as sacrebleu's; it says nothing of other seeds."
    return Grid("Differences on the test pairs", header, rows, caption, text_columns=3)


if __name__ == "__main__":
    main()
