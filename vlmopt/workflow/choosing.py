"""Which candidates of a lossy pass are cut: by the profile, measured on validation, within the allowed drop."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlmopt.core.budgets import Quantity
from vlmopt.core.contract import Plan, Site
from vlmopt.core.program import Program
from vlmopt.planning.cuts import Trial
from vlmopt.profiling.document import Profile, check_profile, read_profile
from vlmopt.recipe.schema import Recipe
from vlmopt.workflow.branch_timing import error_lines, has_times, time_branches, with_latency
from vlmopt.workflow.budgeting import folded_components
from vlmopt.workflow.opening import OpenedTask
from vlmopt.workflow.profiling import checkpoint_in, estimator_of, measure_profile
from vlmopt.workflow.refusing import without_budget
from vlmopt.workflow.remembering import keep_profile, kept_profile, profile_folder
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.searching import choose_measured


def choose_sites(state: RunState, program: Program, plan: Plan) -> list[Site]:
    """The sites that the planner picks under the budgets, by the profile and by measuring on validation."""
    if state.bound is None or not state.recipe.budgets.limits:
        raise without_budget()
    profile = _with_times(state, profile_of(state, state.bound))
    state.importance.update(profile.importance())
    measured = choose_measured(state, state.bound, program, worth_cutting(state.recipe, program, plan), profile)
    state.choice = choice = measured.choice
    state.choice_items, state.choice_max_drop = measured.n_items, measured.max_drop_points
    state.ledger.note(
        "plan",
        "choice",
        names=choice.names,
        **asdict(choice.measurement),
        kept_out=None if choice.kept_out is None else asdict(choice.kept_out),
        notes=choice.notes,
        trials=[_trial(trial) for trial in choice.trials],
    )
    chosen = set(choice.names)
    return [site for site in plan.sites if site.name in chosen]


def _trial(trial: Trial) -> dict[str, Any]:
    kept = ("order", "n_cut", "macs", "is_accepted", "latency_us", "size_bytes", "fits")
    return {name: getattr(trial, name) for name in kept} | asdict(trial.measurement)


def worth_cutting(recipe: Recipe, program: Program, plan: Plan) -> Plan:
    """The plan without sites in components that the recipe evaluates at compile time: cutting those saves nothing."""
    folded = folded_components(recipe, program)
    return replace(plan, sites=tuple(site for site in plan.sites if site.component not in folded))


def profile_of(state: RunState, bound: OpenedTask) -> Profile:
    """The profile that the recipe names, or an earlier try kept, or one that is measured now."""
    if state.profile is not None:
        return state.profile
    settings = state.recipe.profile
    limit = _least(settings.num_samples, state.recipe.num_samples)
    with_layers = any(step.name == "skip-layers" for step in state.recipe.passes)
    workload = bound.source.workload(bound.program, "profile", limit=limit)
    folder = profile_folder(state, bound, workload.fingerprint, with_layers=with_layers)
    state.profile_folder = folder
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


def _with_times(state: RunState, profile: Profile) -> Profile:
    """The profile with the times of branches, measured now where a latency budget needs them and it has none."""
    if Quantity.LATENCY not in state.recipe.budgets.limits.limits or has_times(profile):
        return profile
    with state.stage("branch times"):
        feeds = state.sample_feeds(state.original)
        times = time_branches(state.original, feeds, opset=state.recipe.opset, progress=state.progress)
    for line in error_lines(times):
        state.progress.message(f"branch times: {line}")
    state.profile = with_latency(profile, state.original, times)
    if state.profile_folder is not None:
        keep_profile(state.profile_folder, state.profile)
    return state.profile


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
