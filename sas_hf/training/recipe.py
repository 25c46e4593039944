"""A recipe: everything that decides a training run, as one YAML file whose every field the command line may override.

Read, checked and resolved here; nothing is loaded or built. Its fields are in `recipe_fields.py`.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

from .fields import build, find_yaml, read_fields, read_yaml, shipped_names
from .recipe_checks import check_recipe
from .recipe_fields import RECIPES, DataRecipe, EvaluationRecipe, ModelRecipe, TrainingRecipe


__all__ = [
    "DataRecipe",
    "EvaluationRecipe",
    "ModelRecipe",
    "TrainingRecipe",
    "load_recipe",
    "merge",
    "recipe_from_dict",
    "recipe_names",
]


def recipe_names() -> list[str]:
    """The recipes that come with the package, by the names that [`load_recipe`] takes."""
    return shipped_names(RECIPES)


def load_recipe(
    source: str | Path | dict[str, Any], overrides: list[str] | tuple[str, ...] = (), needs_data: bool = True
) -> TrainingRecipe:
    """
    Read a recipe. One that begins with `base: OTHER` has OTHER's fields and changes some: a recipe of the package, or
    a file beside it.

    Args:
        source: a YAML file, the name of a recipe that comes with the package, or what such a file holds.
        overrides: such as `"training.max_steps=100"` or `"model.config=mha-125m"`; the value is YAML.
        needs_data: refuse a recipe without `data.train` or what it evaluates on, which can be planned but not run.

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
    check_recipe(recipe, needs_data)
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
    """New fields: those of `base` with some changed, inside of fields too, where both have a dictionary."""
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
