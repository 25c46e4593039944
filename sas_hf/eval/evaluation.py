"""`evaluate`: a model and the names of tasks in, scores out. All that can be checked early is checked first."""

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME

from ..hub.checkpoints import find_commit
from ..report.files import locked, one_at_a_time
from ..version import versions
from .answers import AnswerStore, answers_of, model_identity
from .arguments import check_arguments, check_folder, check_output, refuse_unused
from .harness import SASHFLM
from .models import Subject, inspect_model, left_as_found
from .perplexity import PerplexityText, choose_lengths, read_documents, score_text
from .results import EvaluationResult, Metric, SuiteColumn, SuiteResult, TaskResult, digest
from .suites import SuiteGroup
from .task_loading import check_task_names, load_tasks, stock_config, stock_splits, task_manager


@one_at_a_time("output")
def evaluate(
    model: str | Path | PreTrainedModel | Sequence[str | Path | PreTrainedModel],
    tasks: str | Sequence[str] = (),
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    adapter: str | Path | None = None,
    data: str | Path | None = None,
    columns: Sequence[str] | None = None,
    perplexity: str | Path | PerplexityText | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    add_bos_token: bool | None = None,
    truncation: bool = False,
    cache: str | Path | None = None,
    output: str | Path | None = None,
    log_samples: bool = False,
    shared: bool = False,
) -> EvaluationResult | list[EvaluationResult] | None:
    """
    Score causal language models on tasks of lm-evaluation-harness, with the harness's own code, and on texts.

    A live model is left as it was found: training or not, and with the same random numbers ahead of it. Code that a
    checkpoint brings along is never run. Under `accelerate launch` the processes share the work and the first one
    returns and writes the result; for a live model see `shared`.

    Args:
        model: a checkpoint's folder, a Hub id, a live model, or a peft adapter's folder or Hub id; or a list of
            them, all looked over before the first is loaded.
        tasks: names of tasks, groups or tags of the harness, the papers' suites ("sas_table1", "sas_table1_2shot",
            "sas_table8"), or "sas_continuation" (see [`make_continuation_task`]).
        tokenizer: the model's own where `None`: beside its weights, or for a live model where it was loaded from.
        adapter: folder or Hub id of a peft adapter to put on `model`.
        data: folder of `<dataset>/<configuration>/<split>.parquet` to read instead of the Hub's datasets; with it and
            a checkpoint's folder or a live model, no network is needed. A split that is missing is replaced, and the
            result says which was used.
        columns: of a suite, for instance ["ARC-E", "PIQA"]; all by default.
        perplexity: a text to predict; a path or Hub id stands for `PerplexityText(source)`.
        limit: how many samples of each task to score, from the first, or what share of them if below 1.
        num_fewshot: examples before each question; `None`: as the task says, else 0.
        batch_size: "auto": from the memory at hand; or a number.
        device: "cpu", "cuda", "cuda:1", ...; `None`: the accelerator if there is one. Not for a live model.
        dtype: as in `from_pretrained`; `None`: "auto", what the checkpoint holds. Not for a live model.
        add_bos_token: whether a text begins with the tokenizer's `bos_token`; `None`: as the tokenizer does it.
        truncation: cut requests longer than the model's context from the left instead of refusing them.
        cache: folder for the log-likelihoods as they are computed; a run that was killed goes on from there. Not for
            a live model.
        output: JSON file to write the result to; for one model. Several go into a [`Report`].
        log_samples: keep each request's log-likelihood in the result.
        shared: whether each process of several holds a whole copy of the live model and calls this, to share the
            work; `False`: a process that calls this does all of it, as sharded models need.

    Returns:
        the result, or for a list of models a list of results. In a process of several other than the first: `None`, or
        an empty list.

    Raises:
        ValueError: unknown task or column, unusable argument, model, tokenizer or data; also when the model's
            log-likelihoods are not numbers.
        FileNotFoundError: missing folder, weights, configuration or data file.
        BlockingIOError: when another process evaluates to `output`, or the same model with `cache`.

    All before the model is loaded, except for requests longer than the model's context (before the first batch)
    and log-likelihoods that are not numbers.
    """
    single = not isinstance(model, (list, tuple))
    models = list(model) if isinstance(model, (list, tuple)) else [cast(str | Path | PreTrainedModel, model)]
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not models:
        raise ValueError("`model` is an empty list; name at least one.")
    if output is not None:
        if not single:
            raise ValueError(f"`output` is {str(output)!r}, for one model; give several to `Report` and save that.")
        check_output(output)
    if not names and perplexity is None:
        raise ValueError("`tasks` is empty; name at least one, for instance 'sas_table1', or a text for `perplexity`.")
    if not names:
        start = None if add_bos_token is None else str(add_bos_token)
        of_tasks = {"data": data, "columns": columns, "limit": limit, "num_fewshot": num_fewshot}
        of_tasks |= {"add_bos_token": start, "truncation": truncation, "log_samples": log_samples}
        refuse_unused(of_tasks, "there are no `tasks`, only a text")
    if perplexity is not None and not isinstance(perplexity, PerplexityText):
        perplexity = PerplexityText(perplexity)
    for each in models:
        check_arguments(each, limit, batch_size, device, dtype)
        if cache is not None and isinstance(each, torch.nn.Module):
            raise ValueError(f"`cache` is {str(cache)!r}, but nothing tells live models apart; save it first.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"`num_fewshot` is {num_fewshot}; it must not be negative.")
    if cache is not None and Path(cache).is_file():
        raise ValueError(f"`cache` is {str(cache)!r}, a file; give the name of a folder.")
    if cache is not None:
        check_folder("cache", cache)
    check_task_names(names, columns)
    subjects = [inspect_model(each, tokenizer, adapter) for each in models]
    for subject in subjects:
        if perplexity is not None and (positions := _positions(subject)) is not None:
            choose_lengths(perplexity, positions)
    documents = read_documents(perplexity) if perplexity is not None else None

    load = functools.partial(
        _load_model,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        add_bos_token=add_bos_token,
        truncation=truncation,
        cache=cache,
        shared=shared,
    )
    results = []
    with contextlib.ExitStack() as locks:
        if cache is not None:
            for subject in subjects:
                answers = answers_of(cache, str(subject.source), subject.adapter)
                locks.enter_context(locked(answers, f"`cache` is {str(cache)!r} for {subject.name}"))
        for subject in subjects:
            result = _evaluate_one(subject, load, names, data, columns, limit, num_fewshot, perplexity, documents)
            if result is None:
                continue
            if not log_samples:
                for task in result.tasks.values():
                    task.samples = None
            if output is not None:
                result.save(output)
            results.append(result)
    if single:
        return results[0] if results else None
    return results


def _evaluate_one(
    subject: Subject,
    load: Callable[[Subject], SASHFLM],
    names: list[str],
    data: str | Path | None,
    columns: Sequence[str] | None,
    limit: int | float | None,
    num_fewshot: int | None,
    perplexity: PerplexityText | None,
    documents: list[str] | None,
) -> EvaluationResult | None:
    """One model's result, with samples; `None` in a process of several other than the first."""
    report: dict[str, Any] = {}
    texts: dict[str, TaskResult] = {}
    with left_as_found(subject.source if isinstance(subject.source, torch.nn.Module) else None):
        # Anew for each model: a task keeps its requests, and draws its examples from generators.
        items, loaded = load_tasks(names, data, columns) if names else ([], {})
        _check_fewshot(loaded, num_fewshot)
        model = load(subject)
        start = time.perf_counter()
        if items:
            # The samples are always asked for: they are compared.
            found = simple_evaluate(
                model, tasks=items, num_fewshot=num_fewshot, limit=limit, task_manager=task_manager()
            )
            report = found or {}  # `None` in a process of several other than the first
        if perplexity is not None and documents is not None:
            texts = score_text(perplexity, documents, model)
        seconds = time.perf_counter() - start
    if model.answers is not None:
        model.answers.close()
    if model.process_index != 0:
        return None
    tasks = {name: _task_result(name, task, report) for name, task in loaded.items()}
    result = _result(subject, model, tasks | texts, seconds)
    result.limit = limit if limit is None or limit < 1 else int(limit)
    if report:
        groups = report.get("groups", {})
        result.groups = {name: _metrics(values) for name, values in groups.items()}
        result.suites = {
            suite.name: _suite_result(suite, report, tasks) for suite in items if isinstance(suite, SuiteGroup)
        }
    return result


def _load_model(
    subject: Subject,
    batch_size: int | str,
    device: str | None,
    dtype: str | torch.dtype | None,
    add_bos_token: bool | None,
    truncation: bool,
    cache: str | Path | None,
    shared: bool,
) -> SASHFLM:
    options: dict[str, Any] = (
        {} if subject.live else {"device": device, "dtype": dtype or "auto", "peft": subject.adapter}
    )
    if subject.commit is not None:
        options["revision"] = subject.commit
    model = SASHFLM(
        subject.source,
        tokenizer=subject.tokenizer,
        batch_size=batch_size,
        add_bos_token=add_bos_token,
        truncation=truncation,
        shared=shared and subject.live,
        **options,
    )
    if cache is not None:
        settings = {
            "dtype": str(model.model.dtype),
            "device": model.device.type,
            "batch_size": batch_size,
            "max_length": model.max_length,
            "attention": model.config._attn_implementation,
            "adapter_commit": subject.adapter and find_commit(subject.adapter, file=ADAPTER_CONFIG_NAME),
        }
        identity = model_identity(str(subject.source), subject.adapter, subject.commit, settings)
        model.answers = AnswerStore(cache, identity, model.process_index)
    return model


def _result(subject: Subject, model: SASHFLM, tasks: dict[str, TaskResult], seconds: float) -> EvaluationResult:
    sizes = model.chosen_batch_sizes or [model.batch_size]
    tokenizer = model.tokenizer
    return EvaluationResult(
        model=subject.name,
        num_parameters=model.model.num_parameters(),
        tasks=tasks,
        dtype=str(model.model.dtype).removeprefix("torch."),
        device="cpu" if model.device.type == "cpu" else str(model.device),  # accelerate numbers CPUs
        batch_size={"requested": model.batch_size, "smallest": min(sizes), "largest": max(sizes)},
        seconds=seconds,
        versions=versions("lm_eval"),
        adapter=subject.adapter,
        beginning_of_text={
            "token": tokenizer.decode(model.prefix_token_id),
            "always": tokenizer.bos_token_id in model.tok_encode("a")[:1],
            "requested": model.add_bos_token,
        },
        max_length=model.max_length,
        num_truncated=model.num_truncated,
        num_reused=model.num_reused,
        num_processes=model.num_processes,
        unused_weights=model.AUTO_MODEL_CLASS.unused,
        step=training_step(subject.adapter or subject.source),
    )


def training_step(source: str | PreTrainedModel) -> int | None:
    """The step of a checkpoint named "checkpoint-500" or "step500", or of which `trainer_state.json` tells."""
    if not isinstance(source, str):
        return None
    state = Path(source) / "trainer_state.json"
    if state.is_file():
        step = json.loads(state.read_text(encoding="utf-8")).get("global_step")
        if isinstance(step, int):
            return step
    found = re.fullmatch(r"(?:.*[-_])?(?:checkpoint|step)[-_]?(\d+)", Path(source).name)
    return int(found[1]) if found else None


def _positions(subject: Subject) -> int | None:
    """The model's context, where its configuration tells."""
    config = subject.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _check_fewshot(tasks: dict[str, Task], num_fewshot: int | None) -> None:
    without = [name for name, task in tasks.items() if task.config.num_fewshot == 0]  # whatever is asked for
    if num_fewshot and tasks and len(without) == len(tasks):
        raise ValueError(f"`num_fewshot` is {num_fewshot}, but {', '.join(without)} shows no examples; leave it out.")
    for name, task in tasks.items():
        shots = task.config.num_fewshot
        shots = num_fewshot if num_fewshot is not None and shots != 0 else shots or 0
        split, evaluated = _used_splits(task)
        if not shots or split is None:
            continue
        available = len(task.dataset[split]) - (split == evaluated)
        if shots > available:
            raise ValueError(
                f"Task {name!r} is to show {shots} examples, but its split {split!r} has {available} for a question."
            )


def _used_splits(task: Task) -> tuple[str | None, str]:
    """The splits that a task with its data takes its examples from (`None`: from itself) and evaluates."""
    config, fewshot = task.config, getattr(task, "fewshot_cfg", None)  # a task in Python need not have the second
    evaluated = config.test_split if task.has_test_docs() else config.validation_split
    if fewshot is None or (fewshot.split is None and fewshot.samples is not None):
        return None, evaluated
    return fewshot.split or config.training_split or config.validation_split or evaluated, evaluated


def _task_result(name: str, task: Task, report: dict) -> TaskResult:
    config = task.config
    fewshot_split, split = _used_splits(task)
    files = (config.dataset_kwargs or {}).get("data_files")
    on_hub = "/".join(filter(None, (task.DATASET_PATH, task.DATASET_NAME)))
    counts, shots = report["n-samples"][name], report["n-shot"][name]
    rows = sorted(report["samples"][name], key=lambda row: row["doc_id"])
    return TaskResult(
        metrics=_metrics(report["results"][name]),
        num_samples=counts["effective"],
        num_available=counts["original"],
        split=split,
        data=files[split] if isinstance(files, dict) else on_hub,
        num_fewshot=shots,
        version=report["versions"][name],
        fewshot_split=fewshot_split if shots else None,
        notes=_differences(name, split, fewshot_split, shots) if isinstance(files, dict) else [],
        scores=_question_scores(task, rows),
        questions=digest(row["doc_hash"] + row["prompt_hash"] for row in rows),
        details=_chance(task, rows),
        samples=[_sample(row) for row in rows],
    )


def _chance(task: Task, rows: list[dict]) -> dict:
    """Of multiple choice with one right answer, the share of right answers of who guesses."""
    plain = task.OUTPUT_TYPE == "multiple_choice" and getattr(task.config, "process_results", None) is None
    if not plain or not rows or not {"acc", "acc_norm"} & task.aggregation().keys():
        return {}
    # For mutual information each choice is scored without the question, too.
    per_choice = 2 if "acc_mutual_info" in task.aggregation() else 1
    return {"chance": sum(per_choice / len(row["arguments"]) for row in rows) / len(rows)}


def _differences(name: str, split: str, fewshot_split: str | None, shots: int) -> list[str]:
    """In which splits a task read from a folder differs from the stock task."""
    stock_split, stock_fewshot = stock_splits(stock_config(name))
    notes = []
    if split != stock_split:
        notes.append(f"evaluated on {split}, which the folder has, instead of {stock_split}")
    if shots and fewshot_split == split:
        notes.append(f"examples from the evaluated split ({split}), without the question itself")
    elif shots and fewshot_split not in (None, stock_fewshot):
        notes.append(f"examples from {fewshot_split}, which the folder has, instead of {stock_fewshot}")
    return notes


def _question_scores(task: Task, rows: list[dict]) -> dict[str, list[float]]:
    """One number per question for each metric that is their mean, where the task has no more than one filter."""
    if len({row["filter"] for row in rows}) > 1:
        return {}
    means = [metric for metric, aggregation in task.aggregation().items() if aggregation is mean]
    return {metric: [float(row[metric]) for row in rows] for metric in means if all(metric in row for row in rows)}


def _suite_result(suite: SuiteGroup, report: dict, tasks: dict[str, TaskResult]) -> SuiteResult:
    columns = {}
    for label, column in suite.columns.items():
        member = suite.get(column["task"])
        leaves = [task.task_name for task in member.get_all_tasks()] if isinstance(member, Group) else [column["task"]]
        columns[label] = SuiteColumn(
            metric=column["metric"],
            score=_metrics(report["results"][column["task"]])[column["metric"]],
            num_samples=sum(tasks[name].num_samples for name in leaves),
            tasks=leaves,
        )
    return SuiteResult(
        columns=columns,
        average=_metrics(report["results"][suite.name])["average"],
        complete=len(columns) == suite.metadata.get("all_columns", len(columns)),
        version=suite.metadata.get("version"),
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
