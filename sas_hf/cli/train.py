"""`sas-hf train`: [`~sas_hf.training.run.train`]."""

import os
from typing import Annotated

import typer
from rich.table import Table

from .shared import console, explain_errors


@explain_errors
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a recipe of the package. Without it: their list.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE ...]", help="Fields to change, such as training.max_steps=100."),
    ] = None,
) -> None:
    """Train or fine-tune a model as a recipe says; the same command again goes on where a killed run stopped."""
    from ..training.recipe import load_recipe, recipe_names

    if recipe is None:
        console.print(recipe_table({name: load_recipe(name) for name in recipe_names()}))
        return
    chosen = load_recipe(recipe, fields or ())
    from ..training.memory import keep_freed_memory
    from ..training.run import train as run_training

    keep_freed_memory()
    metrics = run_training(chosen)
    if os.environ.get("RANK", "0") != "0":  # one of several processes, and not the first
        return
    console.print(metrics_table(metrics))
    console.print(f"[green]Saved[/green] {chosen.training['output_dir']}")


def recipe_table(recipes: dict) -> Table:
    """The package's recipes, by name."""
    table = Table(title="Recipes: sas-hf train NAME [FIELD=VALUE ...]")
    table.add_column("name", no_wrap=True)
    for column in ("task", "model", "data"):
        table.add_column(column, overflow="fold")
    for name, recipe in recipes.items():
        model = recipe.model.config or recipe.model.checkpoint
        table.add_row(name, recipe.task.replace("_", " "), model, str(recipe.data.train))
    return table


def metrics_table(metrics: dict[str, float]) -> Table:
    table = Table(title="The saved model's numbers")
    table.add_column("number")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.5g}")
    return table
