"""Recipes whose passes are planned together, asked for by a word (`--together`)."""

from __future__ import annotations

from vlmopt.core.errors import RecipeError
from vlmopt.recipe.quantizing import with_quantization
from vlmopt.recipe.schema import PassStep, Recipe

_IN_FRONT = ("prune-tokens", "skip-branches", "skip-layers")
WIDTHS = (
    PassStep(name="prune-heads", options={"keep": 0.5}),
    PassStep(name="prune-ffn", options={"keep": 0.5}),
    PassStep(name="prune-ffn", options={"keep": 0.25}),
)
TOKENS = (  # an image's, where the model writes about it; of several for one encoder the plan takes one
    PassStep(name="prune-tokens", options={"keep": 0.5, "method": "merge"}),
    PassStep(name="prune-tokens", options={"keep": 0.5, "method": "pool"}),
    PassStep(name="prune-tokens", options={"keep": 0.25, "method": "pool"}),
)


def with_one_plan(recipe: Recipe) -> Recipe:
    """The recipe planned together, with tokens, widths and int8 among what is planned where it has none of them.

    Widths come behind the cuts, so that they are fitted to what the cut leaves; tokens in front of all that reads them.

    Raises:
        RecipeError: there is no task to plan on.
    """
    if recipe.task is None:
        raise RecipeError("--together", "plans on a task, and there is none", remedy="pass -t TASK")
    names = [step.name for step in recipe.passes]
    if "prune-tokens" not in names:
        place = names.count("canonicalize")
        recipe = recipe.model_copy(update={"passes": (*recipe.passes[:place], *TOKENS, *recipe.passes[place:])})
        names = [step.name for step in recipe.passes]
    if not set(names) & {step.name for step in WIDTHS}:
        place = max((i for i, name in enumerate(names, 1) if name in _IN_FRONT), default=names.count("canonicalize"))
        passes = (*recipe.passes[:place], *WIDTHS, *recipe.passes[place:])
        recipe = recipe.model_copy(update={"passes": passes})
    if not any(name.startswith("quantize-") for name in names):
        recipe = with_quantization(recipe, "int8")
    return recipe.model_copy(update={"planning": "together"})
