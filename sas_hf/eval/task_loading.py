"""Tasks by name: lm-evaluation-harness's own and ours, read from the Hub or from a local folder of Parquet files.

The folder holds `<dataset>/<configuration>/<split>.parquet`, the names being those that the stock task asks the Hub
for ("default" where it asks for no configuration) and the columns those that it reads.
"""

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks._yaml_loader import load_yaml  # the harness's loader for its YAML dialect (includes, functions)

from .harness import silenced
from .suites import SHIPPED_TASKS, SuiteTaskManager, is_suite, select_columns


class DamagedParquetError(ValueError):
    """A file that is no Parquet file, or not a whole one."""

    def __init__(self, path: str, error: Exception):
        super().__init__(f"{path} is not a whole Parquet file ({error}); copy or make it again.")


@functools.cache
def task_manager() -> SuiteTaskManager:
    """The harness's index of its own tasks and ours. Made once: reading its 14,000 files takes seconds."""
    return SuiteTaskManager()


def check_task_names(names: Sequence[str], columns: Sequence[str] | None = None) -> None:
    """Raise a `ValueError` for an unknown name (with the nearest known ones) or column."""
    for name in names:
        if name not in task_manager().task_index:
            near = difflib.get_close_matches(name, task_manager().all_tasks, n=3)
            hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "`lm_eval ls tasks` lists them."
            raise ValueError(f"`tasks`: lm-evaluation-harness has no task {name!r}. {hint}")
    if columns is not None:
        column_entries(names, columns)


def column_entries(names: Sequence[str], columns: Sequence[str]) -> dict[str, object]:
    """Index entries that reduce each suite among `names` to these columns."""
    index, entries = task_manager().task_index, {}
    if not columns:
        raise ValueError("`columns` is empty; name at least one, for instance 'ARC-E', or leave it out.")
    for name in names:
        if not is_suite(index[name].cfg or {}):
            raise ValueError(f"`columns` choose among those of a suite; {name!r} is a task of its own.")
        entries[name] = dataclasses.replace(
            index[name], yaml_path=None, cfg=select_columns(index[name].cfg, list(columns))
        )
    return entries


def local_entries(names: Sequence[str], data: str | Path) -> dict[str, object]:
    """
    Index entries that make every task reached by `names` (tasks, groups or tags) read its data below `data`.

    Nothing but the files' presence and their ends is read here.

    Raises:
        FileNotFoundError: when `data`, datasets' folders or splits to evaluate are missing; lists all that is.
        ValueError: for a damaged file, or a task whose data cannot be replaced.
    """
    if not Path(data).is_dir():
        raise FileNotFoundError(f"`data` is {str(data)!r}, which is not a folder.")
    index, entries, missing = task_manager().task_index, {}, []
    for name in dict.fromkeys(leaf_names(names)):
        config = stock_config(name)
        try:
            source = local_source(config, Path(data))
        except FileNotFoundError as error:
            missing.append(str(error))
            continue
        entries[name] = dataclasses.replace(index[name], yaml_path=None, cfg=config | source)
    if missing:
        hint = f"`sas-hf eval-data {data} --tasks ...` fetches what is on the Hub, where there is a network."
        raise FileNotFoundError("\n".join([*missing, hint]))
    return entries


def stock_config(name: str) -> dict:
    """What a task's own YAML file says; a `ValueError` when its data come from code instead of a dataset."""
    entry = task_manager().task_index[name]
    if "class" in entry.cfg or not entry.cfg.get("dataset_path"):
        raise ValueError(f"Task {name!r} gets its data by code of its own; evaluate it without `data`.")
    return load_yaml(entry.yaml_path)


def stock_splits(config: dict[str, Any]) -> tuple[str, str | None]:
    """The split that a stock task evaluates, and the one that its examples come from (`None`: written in the task)."""
    evaluated: Any = config.get("test_split") or config.get("validation_split")
    if "samples" in (config.get("fewshot_config") or {}):
        return evaluated, None
    candidates = (config.get("fewshot_split"), config.get("training_split"), config.get("validation_split"))
    return evaluated, next(filter(None, candidates), evaluated)


def leaf_names(names: Sequence[str]) -> Iterator[str]:
    """The tasks that names of tasks, groups and tags stand for."""
    manager = task_manager()
    for name in names:
        entry = manager.task_index[name]
        if name in manager.all_tags:
            yield from leaf_names(sorted(entry.tags))
        elif name in manager.all_groups:
            for member in entry.cfg["task"]:
                child = member.get("task") if isinstance(member, dict) else member
                own_data = isinstance(member, dict) and any(key.startswith("dataset_") for key in member)
                if own_data or not isinstance(child, str) or child not in manager.task_index:
                    raise ValueError(
                        f"Group {name!r} defines tasks of its own, whose data cannot be replaced; evaluate it without "
                        "`data`, or name single tasks."
                    )
                yield from leaf_names([child])
        else:
            yield name


