"""Searches a cut by measuring on validation; a plan that misses its budget is tightened and tried again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from vlmopt.core.contract import Plan
from vlmopt.core.errors import PlanError
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Outputs
from vlmopt.graph.branches import by_component
from vlmopt.graph.joined import joined
from vlmopt.planning.cuts import Candidate, Choice, saved_by
from vlmopt.planning.interacting import site_interactions
from vlmopt.planning.measuring import MeasuredPlanner
from vlmopt.planning.meter import CutMeter
from vlmopt.profiling.document import Profile
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.workflow.budgeting import Found, allowed_amounts, folded_components, needs_of, really_takes
from vlmopt.workflow.cutting import cut_program
from vlmopt.workflow.opening import OpenedTask
from vlmopt.workflow.remembering import MeasuredChoice, choice_key, keep_choice, kept_choice
from vlmopt.workflow.run_state import RunState

# Fitting and checking a cut while planning uses at most so many samples of each split; the final fit uses all.
PLANNING_SAMPLES = 2048
SCREENING_SAMPLES = 512  # of each split for a first look at every cut; only the best are measured on all of the above
ELIMINATING_SAMPLES = 24  # of each split, where cuts of a model that writes are grown step by step
KEPT_OUT = 0.25  # of the items confirm the pick and take no part in the search
MAX_TIGHTENED = 5
_OVERSHOOT = 1.25  # a budget is tightened by somewhat more than it was missed by
_LARGEST_STEP = 0.1  # of what is allowed: a miss that was noise must not cost half the model


def choose_measured(
    state: RunState, bound: OpenedTask, program: Program, plan: Plan, profile: Profile
) -> MeasuredChoice:
    """What an earlier try chose for this very program and budgets, or what a search finds now."""
    limits = [limit for limit in (PLANNING_SAMPLES, state.recipe.num_samples) if limit is not None]
    fit = bound.source.workload(program, "profile", limit=min(limits))
    check = bound.source.workload(program, "validation", limit=min(limits))
    key = choice_key(state, bound, program, plan, workloads=[fit.fingerprint, check.fingerprint])
    measured = kept_choice(state.run, key)
    if measured is not None:
        state.progress.message(f"plan: taken up from an earlier run ({len(measured.choice.names)} sites)")
        return measured
    with state.progress.stage("plan"):
        planner = measured_planner(
            program,
            bound,
            candidates_of(plan, profile, program),
            lambda fit: state.outputs_of(state.reference, fit),
            original=None if state.reference is program else state.reference,
            limit=min(limits),
            seed=state.recipe.seed,
            progress=state.progress,
        )
        choice, max_drop = _searched(state, program, planner, profile)
    measured = MeasuredChoice(choice, fit.n_items + check.n_items, max_drop)
    keep_choice(state.run, key, measured)
    return measured


def measured_planner(
    program: Program,
    bound: OpenedTask,
    candidates: Sequence[Candidate],
    reference: Callable[[TaskWorkload], Outputs],
    *,
    original: Program | None = None,
    limit: int = PLANNING_SAMPLES,
    seed: int,
    progress: Progress,
) -> MeasuredPlanner:
    """A planner on the profile and validation splits, at most `limit` samples of each.

    Args:
        reference: the original's outputs on a workload, which heads without labels are fitted to.
        original: what drops are counted from, where the program was cut before.
    """

    def splits(limit: int, program: Program = program) -> tuple[TaskWorkload, TaskWorkload]:
        fit, check = (bound.source.workload(program, one, limit=limit) for one in ("profile", "validation"))
        return fit, check

    whole, before = joined(program), None if original is None else joined(original).program
    candidates = [replace(one, branches=whole.joined_sites(one.branches)) for one in candidates]

    def made(limit: int, hidden: frozenset[str] | None) -> CutMeter:
        fit, check = splits(limit)
        reads_alike = original is None or original.generation == program.generation
        return CutMeter(
            whole.program,
            fit,
            check,
            reference(fit),
            progress=progress,
            seed=seed,
            kept_out=KEPT_OUT,
            hidden=hidden,
            original=before,
            original_splits=None if original is None or reads_alike else splits(limit, original),
        )

    meter, screen, eliminating = made(limit, None), None, None
    if program.generation is not None:
        eliminating = made(min(limit, ELIMINATING_SAMPLES), meter.hidden)
    if meter.fit.n_items > 2 * SCREENING_SAMPLES and meter.hidden:
        screen = made(SCREENING_SAMPLES, meter.hidden)
    return MeasuredPlanner(candidates, meter, screen, eliminating)


def _searched(
    state: RunState, program: Program, planner: MeasuredPlanner, profile: Profile
) -> tuple[Choice, float | None]:
    """The choice, and the drop in points that it was allowed."""
    drop, candidates = state.recipe.budgets.drop, planner.candidates
    points = planner.meter.reference_points if drop is not None and drop.is_relative else 100.0
    max_drop = None if drop is None else drop.resolve(points) + state.headroom
    folded = folded_components(state.recipe, program)
    times = {total.component: total.latency_us or 0.0 for total in profile.totals}
    needs = needs_of(state, program, times, folded=folded)
    interactions = site_interactions(candidates, [(one.first, one.second, one.score) for one in profile.interactions])
    notes: list[str] = []
    for _ in range(MAX_TIGHTENED + 1):
        choice = planner.choose(max_drop=max_drop, needs=needs, interactions=interactions)
        chosen = planner.branches(frozenset(choice.names))
        own = by_component(joined(program).own_sites(chosen))
        found = really_takes(state, cut_program(program, own), folded=folded) if needs else []
        missed = [one for one in found if not one.is_met_without_noise]
        if not missed:
            return replace(choice, notes=(*notes, *choice.notes)), max_drop
        notes.append(f"a plan that missed its budget was tightened: {'; '.join(one.text for one in missed)}")
        state.progress.message(f"plan: {notes[-1]}")
        needs = _tightened(needs, missed, candidates, choice, allowed_amounts(state, times))
    raise PlanError(
        "the budgets",
        f"the plan still misses them after {MAX_TIGHTENED} tightenings: {'; '.join(one.text for one in missed)}",
        remedy="relax the budget",
    )


def _tightened(
    needs: Mapping[str, float],
    missed: Sequence[Found],
    candidates: Sequence[Candidate],
    choice: Choice,
    allowed: Mapping[str, float],
) -> dict[str, float]:
    """Needs that ask for what the plan was to save and for what it lacked.

    Args:
        allowed: of every resource, in the unit of the needs; a miss may be measured in another (on one thread).
    """
    cut = tuple(candidate for candidate in candidates if candidate.name in choice.names)
    tighter = dict(needs)
    for one in missed:
        resource = one.limit.quantity.value
        share = min(_OVERSHOOT * (one.found / one.allowed - 1.0), _LARGEST_STEP)
        tighter[resource] = max(needs[resource], saved_by(cut, resource)) + share * allowed[resource]
    return tighter


def candidates_of(plan: Plan, profile: Profile, program: Program) -> list[Candidate]:
    """The plan's sites with their scores. Depth is relative to the component, so that two encoders can be compared; in
    a model that writes one component feeds the next, and all of a later one is deeper."""
    order = {name: 1000 * i for i, name in enumerate(program.components)} if program.generation is not None else {}
    counts: dict[str, int] = {}
    for site in plan.sites:
        counts[site.component] = counts.get(site.component, 0) + 1
    scores = profile.importance()
    times = {f"{score.component}/{score.name}": score.latency_us or 0.0 for score in profile.scores}
    seen: dict[str, int] = {}
    candidates = []
    for site in plan.sites:
        seen[site.component] = seen.get(site.component, 0) + 1
        candidates.append(
            Candidate(
                name=site.name,
                score=scores.get(site.name, 0.0),
                position=order.get(site.component, 0) + 1000 * seen[site.component] // counts[site.component],
                macs=site.saving.macs,
                latency_us=times.get(site.name, 0.0),
                size_bytes=site.saving.parameters_bytes,
                branches=frozenset(f"{site.component}/{name}" for name in site.target),
            )
        )
    return candidates
