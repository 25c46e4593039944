"""`train`: a recipe in, a trained model and its metrics out. What can be refused is refused before a model is built.

The same recipe again goes on where a killed run stopped.
"""

import json
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import datasets
import yaml
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..report.figures import require_matplotlib
from ..report.files import check_cache, locked, write_atomically, writing
from .arguments import training_arguments
from .base import BASE
from .benchmarks import PREFIX, Benchmarks
from .data_files import describe_files
from .fields import read_yaml
from .folders import METRICS_NAME, differences, flat, has_trained, holds, output_folder
from .lineage import read_lineage
from .memory import give_freed_memory_back
from .recipe import TrainingRecipe, recipe_from_dict
from .recipe_checks import check_recipe
from .reporting import TrainingLog, plot_training
from .sizes import check_fits
from .tasks import find_task


RECIPE_NAME = "recipe.yaml"
# What the files of the data were when the run began.
DATA_NAME = "data.json"
# A final model is written here, then moved up file by file.
ASIDE = ".final"
# Of the Trainer's logs: what two runs of one recipe do not share, or what is no result.
NOT_RESULTS = ("_runtime", "_per_second", "total_flos", "epoch", "train_loss", "num_input_tokens_seen", "num_tokens")


def train(recipe: TrainingRecipe) -> dict[str, float]:
    """
    Train as the recipe says, from the beginning or the last checkpoint of the same run.

    The output folder holds the recipe (`recipe.yaml`), what its data were (`data.json`), checkpoints, `log.jsonl`, the
    curves, in the end the model, its tokenizer and `all_results.json`. A run that has ended is not trained again.

    Returns:
        the saved model's numbers (the best one's with `load_best_model_at_end`): its "step", "loss" as last logged
        until then, "eval_loss" and "perplexity" where there is a validation text, "benchmark/...".

    Raises:
        ValueError, FileNotFoundError, ImportError: for a recipe that cannot be run; before the model is built.
        FileExistsError: where the output folder holds something else, or the run of another recipe.
        BlockingIOError: where another process trains into it.
        FloatingPointError, OSError: as `DurableTrainer.train`.
        InterruptedError, KeyboardInterrupt: after SIGTERM or SIGHUP, after Ctrl-C, with a checkpoint saved.
    """
    require_matplotlib()  # for the curves at the end
    check_recipe(recipe)
    if recipe.data.cache is None:  # where what is made of the data is kept
        name = "HF_DATASETS_CACHE" if "HF_DATASETS_CACHE" in os.environ else "HF_HOME"
        check_cache(name, Path(os.environ.get("HF_DATASETS_CACHE", HF_HOME)))
    arguments = training_arguments(recipe)
    folder = output_folder(arguments)
    with locked(folder, f"`training.output_dir` is {str(folder)!r}", in_place=True), writing(folder):
        return _train(recipe, arguments, folder)


def _train(recipe: TrainingRecipe, arguments: TrainingArguments, folder: Path) -> dict[str, float]:
    check_folder(folder, recipe)
    resumes = has_trained(folder)
    if (folder / METRICS_NAME).is_file():
        return read_metrics(folder / METRICS_NAME)
    check_fits(recipe, arguments)
    task = find_task(recipe.task)
    from_loss = {metric.name: metric.from_loss for metric in task.metrics if metric.from_loss}
    log = TrainingLog(folder, task.tokens_per_sequence(recipe), from_loss)
    benchmarks = None
    with _begun(folder, recipe, arguments.should_save):
        if arguments.process_index == 0:
            log.console.print("Loading model and data", style="cyan")
        with writing(Path(recipe.data.cache or datasets.config.HF_DATASETS_CACHE)):
            trainer = task.make_trainer(recipe, arguments, [log])
        give_freed_memory_back()
        trainer.lineage = read_lineage(recipe, folder, task.auto_class.__name__)
        trainer.set_simulation_learning_rate(recipe.simulation_learning_rate)
        for callback in (PrinterCallback, ProgressCallback):  # whose place `TrainingLog` takes
            trainer.remove_callback(callback)
        if recipe.evaluation.tasks:
            benchmarks = Benchmarks(
                recipe.evaluation, trainer, cast(PreTrainedTokenizerBase, trainer.processing_class), log
            )
            benchmarks.rehearse()
            trainer.add_callback(benchmarks)
    if arguments.should_save and not resumes:
        write_atomically(folder / DATA_NAME, (json.dumps(describe_files(recipe.data), indent=2) + "\n").encode())
    try:
        trainer.train(resume_from_checkpoint=True)
    finally:
        log.close()
    state = trainer.state
    if state.global_step < state.max_steps:
        raise InterruptedError(
            f"Told to end at step {state.global_step} of {state.max_steps}; its checkpoint is saved, and the same "
            "command goes on from there."
        )
    step = trainer.step_of_model
    if arguments.load_best_model_at_end and state.best_model_checkpoint is None:
        warnings.warn(
            f"No evaluation came before the end, so that the last model is saved, of step {step}.", stacklevel=2
        )
    if trainer.eval_dataset is not None and not _evaluated(state.log_history, step):
        trainer.evaluate()
    metrics = _metrics(state.log_history, step)
    if benchmarks is not None and not any(name.startswith(PREFIX) for name in metrics):
        metrics |= benchmarks.score(step)
    if "eval_loss" in metrics:
        loss = metrics["eval_loss"]
        metrics |= {metric.name: metric.from_loss(loss) for metric in task.metrics if metric.from_loss}
    _finish(trainer, folder, metrics)
    if trainer.told_to_end:  # too late for this run, but whoever called has others to train
        signal.raise_signal(trainer.told_to_end)
    return metrics


