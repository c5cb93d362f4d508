"""`vlmopt optimize`: capture, profile, choose, cut, recover, verify, emit, measure, report, publish."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vlmopt import __version__
from vlmopt.core.contract import Pass
from vlmopt.core.errors import GateError, PassError, PassOptionError
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, TASK_BOUND, Fact
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S
from vlmopt.core.ledger import Ledger
from vlmopt.core.machine import versions
from vlmopt.core.progress import Progress, Silent
from vlmopt.recipe.loading import recipe_digest, save_recipe
from vlmopt.recipe.order import check_order
from vlmopt.recipe.schema import PassStep, Recipe
from vlmopt.registry import make_pass, producers
from vlmopt.rewrite.pipeline import Observer, StepResult
from vlmopt.rundir import LEDGER, RECIPE, RunDirectory, refuse_existing
from vlmopt.workflow.choosing import given_profile
from vlmopt.workflow.evidence import Evidence
from vlmopt.workflow.opening import open_recipe, open_task, with_fitted_head
from vlmopt.workflow.profiling import digest
from vlmopt.workflow.publishing import emit_and_verify, keep_measurements, write_results
from vlmopt.workflow.refusing import SITE_OPTIONS, refuse_early, refuse_recovery
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.stepping import run_passes
from vlmopt.workflow.watching.observing import Watch, prepare, start_watching
from vlmopt.workflow.watching.tracing import why_lines


def optimize(
    recipe: Recipe,
    output: Path,
    *,
    force: bool = False,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs a recipe and publishes the artifact; returns the report.

    Args:
        watch: what to show of the passes while they run; it changes nothing about the artifact.

    Raises:
        GateError: something was verified and found different; nothing lies under the final name.
        PassError: a pass failed; what the steps before it measured is kept for the next try.
    """
    show, watch = progress or Silent(), watch or Watch()
    passes = load_passes(recipe, time_limit_s=watch.pass_timeout_s)
    refuse_existing(output, force=force)
    refuse_early(recipe)
    prepare(watch, output=output)
    opened = open_recipe(recipe, progress=show)
    refuse_recovery(recipe, opened.program)
    bound = None if recipe.task is None else open_task(opened, recipe.task, seed=recipe.seed, progress=show)
    profile = None if bound is None else given_profile(recipe, bound)
    task = "" if bound is None else bound.task.fingerprint
    key = digest([__version__, versions(), recipe_digest(recipe), opened.program.source.fingerprint, task])
    with RunDirectory(output, key=key, force=force) as run:
        if run.has_resumed:
            show.message(f"resuming from {run.partial}")
        state = RunState(recipe, run, opened, bound, Ledger(run.path(LEDGER)), show, profile=profile)
        state.warnings += watch.left_out
        return _compile(state, passes, watch)


def _compile(state: RunState, passes: list[Pass], watch: Watch) -> dict[str, Any]:
    run = state.run
    try:
        set_up(state)
        steps = _run_watched(state, passes, watch)
        evidence = emit_and_verify(state, steps)
        save_recipe(_resolved(state.recipe, steps), run.path(RECIPE))
        report = write_results(state, steps, evidence)
        _refuse_failed(evidence, run.partial)
        run.publish()
    except PassOptionError:
        keep_measurements(run)
        raise
    except (GateError, PassError):
        raise  # what was found is in the partial directory
    except BaseException:
        keep_measurements(run)
        raise
    return report


class _Results(Observer):
    """Keeps the results of the steps that were finished, for a recipe that repeats them.

    Where a cut was chosen again they are those of the last try.
    """

    def __init__(self) -> None:
        self.steps: list[StepResult] = []

    def after(self, result: StepResult) -> None:
        self.steps = [*self.steps[: result.step - 1], result]


def _run_watched(state: RunState, passes: list[Pass], watch: Watch) -> list[StepResult]:
    """Runs the passes under the observers asked for; where one fails, the error says what is kept and how to go on."""
    watching, finished = start_watching(watch, state.sample_feeds), _Results()
    try:
        observers = (*watching.observers, finished)
        steps = run_passes(state, passes, observers=observers, time_limit_s=watch.pass_timeout_s)
    except PassOptionError:
        raise
    except (GateError, PassError) as error:
        recipe = state.run.path(RECIPE)
        save_recipe(_resolved(state.recipe, finished.steps), recipe)
        advice = f"what was finished is kept in {state.run.partial}; {bisect_advice(recipe)}"
        remedy = f"{error.remedy}; {advice}" if error.remedy else advice
        kind = GateError if isinstance(error, GateError) else PassError
        raise kind(error.place, error.found, expected=error.expected, remedy=remedy) from error
    finally:
        if watching.trace is not None:
            watch.write("\n".join(why_lines(watching.trace.answers())))
    limit = state.recipe.max_sites
    if limit is not None and sum(len(step.applied) for step in steps) >= limit:
        state.warnings.append(f"--limit {limit} was reached: no further site was applied")
    return steps


def bisect_advice(recipe: Path) -> str:
    """What to do about a site that breaks something."""
    return f"`vlmopt bisect {shlex.quote(str(recipe))}` finds the site"


def load_passes(recipe: Recipe, *, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> list[Pass]:
    """The recipe's passes with their options, in an order that has been checked.

    Args:
        time_limit_s: for the import of each pass.

    Raises:
        RecipeError, PassError: an unknown pass or option, or a step that lacks what it needs.
    """
    folders = [Path(folder) for folder in recipe.pass_dirs]
    passes = [make_pass(step.name, step.options, folders, time_limit_s=time_limit_s) for step in recipe.passes]
    check_order(passes, initial=initial_facts(recipe), producers=producers(folders))
    return passes


def initial_facts(recipe: Recipe) -> frozenset[Fact]:
    """What holds before the first pass of a recipe."""
    known = {CAPTURED, CANONICAL}
    return frozenset(
        known | ({TASK_BOUND} if recipe.task else set()) | ({ADAPTERS_INSERTED} if recipe.adapters else set())
    )


def set_up(state: RunState) -> None:
    """The splits, and the program that everything is compared with: the original with its head fitted the same way."""
    recipe, bound = state.recipe, state.bound
    if bound is None:
        state.original = state.opened.program
        return
    state.fit = bound.source.workload(bound.program, "profile", limit=recipe.num_samples)
    with state.progress.stage("original"):
        state.original = with_fitted_head(bound.program, state.fit, seed=recipe.seed, progress=state.progress)


def _resolved(recipe: Recipe, steps: Sequence[StepResult]) -> Recipe:
    """The recipe with the sites that were chosen written out: running it again needs no profile and no search.

    Steps that have not run stay as they are.
    """
    resolved = []
    for step, result in zip_longest(recipe.passes, steps):
        option = SITE_OPTIONS.get(step.name)
        if result is None or option is None or result.plan.is_chosen:
            resolved.append(step)
        elif result.applied:
            names = [site.name for site in result.applied]
            resolved.append(PassStep(name=step.name, options={**step.options, option: names}))
        # else nothing was cut, and without names the step would search again
    return recipe.model_copy(update={"passes": tuple(resolved)})


def _refuse_failed(evidence: Evidence, partial: Path) -> None:
    for gate in evidence.gates:
        if not gate.passed:
            raise GateError(
                f"gate {gate.name!r}",
                f"found {gate.found:.4g}",
                expected=f"at most {gate.allowed:.4g}",
                remedy=f"nothing was published; {partial} keeps the report; {bisect_advice(partial / RECIPE)}",
            )
