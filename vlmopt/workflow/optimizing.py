"""`vlmopt optimize`: capture, profile, choose, cut, recover, verify, emit, measure, report, publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlmopt import __version__
from vlmopt.core.contract import Context, Pass, Plan, Promise, Site
from vlmopt.core.errors import GateError
from vlmopt.core.facts import CANONICAL, CAPTURED, TASK_BOUND
from vlmopt.core.ledger import Ledger
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress, Silent
from vlmopt.planning.choice import Candidate, Choice, choose
from vlmopt.planning.meter import CutMeter
from vlmopt.profiling.document import Profile, check_profile, read_profile
from vlmopt.recipe.loading import recipe_digest, save_recipe
from vlmopt.recipe.order import check_order
from vlmopt.recipe.schema import PassStep, Recipe
from vlmopt.registry import make_pass, producers
from vlmopt.rewrite.pipeline import StepResult, run_step
from vlmopt.rundir import LEDGER, RECIPE, RunDirectory, refuse_existing
from vlmopt.tuning.closed_form import recover_heads
from vlmopt.verify.parity import check_step
from vlmopt.workflow.opening import LazyOutputs, OpenedTask, open_model, open_task, with_fitted_head
from vlmopt.workflow.profiling import checkpoint_in, digest, make_estimator, measure_profile, versions
from vlmopt.workflow.publishing import PROFILE_WORK, Evidence, emit_and_verify, keep_measurements, write_results
from vlmopt.workflow.refusing import SITE_OPTIONS, refuse_early, without_budget
from vlmopt.workflow.run_state import RunState

# Fitting and checking a cut while planning uses at most so many samples of each split; the final fit uses all.
PLANNING_SAMPLES = 2048


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
    profile = None if bound is None else _given_profile(recipe, bound)
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
        steps = _run_passes(state, passes)
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


def _run_passes(state: RunState, passes: list[Pass]) -> list[StepResult]:
    program, steps = state.original, list[StepResult]()
    state.reference = state.original
    for number, pass_ in enumerate(passes, 1):
        with state.progress.stage(f"pass {pass_.name}"), state.ledger.timed(f"20-passes/{number:02d}-{pass_.name}"):
            result = run_step(
                program,
                pass_,
                Context(importance=state.importance, seed=state.recipe.seed),
                step=number,
                choose=lambda current, plan: _choose(state, current, plan),
            )
            steps.append(result)
            _note(state, result)
            _hold_to_promise(state, program, result)
            program = _recovered(state, result)
            if all(step.promise is not Promise.LOSSY or not step.applied for step in steps):
                state.reference = program
    state.optimized = program
    return steps


def _note(state: RunState, result: StepResult) -> None:
    folder = state.run.work(f"20-passes/{result.step:02d}-{result.name}")
    for name, text in result.text_before.items():
        (folder / f"{name}.before.txt").write_text(text, encoding="utf-8")
    for name, text in result.text_after.items():
        (folder / f"{name}.after.txt").write_text(text, encoding="utf-8")
    state.ledger.note("passes", result.name, n_sites=len(result.plan.sites), n_applied=len(result.applied))


def _hold_to_promise(state: RunState, before: Program, result: StepResult) -> None:
    feeds = state.sample_feeds(before)
    gate = check_step(f"{result.step} {result.name}", result.promise, before, result.program, feeds)
    if gate is not None:
        state.gates.append(gate)
        if not gate.passed:
            found = f"changed the result by {gate.found:.2g} of the largest output"
            raise GateError(f"step {result.step} {result.name}", found, expected=f"at most {gate.allowed:.0e}")


def _recovered(state: RunState, result: StepResult) -> Program:
    """After a cut the heads behind it are fitted anew on the whole profile split."""
    cut = frozenset(site.component for site in result.applied)
    if result.promise is not Promise.LOSSY or not cut or state.bound is None:
        return result.program
    fit = state.bound.source.workload(result.program, "profile", limit=state.recipe.num_samples)
    reference = LazyOutputs(state.reference, fit, progress=state.progress)
    return recover_heads(
        result.program, fit, reference, components=cut, progress=state.progress, seed=state.recipe.seed
    )


def _choose(state: RunState, program: Program, plan: Plan) -> list[Site]:
    """The sites that the planner picks under the allowed drop, by the profile and by measuring on validation."""
    max_drop = state.recipe.budgets.max_drop
    if state.bound is None or max_drop is None:
        raise without_budget()
    profile = _profile(state, state.bound)
    state.importance.update(profile.importance())
    choice = _searched(state, state.bound, program, _worth_cutting(state, program, plan), max_drop)
    trials = [
        {"order": t.order, "n_cut": t.n_cut, "macs": t.macs, **asdict(t.measurement), "is_accepted": t.is_accepted}
        for t in choice.trials
    ]
    state.ledger.note("plan", "choice", names=choice.names, **asdict(choice.measurement), trials=trials)
    chosen = set(choice.names)
    return [site for site in plan.sites if site.name in chosen]


def _worth_cutting(state: RunState, program: Program, plan: Plan) -> Plan:
    """The plan without sites in components that the recipe evaluates at compile time: cutting those saves nothing."""
    if all(step.name != "fold-fixed-inputs" for step in state.recipe.passes):
        return plan
    folded = {
        name
        for name, component in program.components.items()
        if {spec.name for spec in component.inputs} <= program.fixed_inputs.get(name, {}).keys()
    }
    return replace(plan, sites=tuple(site for site in plan.sites if site.component not in folded))


def _profile(state: RunState, bound: OpenedTask) -> Profile:
    if state.profile is not None:
        return state.profile
    settings = state.recipe.profile
    limit = _least(settings.num_samples, state.recipe.num_samples)
    layers = any(step.name == "skip-layers" for step in state.recipe.passes)
    state.profile = measure_profile(
        state.original,
        bound.task,
        bound.source.workload(bound.program, "profile", limit=limit),
        make_estimator(settings.estimator, settings.scoring, with_layers=layers),
        scoring=settings.scoring,
        seed=state.recipe.seed,
        dtype=state.recipe.dtype,
        checkpoint=checkpoint_in(state.run.work(f"{PROFILE_WORK}/batches")),
        progress=state.progress,
    )
    return state.profile


def _given_profile(recipe: Recipe, bound: OpenedTask) -> Profile | None:
    """The profile that the recipe names, if it is of this model and of these samples."""
    file = recipe.profile.file
    if file is None:
        return None
    profile = read_profile(Path(file))
    # As many samples as a run without it would take, or as it was measured on.
    limits = (_least(recipe.profile.num_samples, recipe.num_samples), profile.task.n_items)
    found = [bound.source.workload(bound.program, "profile", limit=n).fingerprint for n in limits]
    task = profile.task.fingerprint if profile.task.fingerprint in found else found[0]
    kind = bound.task.specification.kind.value
    check_profile(profile, place=file, model=bound.program.source.fingerprint, task=task, kind=kind)
    return profile


def _searched(state: RunState, bound: OpenedTask, program: Program, plan: Plan, max_drop: float) -> Choice:
    limit = _least(PLANNING_SAMPLES, state.recipe.num_samples)
    fit = bound.source.workload(program, "profile", limit=limit)
    check = bound.source.workload(program, "validation", limit=limit)
    reference = LazyOutputs(state.reference, fit, progress=state.progress)
    branches = {site.name: frozenset(f"{site.component}/{name}" for name in site.target) for site in plan.sites}
    with state.progress.stage("plan"):
        meter = CutMeter(program, fit, check, reference, progress=state.progress, seed=state.recipe.seed)
        return choose(
            _candidates(plan, state.importance),
            lambda cuts: meter.measure([frozenset().union(*(branches[name] for name in cut)) for cut in cuts]),
            max_drop=max_drop,
        )


def _candidates(plan: Plan, importance: Mapping[str, float]) -> list[Candidate]:
    """The plan's sites with their scores; depth is relative to the component, so that two encoders can be compared."""
    counts: dict[str, int] = {}
    for site in plan.sites:
        counts[site.component] = counts.get(site.component, 0) + 1
    seen: dict[str, int] = {}
    candidates = []
    for site in plan.sites:
        seen[site.component] = seen.get(site.component, 0) + 1
        position = 1000 * seen[site.component] // counts[site.component]
        candidates.append(Candidate(site.name, importance.get(site.name, 0.0), position, site.saving.macs))
    return candidates


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


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
