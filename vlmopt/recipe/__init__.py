"""Recipes: YAML files that say what to do, read into typed objects."""

from __future__ import annotations

from vlmopt.recipe.loading import default_recipe, load_recipe, recipe_digest, save_recipe
from vlmopt.recipe.order import check_order
from vlmopt.recipe.schema import Budgets, PassStep, ProfileSettings, Recipe, VerifySettings

__all__ = [
    "Budgets",
    "PassStep",
    "ProfileSettings",
    "Recipe",
    "VerifySettings",
    "check_order",
    "default_recipe",
    "load_recipe",
    "recipe_digest",
    "save_recipe",
]