@contextmanager
def _begun(folder: Path, recipe: TrainingRecipe, should_save: bool) -> Iterator[None]:
    """The folder with its recipe, which says whose it is, before anything else is written there; without a checkpoint
    it is left as it was found when the block ends in an error."""
    if not should_save:
        yield
        return
    path = folder / RECIPE_NAME
    before = path.read_bytes() if path.is_file() else None
    write_atomically(path, yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
    try:
        yield
    except BaseException:
        if not has_trained(folder):
            path.unlink() if before is None else write_atomically(path, before)
            shutil.rmtree(folder / BASE, ignore_errors=True)
        raise


def check_folder(folder: Path, recipe: TrainingRecipe) -> None:
    """
    Raise a FileExistsError unless the folder is free, or holds the run of this recipe and these data; one that has no
    checkpoint yet counts as free. A PermissionError where nothing can be written.
    """
    where = f"`training.output_dir` is {str(folder)!r}"
    if not holds(folder, RECIPE_NAME, where, "run") or not has_trained(folder):
        return  # a mistake that was seen at once is not in the way of the corrected command
    there = read_yaml((folder / RECIPE_NAME).read_text(encoding="utf-8"))
    # Built, so that a field that is newer than the run has its default; and a folder may be moved.
    before, now = flat(recipe_from_dict(there).to_dict()), flat(recipe.to_dict())
    if listed := differences(before, now, but=("training.output_dir",)):
        raise FileExistsError(
            f"{where}, which holds the run of another recipe ({listed}); name another folder, or go on with the "
            "recipe there."
        )
    if (folder / DATA_NAME).is_file():  # older runs have none
        before, now = json.loads((folder / DATA_NAME).read_text(encoding="utf-8")), describe_files(recipe.data)
        if listed := differences(before, now):
            raise FileExistsError(
                f"{where}, whose run was begun with other data in the files of these names ({listed}); name another "
                "folder, or give the run its data back."
            )


def read_metrics(path: Path) -> dict[str, float]:
    """Of a run that has ended; a ValueError where the file is damaged."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(metrics, dict):
            raise ValueError("it must hold numbers by name")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the run goes on.") from error
    return metrics


def _evaluated(history: list[dict], step: int) -> bool:
    return any(entry["step"] == step and "eval_loss" in entry for entry in history)


def _metrics(history: list[dict], step: int) -> dict[str, float]:
    """The numbers of the model of this step: what was measured of it, and the last that was logged before."""
    metrics: dict[str, float] = {}
    for entry in history:
        if entry["step"] <= step:
            measured = entry["step"] == step
            metrics |= {
                name: value
                for name, value in entry.items()
                if not name.endswith(NOT_RESULTS) and (measured or not name.startswith(("eval_", PREFIX)))
            }
    return metrics | {"step": step}


def _finish(trainer: Trainer, folder: Path, metrics: dict[str, float]) -> None:
    """Save model and tokenizer, each file whole or not there; the metrics come last and say that the run has ended."""
    aside = folder / ASIDE
    if trainer.is_fsdp_enabled:  # checkpoints may be in shards, the final model is whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        with writing(aside):
            trainer.save_model(str(aside))
    except BaseException:
        if trainer.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        for path in sorted(aside.iterdir()):
            path.replace(folder / path.name)
        aside.rmdir()
        plot_training(folder)
        write_atomically(folder / METRICS_NAME, (json.dumps(metrics, indent=2) + "\n").encode())
    trainer.accelerator.wait_for_everyone()
