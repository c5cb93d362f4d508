"""A plan as a recipe that `vlmopt optimize` runs: a new one around the profile's model, or another one changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmopt.core.errors import RecipeError
from vlmopt.recipe.loading import load_recipe, save_recipe
from vlmopt.recipe.schema import Budgets, PassStep, Recipe

_CUTTING = {"branch": ("skip-branches", "branches"), "layer": ("skip-layers", "layers")}


def planned_recipe(plan: Mapping[str, Any], given: Mapping[str, object], base: Path | None) -> Recipe:
    """The recipe that cuts what the plan names.

    Args:
        given: the budgets as they were typed, by their key in a recipe; a drop among them stays the gate of the run.
        base: the recipe to change; without it the model is that of the profile, and `optimize` needs -t TASK.

    Raises:
        RecipeError: the base cannot be read, or is of another model.
    """
    recipe = Recipe(model=plan["model"]) if base is None else load_recipe(base)
    steps = [
        PassStep(name=name, options={option: [site["name"] for site in plan["sites"] if site["scope"] == scope]})
        for scope, (name, option) in _CUTTING.items()
        if any(site["scope"] == scope for site in plan["sites"])
    ]
    budgets = recipe.budgets.model_dump() | {key: value for key, value in given.items() if value is not None}
    return recipe.model_copy(update={"passes": _with_cuts(recipe, steps), "budgets": Budgets.model_validate(budgets)})


def write_plan(recipe: Recipe, path: Path) -> None:
    """Writes the recipe, all of it or nothing.

    Raises:
        RecipeError: the file cannot be written.
    """
    if not path.parent.is_dir():
        raise RecipeError(str(path), "its folder does not exist", remedy="make the folder first")
    save_recipe(recipe, path)


def _with_cuts(recipe: Recipe, steps: list[PassStep]) -> tuple[PassStep, ...]:
    """The recipe's passes with these steps in the place of those that cut, or behind the first canonicalize."""
    cutting = {name for name, _ in _CUTTING.values()}
    kept = [step for step in recipe.passes if step.name not in cutting]
    places = [i for i, step in enumerate(recipe.passes) if step.name in cutting]
    if places:
        at = sum(step.name not in cutting for step in recipe.passes[: places[0]])
    else:
        at = next((i + 1 for i, step in enumerate(kept) if step.name == "canonicalize"), 0)
    return (*kept[:at], *steps, *kept[at:])
