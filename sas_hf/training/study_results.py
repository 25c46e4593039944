"""What the runs of a study gave, and the statistics over them: means, paired tests, when a curve reaches a value."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from scipy.optimize import brentq
from scipy.stats import nct, norm, t, ttest_rel
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME

from .reporting import logged_seconds, read_log
from .tasks import Metric


POWER = 0.8  # the probability with which a difference is to be found
MANY = 10_000  # pairs, of which Student's t is nearly the normal distribution


@dataclass(frozen=True)
class FinishedRun:
    """
    Attributes:
        variant, data, seed: place in the grid; `data` is "" where there is one.
        metrics: of the saved model, by name: the task's, such as "loss" (nats per token) or "accuracy".
        parameters: numbers in the saved weights.
        tokens_per_second: median over the log.
        curves: by name, tokens (steps where they are not known) and value of each evaluation.
        steps: by name, those of the curve's evaluations; where it is not there, the curve is over steps itself.
        seconds: of training and its evaluations, in all the processes that it took; `None` where the log has none.
        chance: by name, what who guesses has of a metric, where that is known.
    """

    variant: str
    data: str
    seed: int
    metrics: dict[str, float]
    parameters: int
    tokens_per_second: float | None
    curves: dict[str, list[tuple[int, float]]]
    steps: dict[str, list[int]] = field(default_factory=dict)
    seconds: float | None = None
    chance: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(
        cls, variant: str, data: str, seed: int, folder: Path, results: dict[str, float], metrics: Sequence[Metric]
    ) -> "FinishedRun":
        """
        Of a run's folder and what `train` returned.

        Args:
            metrics: of the run's task.

        Raises:
            ValueError: where the results lack one of them.
        """
        lines = read_log(folder)
        speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        found: dict[str, float] = {}
        for metric in metrics:
            if (value := metric.of(results)) is None:
                raise ValueError(f"{folder} has no {metric.name!r} among its results ({', '.join(results)}).")
            found[metric.name] = value
        curves, steps = {}, {}
        for metric in metrics:
            evaluated = [(line, value) for line in lines if (value := metric.of(line)) is not None]
            curves[metric.name] = [(line["tokens"] or line["step"], value) for line, value in evaluated]
            steps[metric.name] = [line["step"] for line, _ in evaluated]
        speed = statistics.median(speeds) if speeds else None
        parameters, seconds = count_parameters(folder), logged_seconds(folder)
        chance = guessed(folder, metrics)
        return cls(variant, data, seed, found, parameters, speed, curves, steps, seconds, chance)

    def by_step(self, metric: str) -> list[tuple[int, float]]:
        """The curve of a metric over steps; empty where it was not evaluated on the way."""
        curve = self.curves.get(metric, [])
        steps = self.steps.get(metric) or [place for place, _ in curve]
        return [(step, value) for step, (_, value) in zip(steps, curve, strict=True)]


@dataclass(frozen=True)
class Arrival:
    """
    When a run's curve first has the value at which the first variant's run of the same seed ended.

    Attributes:
        value: that value, of the study's metric.
        step: by [`step_reaching`]; `None` where the run does not come so far.
        share: of the steps that the first variant's run took.
    """

    variant: str
    data: str
    seed: int
    value: float
    step: float | None
    share: float | None


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation with n - 1 degrees of freedom; `None` for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_test(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """
    Mean of second minus first, pair by pair, its 95 % confidence interval and p-value by Student's t.

    Returns:
        "difference", "low", "high", "p_value"; the last three `None` for one pair, the last for equal differences too.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return {"difference": mean, "low": None, "high": None, "p_value": None}
    if len(set(differences)) == 1:
        return {"difference": mean, "low": mean, "high": mean, "p_value": None}
    test = ttest_rel(second, first)
    interval = test.confidence_interval(0.95)
    low, high, p_value = map(float, (interval.low, interval.high, test.pvalue))
    return {"difference": mean, "low": low, "high": high, "p_value": p_value}


def paired_power(difference: float, deviation: float, pairs: int) -> float:
    """
    The probability with which the paired t-test, two-sided at 5 %, finds a true difference: by the noncentral t.

    Args:
        deviation: of the pairs' differences, above 0.
        pairs: 2 or more.
    """
    degrees, shift = pairs - 1, abs(difference) / deviation * math.sqrt(pairs)
    critical = t.ppf(0.975, degrees)
    # Beyond a shift of 6 the other sign has less than 1e-9, and scipy no number of it.
    wrong = nct.cdf(-critical, degrees, shift) if shift < 6 else 0.0
    return float(nct.sf(critical, degrees, shift) + wrong)


def detectable(differences: Sequence[float], power: float = POWER) -> dict[str, float | None]:
    """
    What the spread of paired differences lets them find.

    Returns:
        "deviation" (n - 1) and "detectable", the smallest true difference that as many pairs of this spread find with
        that probability, by [`paired_power`]; both `None` for one pair or what is no number, the second also where all
        are equal.
    """
    pairs = len(differences)
    if pairs < 2 or not all(map(math.isfinite, differences)):
        return {"deviation": None, "detectable": None}
    deviation = statistics.stdev(differences)
    if deviation == 0:
        return {"deviation": 0.0, "detectable": None}
    # Of one deviation: the shift that is found by the normal distribution is too small, and that as many times as the
    # critical value of t too large, for any number of pairs.
    low = _normal_shift(power) / math.sqrt(pairs)
    high = low * t.ppf(0.975, pairs - 1)
    effect = brentq(lambda effect: paired_power(effect, 1.0, pairs) - power, low / 2, high)
    return {"deviation": deviation, "detectable": deviation * effect}


def pairs_needed(difference: float, deviation: float, power: float = POWER) -> int:
    """The fewest pairs, two or more, that find a true difference with that probability, by [`paired_power`]; of very
    many, where t is the normal distribution but for a pair or two, by that."""
    pairs = math.ceil((_normal_shift(power) * deviation / difference) ** 2)
    if pairs > MANY:
        return pairs
    pairs = max(2, pairs)  # never more than are needed
    while paired_power(difference, deviation, pairs) < power:
        pairs += 1
    return pairs


def _normal_shift(power: float) -> float:
    """Of a normal distribution, in its deviations, so that a two-sided test at 5 % finds it."""
    return float(norm.ppf(0.975) + norm.ppf(power))


def count_parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, tied ones once."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def guessed(folder: Path, metrics: Sequence[Metric]) -> dict[str, float]:
    """By name, what who guesses has of the metrics of a folder's classifier; of an adapter, whose classes its base
    knows, nothing."""
    chances = {metric.name: metric.chance for metric in metrics if metric.chance is not None}
    if not chances or not (folder / CONFIG_NAME).is_file():
        return {}
    classes = AutoConfig.from_pretrained(folder).num_labels
    return {name: chance(classes) for name, chance in chances.items()}


def step_reaching(curve: Sequence[tuple[float, float]], value: float, higher_is_better: bool = False) -> float | None:
    """
    Where a curve first is at `value` or better.

    Args:
        curve: step (or tokens, or seconds) and value of each evaluation, in their order.

    Returns:
        the step, linear between the evaluation before and the first that is as good; that evaluation's own where none
        came before it, so that it may have been earlier. `None` where none is as good.
    """
    before = None
    for step, found in curve:
        if found >= value if higher_is_better else found <= value:
            if before is None or not math.isfinite(before[1]) or not math.isfinite(found):
                return step
            return before[0] + (step - before[0]) * (value - before[1]) / (found - before[1])
        before = (step, found)
    return None
