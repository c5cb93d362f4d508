"""Which candidates of a lossy pass are cut: by the profile, measured on validation, within the allowed drop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from vlmopt.core.contract import Plan, Site
from vlmopt.core.program import Program
from vlmopt.planning.choice import Candidate, choose
from vlmopt.planning.meter import CutMeter
from vlmopt.profiling.document import Profile, check_profile, read_profile
from vlmopt.recipe.schema import Recipe
from vlmopt.workflow.opening import LazyOutputs, OpenedTask
from vlmopt.workflow.profiling import checkpoint_in, estimator_of, measure_profile
from vlmopt.workflow.refusing import without_budget
from vlmopt.workflow.remembering import (
    MeasuredChoice,
    choice_key,
    keep_choice,
    keep_profile,
    kept_choice,
    kept_profile,
    profile_folder,
)
from vlmopt.workflow.run_state import RunState

# Fitting and checking a cut while planning uses at most so many samples of each split; the final fit uses all.
PLANNING_SAMPLES = 2048


def choose_sites(state: RunState, program: Program, plan: Plan) -> list[Site]:
    """The sites that the planner picks under the allowed drop, by the profile and by measuring on validation."""
    max_drop = state.recipe.budgets.max_drop
    if state.bound is None or max_drop is None:
        raise without_budget()
    profile = _profile(state, state.bound)
    state.importance.update(profile.importance())
    measured = _choice(state, state.bound, program, worth_cutting(state.recipe, program, plan), max_drop)
    choice, state.choice, state.choice_items = measured.choice, measured.choice, measured.n_items
    trials = [
        {"order": t.order, "n_cut": t.n_cut, "macs": t.macs, **asdict(t.measurement), "is_accepted": t.is_accepted}
        for t in choice.trials
    ]
    state.ledger.note("plan", "choice", names=choice.names, **asdict(choice.measurement), trials=trials)
    chosen = set(choice.names)
    return [site for site in plan.sites if site.name in chosen]


def worth_cutting(recipe: Recipe, program: Program, plan: Plan) -> Plan:
    """The plan without sites in components that the recipe evaluates at compile time: cutting those saves nothing."""
    if all(step.name != "fold-fixed-inputs" for step in recipe.passes):
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
    with_layers = any(step.name == "skip-layers" for step in state.recipe.passes)
    workload = bound.source.workload(bound.program, "profile", limit=limit)
    folder = profile_folder(state, bound, workload.fingerprint, with_layers=with_layers)
    state.profile = kept_profile(folder)
    if state.profile is not None:
        state.progress.message("profile: taken up from an earlier run")
        return state.profile
    state.profile = measure_profile(
        state.original,
        bound.task,
        workload,
        estimator_of(settings, with_layers=with_layers),
        scoring=settings.scoring,
        seed=state.recipe.seed,
        dtype=state.recipe.dtype,
        checkpoint=checkpoint_in(folder / "batches"),
        progress=state.progress,
    )
    keep_profile(folder, state.profile)
    return state.profile


def given_profile(recipe: Recipe, bound: OpenedTask) -> Profile | None:
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


def _choice(state: RunState, bound: OpenedTask, program: Program, plan: Plan, max_drop: float) -> MeasuredChoice:
    """What an earlier try chose for this very program and budget, or what a search finds now."""
    limit = _least(PLANNING_SAMPLES, state.recipe.num_samples)
    fit = bound.source.workload(program, "profile", limit=limit)
    check = bound.source.workload(program, "validation", limit=limit)
    key = choice_key(state, bound, program, plan, workloads=[fit.fingerprint, check.fingerprint])
    measured = kept_choice(state.run, key)
    if measured is not None:
        state.progress.message(f"plan: taken up from an earlier run ({len(measured.choice.names)} sites)")
        return measured
    reference = LazyOutputs(state.reference, fit, progress=state.progress)
    branches = {site.name: frozenset(f"{site.component}/{name}" for name in site.target) for site in plan.sites}
    with state.progress.stage("plan"):
        meter = CutMeter(program, fit, check, reference, progress=state.progress, seed=state.recipe.seed)
        choice = choose(
            _candidates(plan, state.importance),
            lambda cuts: meter.measure([frozenset().union(*(branches[name] for name in cut)) for cut in cuts]),
            max_drop=max_drop,
        )
    measured = MeasuredChoice(choice, fit.n_items + check.n_items)
    keep_choice(state.run, key, measured)
    return measured


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
