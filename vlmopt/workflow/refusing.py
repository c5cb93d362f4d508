"""Refuses recipes that cannot come to a good end, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from vlmopt.core.errors import PlanError, RecipeError
from vlmopt.profiling.document import read_profile
from vlmopt.recipe.schema import PassStep, Recipe

# The option of a cutting pass that names its sites.
SITE_OPTIONS = {"skip-branches": "branches", "skip-layers": "layers"}


def refuse_early(recipe: Recipe) -> None:
    """Looks at what the recipe alone can tell.

    Raises:
        RecipeError: a budget without a task to measure it on.
        PlanError: a lossy pass with neither a budget nor named sites.
        ProfileError: the profile cannot be read.
    """
    max_drop = recipe.budgets.max_drop
    if max_drop is not None and recipe.task is None:
        found = f"allows a drop of {max_drop:g} points of a metric, and there is no task to measure it on"
        raise RecipeError("max_drop", found, remedy="pass -t TASK, or leave the budget out")
    if max_drop is None and any(_leaves_the_choice(step) for step in recipe.passes):
        raise without_budget()
    if recipe.profile.file is not None:
        read_profile(Path(recipe.profile.file))


def _leaves_the_choice(step: PassStep) -> bool:
    option = SITE_OPTIONS.get(step.name)
    return option is not None and not step.options.get(option)


def without_budget() -> PlanError:
    """What a run without a budget gets when a pass needs one."""
    return PlanError(
        "the recipe",
        "has a lossy pass with neither a budget nor named sites",
        expected="a task and max_drop, or the option that names the sites",
        remedy="pass -t TASK --max-drop 1, or name the sites in the recipe",
    )
