"""Recipes whose passes are planned together, asked for by a word (`--together`)."""

from __future__ import annotations

from vlmopt.core.errors import RecipeError
from vlmopt.recipe.quantizing import with_quantization
from vlmopt.recipe.schema import PassStep, Recipe

_CUTS = ("skip-branches", "skip-layers")
WIDTHS = (
    PassStep(name="prune-heads", options={"keep": 0.5}),
    PassStep(name="prune-ffn", options={"keep": 0.5}),
    PassStep(name="prune-ffn", options={"keep": 0.25}),
)


def with_one_plan(recipe: Recipe) -> Recipe:
    """The recipe planned together, with widths and int8 among what is planned where it has neither.

    Widths come behind the cuts, so that they are fitted to what the cut leaves.

    Raises:
        RecipeError: there is no task to plan on.
    """
    if recipe.task is None:
        raise RecipeError("--together", "plans on a task, and there is none", remedy="pass -t TASK")
    names = [step.name for step in recipe.passes]
    if not any(name.startswith("prune-") for name in names):
        place = max((i for i, name in enumerate(names, 1) if name in _CUTS), default=names.count("canonicalize"))
        passes = (*recipe.passes[:place], *WIDTHS, *recipe.passes[place:])
        recipe = recipe.model_copy(update={"passes": passes})
    if not any(name.startswith("quantize-") for name in names):
        recipe = with_quantization(recipe, "int8")
    return recipe.model_copy(update={"planning": "together"})
