"""Recipes with a quantization that was asked for by a word (`--quantize int8`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmopt.core.errors import RecipeError
from vlmopt.recipe.schema import PassStep, Recipe

# By what is typed: the passes with a task to measure on, and those without one.
QUANTIZATIONS: Mapping[str, tuple[Sequence[PassStep], Sequence[PassStep]]] = {
    "int8": (
        (PassStep(name="fold-channel-scales"), PassStep(name="quantize-int8")),
        (PassStep(name="quantize-int8"),),
    ),
    "int8-static": (
        (PassStep(name="fold-channel-scales"), PassStep(name="quantize-int8", options={"ranges": "static"})),
        (),
    ),
    "8bit": ((PassStep(name="quantize-weights"),), (PassStep(name="quantize-weights"),)),
    "4bit": (
        (PassStep(name="quantize-weights", options={"bits": 4, "rounding": "gptq"}),),
        (PassStep(name="quantize-weights", options={"bits": 4}),),
    ),
    "float16": ((PassStep(name="quantize-weights", options={"bits": 16, "embeddings": True}),),) * 2,
}
_LAST = "fold-constants"


def with_quantization(recipe: Recipe, kind: str) -> Recipe:
    """The recipe with the passes of a kind behind all that edits weights, in front of a last `fold-constants`.

    Raises:
        RecipeError: the recipe quantizes already, or the kind needs a task and there is none.
    """
    held = [step.name for step in recipe.passes if step.name.startswith("quantize-")]
    if held:
        raise RecipeError("--quantize", f"the recipe has {held[0]} already", remedy="leave one of them out")
    steps = QUANTIZATIONS[kind][recipe.task is None]
    if not steps:
        remedy = "pass -t TASK, or --quantize int8, whose ranges are those of each call"
        raise RecipeError("--quantize", f"{kind} finds its ranges on a task, and there is none", remedy=remedy)
    passes = list(recipe.passes)
    place = len(passes) - 1 if passes and passes[-1].name == _LAST else len(passes)
    return recipe.model_copy(update={"passes": (*passes[:place], *steps, *passes[place:])})
