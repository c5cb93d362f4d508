"""Recipes: YAML files that say what to do, read into typed objects."""

from __future__ import annotations

from vlmopt.recipe.loading import default_recipe, load_recipe, recipe_digest, save_recipe
from vlmopt.recipe.order import check_order
from vlmopt.recipe.quantizing import QUANTIZATIONS, with_quantization
from vlmopt.recipe.schema import Budgets, PassStep, ProfileSettings, Recipe, VerifySettings
from vlmopt.recipe.selecting import Shortened, chosen_steps, find_steps, shorten
from vlmopt.recipe.together import with_one_plan

__all__ = [
    "QUANTIZATIONS",
    "Budgets",
    "PassStep",
    "ProfileSettings",
    "Recipe",
    "Shortened",
    "VerifySettings",
    "check_order",
    "chosen_steps",
    "default_recipe",
    "find_steps",
    "load_recipe",
    "recipe_digest",
    "save_recipe",
    "shorten",
    "with_one_plan",
    "with_quantization",
]
