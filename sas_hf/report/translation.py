"""BLEU and chrF by sacrebleu, and what two systems differ by: the same tests as `sacrebleu --paired-bs`."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


SAMPLES = 1000  # resamples of a bootstrap, as sacrebleu's
LANGUAGE = re.compile(r"([a-z]{2})(?:[_-]\w+)?")


def corpus_metrics(language: str | None = None) -> dict:
    """
    Sacrebleu's BLEU and chrF, as they are by default, by our names for them.

    Args:
        language: that is translated into, such as "es" or "zh_CN": Chinese, Japanese and Korean have tokenizers of
            their own; other names are passed over.

    Raises:
        ImportError: without sacrebleu, or what it needs for that language.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu, which is not installed: pip install sacrebleu") from error
    code = LANGUAGE.fullmatch((language or "").lower())
    try:
        return {"bleu": BLEU(trg_lang=code[1] if code else ""), "chrf": CHRF()}
    except RuntimeError as error:
        raise ImportError(f"BLEU in {language} needs a tokenizer that is not installed: {error}") from error


@dataclass(frozen=True)
class CorpusScore:
    """A score from 0 to 100, its standard error over resamples, and sacrebleu's signature of how it was made."""

    value: float
    stderr: float
    signature: str


@dataclass(frozen=True)
class ScoreDifference:
    """Second minus first on the same resamples: the difference, its standard error, the ends of its 95 % interval, and
    the p-value of sacrebleu's paired bootstrap."""

    difference: float
    stderr: float
    low: float
    high: float
    p_value: float


def corpus_scores(
    hypotheses: Sequence[str], references: Sequence[str], language: str | None = None
) -> dict[str, float]:
    """BLEU and chrF of translations, from 0 to 100. Raises as [`corpus_metrics`]."""
    metrics = corpus_metrics(language)
    return {name: metric.corpus_score(hypotheses, [references]).score for name, metric in metrics.items()}


def measured_scores(
    hypotheses: Sequence[str], references: Sequence[str], language: str | None = None
) -> dict[str, CorpusScore]:
    """The same with standard errors and signatures. Raises as [`corpus_metrics`]."""
    found = {}
    for name, metric in corpus_metrics(language).items():
        score = metric.corpus_score(
            hypotheses, [references], n_bootstrap=SAMPLES
        ).score  # so that the signature says so
        spread = _resampled(metric, hypotheses, references, _draws(len(references))).std(ddof=1)
        found[name] = CorpusScore(score, float(spread), str(metric.get_signature()))
    return found


def score_differences(
    first: Sequence[str], second: Sequence[str], references: Sequence[str], language: str | None = None
) -> dict[str, ScoreDifference]:
    """What two systems' translations of the same sources differ by, for each score. Raises as [`corpus_metrics`]."""
    from sacrebleu.significance import PairedTest

    metrics, draws = corpus_metrics(language), _draws(len(references))
    test = PairedTest([("first", first), ("second", second)], metrics, [references], test_type="bs", n_samples=SAMPLES)
    tested: list[Any] = list(test()[1].values())[1:]  # behind the names of the systems, in the order of the metrics
    found = {}
    for (name, metric), (before, after) in zip(metrics.items(), tested, strict=True):
        spread = _resampled(metric, second, references, draws) - _resampled(metric, first, references, draws)
        low, high = np.percentile(spread, [2.5, 97.5])
        # The same translations differ by nothing; sacrebleu's test would say p = 1/1001.
        p_value = 1.0 if not spread.any() else after.p_value
        found[name] = ScoreDifference(
            after.score - before.score, float(spread.std(ddof=1)), float(low), float(high), p_value
        )
    return found


def _draws(count: int) -> np.ndarray:
    """The pairs of each resample, `[SAMPLES, count]`: sacrebleu's own, by its seed."""
    seed = os.environ.get("SACREBLEU_SEED", "12345")
    generator = np.random.default_rng(None if seed.lower() == "none" else int(seed))
    return generator.choice(count, size=(SAMPLES, count), replace=True)


def _resampled(metric, hypotheses: Sequence[str], references: Sequence[str], draws: np.ndarray) -> np.ndarray:
    """The score of each resample, from each pair's n-gram counts."""
    counts = np.array(metric._extract_corpus_statistics(hypotheses, [references]), dtype="float32")
    return np.array([metric._compute_score_from_stats(counts[draw].sum(0)).score for draw in draws], dtype=float)
