"""Refuses recipes that cannot come to a good end, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from vlmopt.core.contract import Pass
from vlmopt.core.errors import PlanError, RecipeError
from vlmopt.core.facts import QUANTIZED
from vlmopt.core.formats import refuse_missing
from vlmopt.core.integer_products import saturates
from vlmopt.core.program import Program
from vlmopt.devices.document import read_device_profile
from vlmopt.profiling.document import read_profile
from vlmopt.recipe.schema import PassStep, Recipe
from vlmopt.rewrite.pipeline import StepResult
from vlmopt.runtime.kernels import lacking

# The option of a pass that names its sites, where the planner may choose them.
CUT_OPTIONS = {"skip-branches": "branches", "skip-layers": "layers"}
SITE_OPTIONS = {**CUT_OPTIONS, "quantize-int8": "modules", "quantize-weights": "modules"}


def refuse_early(recipe: Recipe) -> None:
    """Looks at what the recipe alone can tell.

    Raises:
        RecipeError: a format whose package is not installed; a budget without a task to measure it on; training in half
            precision; a precision that the runtime has no kernels for.
        PlanError: a lossy pass with neither a budget nor named sites.
        ProfileError: the profile cannot be read.
    """
    refuse_missing(recipe.emit)
    budgets, drop = recipe.budgets.limits, recipe.budgets.drop
    if drop is not None and recipe.task is None:
        unit = "of its value" if drop.is_relative else "points"
        found = f"allows a metric to drop by {drop.text} {unit}, and there is no task to measure it on"
        raise RecipeError("max_drop", found, remedy="pass -t TASK, or leave the budget out")
    if budgets and recipe.task is None and any(_leaves_the_choice(step) for step in recipe.passes):
        found = f"{budgets.text} leaves the choice to the planner, and there is no task to measure cuts on"
        raise RecipeError("budgets", found, remedy="pass -t TASK, or name the sites in the recipe")
    if not budgets and any(_leaves_the_choice(step) for step in recipe.passes):
        raise without_budget()
    if recipe.recovery.trains and recipe.dtype != "float32":
        found = f"trains weights in {recipe.dtype}, in which small steps are lost"
        raise RecipeError("recovery", found, expected="dtype: float32", remedy="leave --dtype out, or --recover head")
    if lacks := lacking(recipe.dtype):
        found = f"ONNX Runtime has no {lacks[0]} of {recipe.dtype} on a CPU, so no graph could be checked or timed"
        remedy = (
            "leave --dtype out; to store weights so and compute in float32, "
            "add the pass quantize-weights with bits: 16 and half: bfloat16"
        )
        raise RecipeError("dtype", found, expected="float32 or float16", remedy=remedy)
    if any(step.options.get("weights") == "signed" for step in recipe.passes if step.name == "quantize-int8"):
        _refuse_signed(recipe)
    if recipe.profile.file is not None:
        read_profile(Path(recipe.profile.file))
    is_in_turn = recipe.planning == "in-turn" and any(_leaves_the_choice(step) for step in recipe.passes)
    if recipe.device_profile is not None and is_in_turn:
        found = "predicts times for one plan over all passes, and passes in turn are timed here"
        raise RecipeError("device_profile", found, remedy="pass --together, or leave it out")
    if recipe.device_profile is not None:  # of another device as often as not, and so of another runtime
        read_device_profile(Path(recipe.device_profile), allow_other_runtime=True)


def _refuse_signed(recipe: Recipe) -> None:
    """Refuses files that this processor would compute wrong, so that nothing could be checked in them."""
    if saturates() and {"onnx", "openvino"} & set(recipe.emit):
        found = "weights are signed, and products of signed weights saturate here, so no file could be checked"
        remedy = "leave it out, or compile where they do not (x86 with VNNI, ARM)"
        raise RecipeError("quantize-int8", found, expected="unsigned or auto", remedy=remedy)


def refuse_recovery(recipe: Recipe, program: Program) -> None:
    """Looks at what only the model tells.

    Raises:
        RecipeError: a recovery that the model has no head, no classes or no answers for.
    """
    recovery = recipe.recovery
    if recovery.preference > 0 and (program.generation is None or not recovery.trains):
        why = f"level {recovery.level} trains nothing" if not recovery.trains else "the model writes no text"
        found = f"prefers expected answers to rejected ones, and {why}"
        expected = "level adapters or weights, and a generative model"
        raise RecipeError("recovery: preference", found, expected=expected)
    if program.generation is None:
        return
    architecture, remedy = program.source.architecture, "--recover weights trains it on the task's own answers"
    if recovery.level == "closed-form":
        found = f"closed-form fits a head to the task, and {architecture}, which writes text, has none"
        raise RecipeError("recovery", found, remedy=remedy)
    if recovery.trains and (recovery.distillation > 0 or recovery.feature_distillation > 0):
        found = f"distils classes or embeddings, and {architecture} writes text"
        raise RecipeError("recovery", found, expected="distillation: 0", remedy=remedy)


def refuse_idle_quantization(pass_: Pass, result: StepResult) -> None:
    """Looks at what a quantization found to do: who asks for one and gets a float artifact must be told.

    Raises:
        PlanError: it has no site, with the first of its reasons.
    """
    if QUANTIZED not in pass_.produces or result.plan.sites:
        return
    refusals = result.plan.refusals
    why = f"{refusals[0].name} {refusals[0].reason}" if refusals else "the model has no such layers"
    more = f", and {len(refusals) - 1} more are refused" if len(refusals) > 1 else ""
    place = f"step {result.step} {result.name}"
    raise PlanError(place, f"has nothing to quantize: {why}{more}", remedy="change its options, or leave it out")


def _leaves_the_choice(step: PassStep) -> bool:
    option = CUT_OPTIONS.get(step.name)  # without a budget other passes apply all of their sites
    return option is not None and not step.options.get(option)


def without_budget() -> PlanError:
    """What a run without a budget gets when a pass needs one."""
    return PlanError(
        "the recipe",
        "has a lossy pass with neither a budget nor named sites",
        expected="a task and a budget such as max_drop, or the option that names the sites",
        remedy="pass -t TASK --max-drop 1, or name the sites in the recipe",
    )
