"""`evaluate`: a model and the names of tasks in, scores out. All that can be checked early is checked first."""

import copy
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.api.task import Task
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..version import __version__
from .harness import SASHFLM, require_causal
from .results import EvaluationResult, Metric, TaskResult
from .task_loading import check_task_names, load_tasks, task_manager


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def evaluate(
    model: str | Path | PreTrainedModel,
    tasks: str | Sequence[str],
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    data: str | Path | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    output: str | Path | None = None,
    log_samples: bool = False,
) -> EvaluationResult:
    """
    Score a causal language model on tasks of lm-evaluation-harness, with the harness's own code.

    A live model is left as it was found: training or not, and with the same random numbers ahead of it. Code that a
    checkpoint brings along is never run.

    Args:
        model: a checkpoint's folder, a Hub id, or a live model.
        tasks: names of tasks, groups or tags of the harness, or "sas_continuation" (see [`make_continuation_task`]).
        tokenizer: the model's own where `None`: beside its weights, or for a live model where it was loaded from.
        data: folder of `<dataset>/<configuration>/<split>.parquet` to read instead of the Hub's datasets; with it and
            a checkpoint's folder or a live model, no network is needed. A split that is missing is replaced, and the
            result says which was used.
        limit: how many samples of each task to score, or what share of them if below 1; for trying out.
        num_fewshot: examples before each question; `None`: as the task says, else 0.
        batch_size: "auto": from the memory at hand; or a number.
        device: "cpu", "cuda", "cuda:1", ...; `None`: the accelerator if there is one. Not for a live model.
        dtype: as in `from_pretrained`; `None`: "auto", what the checkpoint holds. Not for a live model.
        output: JSON file to write the result to.
        log_samples: keep each request's log-likelihood in the result.

    Raises:
        ValueError: unknown task or unusable argument, model, tokenizer or data; also when the model's log-likelihoods
            are not numbers.
        FileNotFoundError: missing folder, weights, configuration or data file.
        Both come before the model is loaded, except for log-likelihoods that are not numbers.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    _check_arguments(model, limit, num_fewshot, batch_size, device, dtype, output)
    check_task_names(names)
    config, source = _read_config(model)
    require_causal(config)
    tokenizer = _load_tokenizer(tokenizer, source, config)

    live = isinstance(source, torch.nn.Module)
    with _left_as_found(source if live else None):
        items, loaded = load_tasks(names, data)
        placement = {} if live else {"device": device, "dtype": dtype or "auto"}
        harness_model = SASHFLM(source, tokenizer=tokenizer, batch_size=batch_size, **placement)
        start = time.perf_counter()
        # The samples are always asked for: they show log-likelihoods that are not numbers, which accuracy hides.
        report = simple_evaluate(
            harness_model, tasks=items, num_fewshot=num_fewshot, limit=limit, task_manager=task_manager()
        )
        seconds = time.perf_counter() - start
    _refuse_nan(report["samples"])

    sizes = harness_model.chosen_batch_sizes or [batch_size]
    result = EvaluationResult(
        model=type(source).__name__ if live else source,
        num_parameters=harness_model.model.num_parameters(),
        tasks={name: _task_result(name, task, report, log_samples) for name, task in loaded.items()},
        groups={name: _metrics(values) for name, values in report.get("groups", {}).items()},
        limit=limit,
        batch_size={"requested": batch_size, "smallest": min(sizes), "largest": max(sizes)},
        dtype=str(harness_model.model.dtype).removeprefix("torch."),
        device=str(harness_model.device),
        seconds=seconds,
        versions={
            "lm_eval": version("lm_eval"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "sas_hf": __version__,
        },
    )
    if output is not None:
        result.save(output)
    return result


def _check_arguments(model, limit, num_fewshot, batch_size, device, dtype, output) -> None:
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise ValueError(f"`limit` is {limit}; it must be a positive integer, a share between 0 and 1, or None.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"`num_fewshot` is {num_fewshot}; it must not be negative.")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"`batch_size` is {batch_size!r}; it must be 'auto' or a positive integer.")
    if isinstance(model, torch.nn.Module):
        for field, value in (("device", device), ("dtype", dtype)):
            if value is not None:
                raise ValueError(f"`{field}` is {value!r}, but a live model stays as it is; use `model.to`.")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` is {dtype!r}; it must be 'auto' or torch's name of one, for instance 'bfloat16'.")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"`device` is {device!r}, which torch cannot use here: {error}") from error
    if output is not None:
        if Path(output).is_dir():
            raise ValueError(f"`output` is {str(output)!r}, a folder; give the name of a JSON file.")
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(output).parent).close()  # refused now rather than after the evaluation


def _read_config(model: str | Path | PreTrainedModel) -> tuple[PreTrainedConfig, str | PreTrainedModel]:
    """The configuration, and the model as the harness takes it: live, Hub id, or absolute path.

    An absolute path cannot be taken for a Hub id, which the harness would look up.
    """
    if isinstance(model, torch.nn.Module):
        if not getattr(model, "can_generate", lambda: True)():
            raise ValueError(
                f"`model` is a {type(model).__name__}, which has no language model head; load the checkpoint with "
                "`AutoModelForCausalLM`."
            )
        return model.config, model
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if isinstance(model, Path) or folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise FileNotFoundError(f"`model` is {str(model)!r}: there is no such folder.")
        return AutoConfig.from_pretrained(model), model
    for kind, expected in (("configuration", ("config.json",)), ("weights", WEIGHTS)):
        if not any((folder / name).is_file() for name in expected):
            raise FileNotFoundError(f"`model` is {str(model)!r}, a folder without {kind} ({' or '.join(expected)}).")
    return AutoConfig.from_pretrained(folder), str(folder.resolve())


def _load_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None, source: str | PreTrainedModel, config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)  # the harness may give it a padding token
    else:
        place = str(tokenizer or (source if isinstance(source, str) else config.name_or_path))
        if not place or (Path(place).is_dir() and not any((Path(place) / name).is_file() for name in TOKENIZERS)):
            raise ValueError(
                f"There is no tokenizer in {place!r}; pass one as `tokenizer`, or save it there with "
                "`tokenizer.save_pretrained`."
            )
        tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has neither `bos_token` nor `eos_token`; the evaluation begins a text without context "
            "with one of them. Set the one that separated documents in training."
        )
    vocab_size = config.get_text_config().vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but `vocab_size` of the model is {vocab_size}; it "
            "belongs to another model."
        )
    return tokenizer


@contextmanager
def _left_as_found(model: torch.nn.Module | None) -> Iterator[None]:
    """The harness seeds every generator and sets a model to evaluation; undo both, for evaluating during training."""
    training = [module for module in model.modules() if module.training] if model is not None else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module in training:
            module.training = True


def _refuse_nan(samples: dict[str, list[dict]]) -> None:
    for name, rows in samples.items():
        numbers = [value for row in rows for response in _responses(row) for value in np.atleast_1d(response).tolist()]
        bad = sum(isinstance(value, float) and math.isnan(value) for value in numbers)
        if bad:
            raise ValueError(
                f"{bad} log-likelihoods of task {name!r} are not numbers (NaN): the weights are broken or overflow in "
                "this `dtype`; try 'float32'."
            )


def _task_result(name: str, task: Task, report: dict, log_samples: bool) -> TaskResult:
    config = task.config
    split = config.test_split if task.has_test_docs() else config.validation_split
    files = (config.dataset_kwargs or {}).get("data_files")
    on_hub = "/".join(filter(None, (task.DATASET_PATH, task.DATASET_NAME)))
    counts = report["n-samples"][name]
    return TaskResult(
        metrics=_metrics(report["results"][name]),
        num_samples=counts["effective"],
        num_available=counts["original"],
        split=split,
        data=files[split] if isinstance(files, dict) else on_hub,
        num_fewshot=report["n-shot"][name],
        version=report["versions"][name],
        samples=[_sample(row) for row in report["samples"][name]] if log_samples else None,
    )


def _metrics(values: dict) -> dict[str, Metric]:
    """The harness's flat `{"acc,none": value, "acc_stderr,none": error or "N/A", "alias": ...}` as metrics."""
    metrics = {}
    for key, value in values.items():
        metric, comma, task_filter = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{task_filter}")
        name = metric if task_filter == "none" else key
        metrics[name] = Metric(float(value), float(stderr) if isinstance(stderr, (int, float)) else None)
    return metrics


def _responses(row: dict) -> list:
    """The first response to each request of a sample: (log-likelihood, is greedy), a log-likelihood, or a text."""
    return [responses[0] for responses in row["resps"]]


def _sample(row: dict) -> dict:
    kept = ("doc_id", "doc_hash", "prompt_hash", "target", "filter", *row["metrics"])
    return {key: row[key] for key in kept} | {"responses": _responses(row)}
