"""``convoy recipe``: lists recipes and their keys, and shows the configuration and plan of a
recipe.
"""

import json
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from pipelines.cli.cluster import Overrides, Recipe
from pipelines.cli.output import Json, print_json

recipe_app = typer.Typer(
    help="Recipes: their keys, their schema, and what they result in.", no_args_is_help=True
)


@recipe_app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the recipes that ship with Convoy."""
    from pipelines.cli.recipe_info import shipped_recipes

    recipes = shipped_recipes()
    if as_json:
        print_json(recipes)
        return
    table = Table("recipe", "purpose", box=None)
    for name, purpose in recipes.items():
        table.add_row(name, purpose)
    Console().print(table)


@recipe_app.command("keys")
def list_keys(
    prefix: Annotated[
        str, typer.Argument(help="List the keys that start with this, such as optimizer.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List the keys of a recipe with their type, default and description."""
    from pipelines.cli.recipe_info import recipe_keys

    keys = recipe_keys(prefix)
    if as_json:
        print_json([vars(key) for key in keys])
        return
    table = Table("key", "type", "default", "meaning", box=None)
    for key in keys:
        default = "required" if key.required else json.dumps(key.default)
        table.add_row(key.key, key.type, default, key.description)
    Console().print(table)


@recipe_app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from pipelines.cli.recipe_info import recipe_schema

    print_json(recipe_schema())


@recipe_app.command("show")
def show_recipe(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(help="Number of ranks, usually GPUs.", min=1)] = 1,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Number of training samples; read from the dataset if not given.",
            min=1,
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show all keys of a recipe, and its model size, batches, steps and learning rates."""
    from pipelines.cli.recipe_info import plan_recipe, sparkline

    config, plan = plan_recipe(recipe, overrides or [], ranks, samples)
    if as_json:
        print_json({"config": config.model_dump(), "plan": vars(plan)})
        return
    print(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True).rstrip())
    length = f"{plan.epochs} epochs, " if plan.epochs else ""
    rates = [rate for _, rate in plan.learning_rates]
    rows = {
        "model": f"{plan.parameters:,} parameters, {plan.multiply_adds:,} multiply-adds per image",
        "ranks": f"{plan.ranks} = {plan.data_parallel_ranks} data-parallel x "
        f"{plan.pipeline_stages} pipeline stages",
        "global batch": f"{plan.global_batch_size} = {plan.micro_batch_size} per micro-batch x "
        f"{plan.accumulation_steps} accumulation steps x {plan.data_parallel_ranks} data-parallel "
        "ranks",
        "epoch": f"{plan.samples:,} samples, {plan.steps_per_epoch:,} steps",
        "run": f"{length}{plan.steps:,} steps",
        "learning rate": f"{rates[0]:.4g} at the first step, peak {plan.peak_learning_rate:.4g}, "
        f"{rates[-1]:.4g} at the last",
        "": sparkline(rates),
    }
    table = Table(box=None, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    print()
    Console().print(table)


def add_to(app: typer.Typer) -> None:
    """Register the ``recipe`` command group with ``app``."""
    app.add_typer(recipe_app, name="recipe")
