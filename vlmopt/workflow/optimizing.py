"""`vlmopt optimize`: capture, profile, choose, cut, recover, verify, emit, measure, report, publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmopt import __version__
from vlmopt.core.contract import Context, Pass, Plan
from vlmopt.core.errors import GateError
from vlmopt.core.facts import CANONICAL, CAPTURED, TASK_BOUND
from vlmopt.core.ledger import Ledger
from vlmopt.core.progress import Progress, Silent
from vlmopt.recipe.loading import recipe_digest, save_recipe
from vlmopt.recipe.order import check_order
from vlmopt.recipe.schema import PassStep, Recipe
from vlmopt.registry import make_pass, producers
from vlmopt.rewrite.pipeline import StepResult
from vlmopt.rundir import LEDGER, RECIPE, RunDirectory, refuse_existing
from vlmopt.workflow.choosing import given_profile
from vlmopt.workflow.opening import open_model, open_task, with_fitted_head
from vlmopt.workflow.profiling import digest, versions
from vlmopt.workflow.publishing import Evidence, emit_and_verify, keep_measurements, write_results
from vlmopt.workflow.refusing import SITE_OPTIONS, refuse_early
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.stepping import run_passes


def optimize(
    recipe: Recipe, output: Path, *, force: bool = False, dry_run: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Runs a recipe and publishes the artifact; returns the report.

    With `dry_run` nothing is measured or written: the plans of the passes come back.

    Raises:
        GateError: something was verified and found different; nothing lies under the final name.
    """
    show = progress or Silent()
    passes = load_passes(recipe)
    if dry_run:
        return _dry_run(recipe, passes, show)
    refuse_existing(output, force=force)
    refuse_early(recipe)
    opened = open_model(
        recipe.model, device=recipe.device, dtype=recipe.dtype, allow_pickle=recipe.allow_pickle, progress=show
    )
    bound = None if recipe.task is None else open_task(opened, recipe.task, seed=recipe.seed, progress=show)
    profile = None if bound is None else given_profile(recipe, bound)
    task = "" if bound is None else bound.task.fingerprint
    key = digest([__version__, versions(), recipe_digest(recipe), opened.program.source.fingerprint, task])
    with RunDirectory(output, key=key, force=force) as run:
        if run.has_resumed:
            show.message(f"resuming from {run.partial}")
        state = RunState(recipe, run, opened, bound, Ledger(run.path(LEDGER)), show, profile=profile)
        return _compile(state, passes)


def _compile(state: RunState, passes: list[Pass]) -> dict[str, Any]:
    run = state.run
    try:
        _set_up(state)
        steps = run_passes(state, passes)
        evidence = emit_and_verify(state, steps)
        save_recipe(_resolved(state.recipe, steps), run.path(RECIPE))
        report = write_results(state, steps, evidence)
        _refuse_failed(evidence, run.partial)
        run.publish()
    except GateError:
        raise  # what was found is in the partial directory
    except BaseException:
        keep_measurements(run)
        raise
    return report


def load_passes(recipe: Recipe) -> list[Pass]:
    """The recipe's passes with their options, in an order that has been checked.

    Raises:
        RecipeError, PassError: an unknown pass or option, or a step that lacks what it needs.
    """
    folders = [Path(folder) for folder in recipe.pass_dirs]
    passes = [make_pass(step.name, step.options, folders) for step in recipe.passes]
    initial = {CAPTURED, CANONICAL} | ({TASK_BOUND} if recipe.task else set())
    check_order(passes, initial=initial, producers=producers(folders))
    return passes


def _dry_run(recipe: Recipe, passes: list[Pass], progress: Progress) -> dict[str, Any]:
    """Every pass's plan on the captured program, each step seeing the program as it came from capture."""
    opened = open_model(
        recipe.model, device=recipe.device, dtype=recipe.dtype, allow_pickle=recipe.allow_pickle, progress=progress
    )
    program = opened.program
    if recipe.task is not None:
        program = open_task(opened, recipe.task, seed=recipe.seed, progress=progress).program
    return {"plan": [_plan_row(i, pass_, pass_.plan(program, Context())) for i, pass_ in enumerate(passes, 1)]}


def _plan_row(step: int, pass_: Pass, plan: Plan) -> dict[str, Any]:
    return {
        "step": step,
        "name": pass_.name,
        "promise": pass_.promise.value,
        "is_chosen": plan.is_chosen,
        "sites": [
            {"name": s.name, "component": s.component, "summary": s.summary, "saving": s.saving.as_dict()}
            for s in plan.sites
        ],
        "refusals": [{"name": r.name, "component": r.component, "reason": r.reason} for r in plan.refusals],
    }


def _set_up(state: RunState) -> None:
    """The splits, and the program that everything is compared with: the original with its head fitted the same way."""
    recipe, bound = state.recipe, state.bound
    if bound is None:
        state.original = state.opened.program
        return
    state.fit = bound.source.workload(bound.program, "profile", limit=recipe.num_samples)
    with state.progress.stage("original"):
        state.original = with_fitted_head(bound.program, state.fit, seed=recipe.seed, progress=state.progress)


def _resolved(recipe: Recipe, steps: list[StepResult]) -> Recipe:
    """The recipe with the sites that were chosen written out: running it again needs no profile and no search."""
    resolved = []
    for step, result in zip(recipe.passes, steps, strict=True):
        option = SITE_OPTIONS.get(step.name)
        if option and not result.plan.is_chosen and result.applied:
            names = [site.name for site in result.applied]
            resolved.append(PassStep(name=step.name, options={**step.options, option: names}))
        elif option and not result.plan.is_chosen:
            continue  # nothing was cut, and without names the step would search again
        else:
            resolved.append(step)
    return recipe.model_copy(update={"passes": tuple(resolved)})


def _refuse_failed(evidence: Evidence, partial: Path) -> None:
    for gate in evidence.gates:
        if not gate.passed:
            raise GateError(
                f"gate {gate.name!r}",
                f"found {gate.found:.4g}",
                expected=f"at most {gate.allowed:.4g}",
                remedy=f"nothing was published; {partial} keeps the report",
            )
