"""A recipe: everything that decides a training run, as one YAML file whose every field the command line may override.

Read, checked and resolved here; nothing is loaded or built.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments


RECIPES = files(__package__) / "recipes"
TASKS = ("language_modeling", "chat", "image_classification")


@dataclass
class ModelRecipe:
    """
    What is trained.

    Args:
        config: name of one of the papers' configurations, for a new model; or
        checkpoint: folder or Hub id of a model to go on from.
        revision: branch, tag or commit of a Hub checkpoint.
        overrides: configuration fields to change.
        tokenizer: folder or Hub id; the checkpoint's own where `None`.
        chat_template: Jinja file, or `chatml`; the tokenizer's own where `None`.
        lora: fields of peft's `LoraConfig`, such as `{r: 8, target_modules: [q_proj, v_proj]}`.
        trainable: regular expressions; only parameters whose names one of them matches are trained.
    """

    config: str | None = None
    checkpoint: str | None = None
    revision: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    chat_template: str | None = None
    lora: dict[str, Any] | None = None
    trainable: list[str] | None = None


@dataclass
class DataRecipe:
    """
    What it is trained on.

    Args:
        train: text files, parquet files or a Hub id; for chats JSONL files, parquet files or a Hub id, with a column
            `messages`; for images what `load_image_dataset` takes.
        validation: the same, or `None`: the split `validation_split` of `train`.
        config: configuration of a Hub dataset.
        split, validation_split: of the datasets.
        text_column: of parquet files and Hub datasets.
        streaming: read `train` as it comes instead of tokenising it first; for datasets larger than the disk.
        shuffle_buffer: documents among which a stream is shuffled.
        sequence_length: tokens per packed sequence; of a chat, those beyond are cut off.
        max_validation_sequences: of the validation text or chats, from their start.
        class_names: of the classes of images, in their order; by default the dataset's own.
        augment: flip and shift the training images at random.
        cache: folder for tokenised and packed text; `None`: that of `datasets`.
    """

    train: str | list[str] | None = None
    validation: str | list[str] | None = None
    config: str | None = None
    split: str = "train"
    validation_split: str | None = None
    text_column: str = "text"
    streaming: bool = False
    shuffle_buffer: int = 1000
    sequence_length: int = 1024
    max_validation_sequences: int | None = 100
    class_names: list[str] | None = None
    augment: bool = True
    cache: str | None = None


@dataclass
class EvaluationRecipe:
    """
    Benchmarks during the training, by `sas_hf.eval.evaluate`.

    Args:
        tasks: suites or tasks, such as `[sas_table1]`; none: no benchmarks.
        steps: every so many steps, and at the end; must be a multiple of nothing else.
        data: folder of parquet files, for evaluations without a network.
        limit: questions per task.
    """

    tasks: list[str] = field(default_factory=list)
    steps: int = 1000
    data: str | None = None
    limit: float | None = None


@dataclass
class TrainingRecipe:
    """
    A whole recipe.

    Args:
        task: one of `TASKS`.
        model, data, evaluation: see there.
        simulation_learning_rate: of the simulation's parameters; `None`: as all others.
        minimum_learning_rate: where the cosine ends (the papers' floor); `None`: at 0, or as `training` says.
        training: fields of `TrainingArguments`; `output_dir` among them.
    """

    task: str = "language_modeling"
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    simulation_learning_rate: float | None = None
    minimum_learning_rate: float | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        return dataclasses.asdict(self)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in RECIPES.iterdir() if path.name.endswith(".yaml"))


def load_recipe(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainingRecipe:
    """
    Read a recipe.

    Args:
        source: a YAML file, or the name of a recipe that comes with the package.
        overrides: such as `"training.max_steps=100"` or `"model.config=mha-125m"`; the value is YAML.

    Raises:
        FileNotFoundError: where there is neither such a file nor such a recipe.
        ValueError: for an unknown or misspelt field (with the nearest known one), a value of another type, or a recipe
            that cannot be run.
    """
    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif str(source) in recipe_names():
        text = (RECIPES / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(str(source), recipe_names(), n=3) or recipe_names()
        raise FileNotFoundError(f"{source} is no file, nor a recipe of the package; those are {', '.join(near)}, ...")
    try:
        fields = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{source} must hold fields and values, but holds {type(fields).__name__}.")
    for override in overrides:
        _override(fields, override)
    recipe = _build(TrainingRecipe, fields, "")
    check_recipe(recipe)
    return recipe


def _override(fields: dict, override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r} must be of the form FIELD=VALUE, such as training.max_steps=100.")
    *parents, last = name.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ValueError(f"{name!r} names a field of {parent!r}, which holds {fields!r}.")
    fields[last] = yaml.safe_load(value)
