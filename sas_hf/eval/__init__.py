"""Evaluation with lm-evaluation-harness: the model type `sas_hf`, `evaluate`, and a task made from any text."""

import importlib.util


if importlib.util.find_spec("lm_eval") is None:
    raise ImportError("sas_hf.eval needs lm-evaluation-harness, which is not installed: pip install sas_hf[eval]")

from .continuation import make_continuation_task
from .evaluation import evaluate
from .harness import SASHFLM
from .images import evaluate_images
from .masked import evaluate_masked
from .perplexity import PerplexityText
from .preparation import prepare_data
from .report import Report
from .results import EvaluationResult, Metric, SuiteColumn, SuiteResult, TaskResult
from .text_classification import evaluate_texts
from .translation import evaluate_translation


__all__ = [
    "SASHFLM",
    "EvaluationResult",
    "Metric",
    "PerplexityText",
    "Report",
    "SuiteColumn",
    "SuiteResult",
    "TaskResult",
    "evaluate",
    "evaluate_images",
    "evaluate_masked",
    "evaluate_texts",
    "evaluate_translation",
    "make_continuation_task",
    "prepare_data",
]
