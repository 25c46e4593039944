"""How many seeds a study needs, by the spread of the runs that have ended; nothing is trained."""

import math
import statistics

from ..report.tables import Grid
from .folders import METRICS_NAME
from .study import Study, check_run_folder, plan_runs, study_metrics
from .study_rates import final_value
from .study_results import POWER, pairs_needed


ENOUGH = 3  # pairs, to say anything of their spread


def study_power(study: Study, difference: float, overrides: list[str] | tuple[str, ...] = ()) -> list[Grid]:
    """
    How many pairs of runs (seeds) each variant needs beside the first, so that the paired t-test, two-sided at 5 %,
    finds a true difference with a probability of 80 %: a table for each data set.

    Args:
        study: of which at least some runs have ended; the others are left out.
        difference: above 0, in the study's metric.
        overrides: of the study's command.

    Raises:
        ValueError: for a difference that is none; and as [`plan_runs`].
        FileExistsError: for runs that are another study's.
    """
    if not 0 < difference < math.inf:
        raise ValueError(f"`--power` is {difference}; give the difference that is to be found, above 0, such as 0.01.")
    runs = plan_runs(study, overrides)
    _, metric = study_metrics(study, runs)
    ended: dict[tuple[str, str], dict[int, float]] = {(run.data, run.variant): {} for run in runs}
    for run in runs:
        has_ended = run.rate is None and (run.folder / METRICS_NAME).is_file()
        settled = run.settled(metric) if has_ended else None
        if settled is not None:
            check_run_folder(settled)
            value = final_value(run.folder, metric)
            ended[run.data, run.variant] |= {} if value is None else {run.seed: value}
    first, *others = dict.fromkeys(variant for _, variant in ended)
    return [
        Grid(
            f"Pairs that find {difference:g} of {metric.label}" + (f": {data}" if data else ""),
            ["variant", "sd", "n", "needed"],
            [_row(variant, ended[data, first], ended[data, variant], difference, metric.digits) for variant in others],
            f"n: seeds of which the runs of both {first} and the variant have ended; sd: the standard deviation of "
            f"their differences, by which the paired t-test (two-sided at 5 %) needs so many for {100 * POWER:.0f} % "
            "power. The sd of few pairs is rough itself.",
        )
        for data in dict.fromkeys(data for data, _ in ended)
    ]


def _row(variant: str, before: dict[int, float], now: dict[int, float], difference: float, digits: int) -> list[str]:
    differences = [now[seed] - before[seed] for seed in now if seed in before]
    pairs = str(len(differences))
    if len(differences) < ENOUGH:
        return [variant, "-", pairs, f"not known before {ENOUGH} pairs"]
    deviation = statistics.stdev(differences)
    if not 0 < deviation < math.inf:
        return [variant, f"{deviation:.{digits}f}", pairs, "no spread to go by"]
    return [variant, f"{deviation:.{digits}f}", pairs, f"{pairs_needed(difference, deviation):,}"]
