"""A recipe: everything that decides a training run, as one YAML file whose every field the command line may override.

Read, checked and resolved here; nothing is loaded or built.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from .fields import build, find_yaml, read_fields, read_yaml, shipped_names
from .recipe_checks import check_recipe


RECIPES = files(__package__) / "recipes"


@dataclass
class ModelRecipe:
    """
    What is trained.

    Args:
        config: name of one of the papers' configurations, for a new model; or
        checkpoint: folder or Hub id of a model to go on from.
        revision: branch, tag or commit of a Hub checkpoint.
        conversion: fields of `ConversionOptions`; the checkpoint is converted to SAS as by `sas-hf convert`, verified
            and reported, into the folder `base` of the run, and trained from there. `{}`: converted by default;
            `None`: trained as it is.
        overrides: configuration fields to change (of a checkpoint that is converted: after it is).
        tokenizer: folder or Hub id; the checkpoint's own where `None`; "python-reference": one of 2,048 tokens that
            is trained on that text.
        chat_template: Jinja file, or `chatml`; the tokenizer's own where `None`.
        lora: fields of peft's `LoraConfig`, such as `{r: 8, target_modules: [q_proj, v_proj]}`.
        trainable: regular expressions; only parameters whose names one of them matches are trained.
    """

    config: str | None = None
    checkpoint: str | None = None
    revision: str | None = None
    conversion: dict[str, Any] | None = None
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
        train: text files or tables (CSV, TSV, JSON lines, parquet; names or patterns), a Hub id, or
            `"python-reference"`, the text that CPython brings along; for chats JSONL files, parquet files or a Hub id,
            with a column `messages`; for images what `load_image_dataset` takes.
        validation: the same, but not what is trained on; or one of the next two; or nothing is validated.
        validation_split: of the Hub dataset `train`.
        validation_documents: so many documents from the start of `train`, which are then not trained on.
        config: configuration of a Hub dataset.
        split: of Hub datasets.
        text_column: of tables and Hub datasets.
        document_separator: line that parts the documents of a text file, such as `<|endoftext|>`; `None`: each file is
            one document.
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
    validation_split: str | None = None
    validation_documents: int | None = None
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    document_separator: str | None = None
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
        steps: every so many steps, and at the end.
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
        task: "language_modeling", "chat" or "image_classification".
        model, data, evaluation: see there.
        batch_size: sequences per step over all devices, which sets `gradient_accumulation_steps`; so that the same
            recipe is the same training on any number of devices. `None`: as `training` says.
        simulation_learning_rate: of the simulation's parameters; `None`: as all others.
        minimum_learning_rate: where the cosine ends (the papers' floor); the simulation's rate keeps its ratio to the
            others', there too. `None`: the schedule that `training` says.
        training: fields of `TrainingArguments`, `output_dir` among them; null is as if not given. `bf16: auto` is bf16
            where the device has it.
    """

    task: str = "language_modeling"
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    batch_size: int | None = None
    simulation_learning_rate: float | None = None
    minimum_learning_rate: float | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        return dataclasses.asdict(self)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return shipped_names(RECIPES)


def load_recipe(source: str | Path | dict[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> TrainingRecipe:
    """
    Read a recipe. One that begins with `base: OTHER` has OTHER's fields and changes some: a recipe of the package, or
    a file beside it.

    Args:
        source: a YAML file, the name of a recipe that comes with the package, or what such a file holds.
        overrides: such as `"training.max_steps=100"` or `"model.config=mha-125m"`; the value is YAML.

    Raises:
        FileNotFoundError: where there is neither such a file nor such a recipe.
        ValueError: for an unknown or misspelt field (with the nearest known one), a value of another type, or a recipe
            that cannot be run.
    """
    fields = _resolve(source, Path()) if isinstance(source, dict) else _read(source, Path())
    for override in overrides:
        _override(fields, override)
    if isinstance(fields.get("training"), dict):  # null: not given
        fields["training"] = {name: value for name, value in fields["training"].items() if value is not None}
    recipe = recipe_from_dict(fields)
    check_recipe(recipe)
    return recipe


def recipe_from_dict(fields: dict[str, Any]) -> TrainingRecipe:
    """A recipe from what `to_dict` made; raises as [`load_recipe`] does, but for recipes that cannot be run."""
    return build(TrainingRecipe, fields)


def _read(source: str | Path, beside: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = find_yaml(source, RECIPES, "recipe", beside)
    if path in seen:
        raise ValueError(f"{path} is the `base` of itself.")
    fields = read_fields(path)
    if "variants" in fields:
        raise ValueError(f"{path} is a study, not a recipe; run it by `sas-hf study`.")
    return _resolve(fields, path.parent, (*seen, path))


def _resolve(fields: dict[str, Any], beside: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    fields = dict(fields)
    base = fields.pop("base", None)
    return copy.deepcopy(fields) if base is None else merge(_read(base, beside, seen), fields)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Fields with some changed, inside of fields too."""
    merged = copy.deepcopy(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = merge(base[name], value) if both else value
    return merged


def _override(fields: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ValueError(f"{override!r} must be of the form FIELD=VALUE, such as training.max_steps=100.")
    *parents, last = name.split(".")
    for parent in parents:
        if fields.get(parent) is None:
            fields[parent] = {}
        fields = fields[parent]
        if not isinstance(fields, dict):
            raise ValueError(f"{name!r} names a field of {parent!r}, which holds {fields!r}.")
    try:
        fields[last] = read_yaml(value)
    except yaml.YAMLError as error:
        raise ValueError(f"The value of {override!r} is no YAML: {error}") from error