def local_source(config: dict, data: Path) -> dict:
    """
    What to change in a stock task's configuration so that it reads Parquet files below `data`.

    The stock task's test split is evaluated where its file exists, else its validation split, else "test" or
    "validation". Few-shot examples come from the stock task's own split, else its training split, its validation
    split, or the evaluated split (from which the harness then leaves out the question itself).
    """
    folder = data / config["dataset_path"] / (config.get("dataset_name") or "default")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Task {config['task']!r} needs the folder {folder}, with one Parquet file per split, for instance "
            f"{folder / ((config.get('test_split') or config.get('validation_split') or 'test') + '.parquet')}; "
            "there is no such folder."
        )
    files = {path.stem: str(path.resolve()) for path in sorted(folder.glob("*.parquet"))}
    for path in files.values():
        check_parquet(path)

    candidates = [config.get("test_split"), config.get("validation_split"), "test", "validation"]
    evaluated = next((split for split in candidates if split in files), None)
    if evaluated is None:
        expected = " or ".join(str(folder / f"{split}.parquet") for split in dict.fromkeys(filter(None, candidates)))
        raise FileNotFoundError(f"Task {config['task']!r} needs {expected}; the folder has {sorted(files) or 'none'}.")

    training, validation = config.get("training_split"), config.get("validation_split")
    changes = {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "custom_dataset": read_parquet_splits,
        "training_split": training if training in files else None,
        "validation_split": validation if validation in files else None,
    }
    stock_evaluated, stock_fewshot = stock_splits(config)
    if evaluated != stock_evaluated or stock_fewshot not in (None, *files):
        # Naming both splits makes the harness leave the question out where they are one.
        changes["test_split"] = evaluated
        if stock_fewshot is not None:
            candidates = [config.get("fewshot_split"), training, validation, evaluated]
            changes["fewshot_split"] = next(split for split in candidates if split in files)
    # Else nothing is named that the stock task does not: the examples it draws depend on that.
    return changes


def read_parquet_splits(*, data_files: dict[str, str], **_) -> DatasetDict:
    """The splits in memory. Unlike `load_dataset`, it asks no server and keeps no copy that could be out of date."""
    return DatasetDict({split: Dataset(_read_table(path)) for split, path in data_files.items()})


def _read_table(path: str) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DamagedParquetError(path, error) from error


def check_parquet(path: str) -> None:
    """Raise a `ValueError` when the file is not whole, judged by what Parquet writes last: the schema."""
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedParquetError(path, error) from error
    if rows == 0:
        raise ValueError(f"{path} has no rows.")


def without_repeats(names: Sequence[str]) -> list[list[str]]:
    """The names in as few lists as their order allows, none of which has a task twice, as no evaluation may."""
    lists: list[tuple[list[str], set[str]]] = []
    for name in dict.fromkeys(names):
        tasks = _members(name)
        place = next((place for place in lists if not place[1] & tasks), None)
        if place is None:
            lists.append(place := ([], set()))
        place[0].append(name)
        place[1].update(tasks)
    return [found for found, _ in lists]


def _members(name: str) -> set[str]:
    try:
        return set(leaf_names([name]))
    except ValueError:  # a group that defines tasks of its own
        return {name}


def known_metrics(names: Sequence[str]) -> dict[str, dict[str, bool]]:
    """
    What an evaluation is sure to have, by what was named: each suite its columns and "average", each plain
    multiple-choice task the metrics of its file. And of each metric whether higher is better.
    """
    index, found = task_manager().task_index, {}
    for name in names:
        config, path = index[name].cfg or {}, index[name].yaml_path
        if is_suite(config):
            found[name] = dict.fromkeys([*config["metadata"]["columns"], "average"], True)
        elif name not in (*task_manager().all_groups, *task_manager().all_tags) and path is not None:
            task = load_yaml(path)
            if task.get("output_type") == "multiple_choice" and not task.keys() & {"filter_list", "process_results"}:
                metrics = [metric["metric"] for metric in task.get("metric_list", [])]
                found[name] = {metric: True for metric in metrics if metric in ("acc", "acc_norm")}
    return found


def load_tasks(
    names: Sequence[str], data: str | Path | None, columns: Sequence[str] | None = None
) -> tuple[list[Task | Group], dict[str, Task]]:
    """
    Build tasks with their data.

    Args:
        names: known tasks, groups or tags.
        data: the local folder, `None` for the Hub.
        columns: of the suites, all by default.

    Returns:
        what to hand to `simple_evaluate`, groups whole; and the single tasks by name.

    Raises:
        FileNotFoundError, ValueError: as [`local_entries`], or when a task cannot use the columns it finds.
    """
    manager = task_manager()
    for name in names:
        yaml_path = manager.task_index[name].yaml_path
        shipped = yaml_path is not None and SHIPPED_TASKS in Path(yaml_path).parents
        if data is None and shipped and name not in manager.all_groups:
            raise ValueError(
                f"Task {name!r} has no data on the Hub: make it with `make_continuation_task` and pass the folder as "
                "`data`."
            )
    items = []
    chosen = column_entries(names, columns) if columns is not None else {}
    # For every task whose data comes from a function, the harness warns how to pass that function arguments.
    with (
        _replaced(manager.task_index, chosen),
        _replaced(manager.task_index, local_entries(names, data) if data is not None else {}),
        silenced("lm_eval.api.task"),
    ):
        for name in dict.fromkeys(names):
            try:
                loaded = manager.load([name])
            except DamagedParquetError:
                raise
            except Exception as error:  # a template that misses a column, a function of the task's own: anything
                if data is None and isinstance(error, ConnectionError):  # of `datasets`, also where it is offline
                    raise ConnectionError(
                        f"Task {name!r}: {error}. Without a network, give its data as Parquet files, `--data FOLDER` "
                        f"(`data=` in Python); `sas-hf eval-data FOLDER --tasks {name}` fetches them where there is "
                        "one."
                    ) from error
                if data is None:
                    raise
                raise ValueError(
                    f"Task {name!r} cannot use the data below {data}: {type(error).__name__}: {error}. The columns "
                    "must be those of the dataset that the stock task reads."
                ) from error
            items += [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    return items, manager.load(items)["tasks"]  # refuses a task named twice, alone and in a group


@contextmanager
def _replaced(index: dict, entries: dict) -> Iterator[None]:
    originals = {name: index[name] for name in entries}
    index.update(entries)
    try:
        yield
    finally:
        index.update(originals)
