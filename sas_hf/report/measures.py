"""How well labels were predicted, beyond what is a mean over samples; and how sure one can be of it."""

from collections.abc import Callable

import numpy as np


GROUPS = 500  # of samples that are left out together, at most


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """
    The mean of the classes' F1, of those that labels or predictions have. (The F1 of one of two classes would depend
    on which is called the first.)

    Args:
        predicted, labels: `[N]`, numbers of classes.
    """
    found = np.union1d(predicted, labels)
    scores = [
        2 * ((predicted == c) & (labels == c)).sum() / ((predicted == c).sum() + (labels == c).sum()) for c in found
    ]
    return float(np.mean(scores))


def micro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of all labels of all samples together, each there or not (`[N, L]`); 0 where there are none."""
    total = predicted.sum() + labels.sum()
    return float(2 * (predicted & labels).sum() / total) if total else 0.0


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """The correlation of two `[N]`; 0 where one does not vary."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """The correlation of ranks; equal numbers share theirs."""
    from scipy.stats import rankdata

    return pearson(rankdata(first), rankdata(second))


def jackknife_error(measure: Callable[[np.ndarray, np.ndarray], float], *arrays: np.ndarray) -> float | None:
    """The standard error of a measure of samples `[N, ...]`, from what it is without some of them in turn: the
    jackknife, by groups where there are more than 500 samples. `None` for one sample."""
    count = len(arrays[0])
    groups = min(count, GROUPS)
    if groups < 2:
        return None
    group = np.arange(count) % groups
    found = np.array([measure(*(array[group != number] for array in arrays)) for number in range(groups)])
    return float(np.sqrt((groups - 1) / groups * ((found - found.mean()) ** 2).sum()))
