"""A folder of data for later evaluations without a network: the splits that tasks need, as Parquet files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import load_dataset

from ..report.files import new_file, one_at_a_time
from .task_loading import check_parquet, check_task_names, leaf_names, stock_config, stock_splits


@one_at_a_time("folder", in_place=True)
def prepare_data(
    folder: str | Path, tasks: str | Sequence[str], progress: Callable[[str], None] = lambda message: None
) -> list[Path]:
    """
    Fetch the datasets of tasks and write every split that they use to `<dataset>/<configuration>/<split>.parquet`.

    A file that is there and whole stays, so that an interrupted run goes on; a damaged one is made again.

    Args:
        folder: to be given to [`evaluate`] as `data`; is made where it is missing.
        tasks: names of tasks, groups, tags or suites. Each task's dataset is read by its own name with
            `datasets.load_dataset`: from the Hub, its cache, or a folder of that name in the working directory.
        progress: called with a line for each dataset.

    Returns:
        the files, those that were there included.

    Raises:
        ValueError: for an unknown task, one whose data come from code, or a dataset without the split to evaluate.
        OSError: when a dataset cannot be fetched.
        BlockingIOError: while another process fetches into `folder`.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ValueError("`tasks` is empty; name at least one, for instance 'sas_table1'.")
    check_task_names(names)
    configs = {name: stock_config(name) for name in dict.fromkeys(leaf_names(names))}
    paths: list[Path] = []
    for name, config in configs.items():
        place = Path(folder) / config["dataset_path"] / (config.get("dataset_name") or "default")
        fields = ("training_split", "validation_split", "test_split", "fewshot_split")
        splits = list(dict.fromkeys(config[field] for field in fields if config.get(field)))
        wanted = {split: place / f"{split}.parquet" for split in splits}
        if all(_is_whole(path) for path in wanted.values()):
            progress(f"{name}: {place} is there")
            paths += [path for path in wanted.values() if path not in paths]
            continue
        source = (config["dataset_path"], config.get("dataset_name"))
        progress(f"{name}: {' '.join(filter(None, source))}")
        dataset = load_dataset(*source, **config.get("dataset_kwargs") or {})
        for split, path in wanted.items():
            if split not in dataset and split == stock_splits(config)[0]:
                raise ValueError(f"Task {name!r} needs the split {split!r}; {source[0]} has {list(dataset)}.")
            if split not in dataset:
                continue  # examples then come from another, as `evaluate` says
            paths += [path] if path not in paths else []
            if _is_whole(path):
                continue
            with new_file(path) as unfinished:
                dataset[split].to_parquet(unfinished)
    return paths


def _is_whole(path: Path) -> bool:
    try:
        check_parquet(str(path))
    except (ValueError, OSError):
        return False
    return True
