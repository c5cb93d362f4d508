"""Makes one plan for all open steps of a recipe, under its budgets, and writes its sites into the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmopt.core.contract import Pass, Plan
from vlmopt.core.errors import PlanError
from vlmopt.core.program import Program
from vlmopt.devices.document import DeviceProfile, read_device_profile
from vlmopt.planning.cuts import Choice, Measurement, Trial
from vlmopt.planning.together import (
    Measure,
    Role,
    Tried,
    Variant,
    next_to_go,
    plan_of,
    saved_by,
    variants_of,
    without_kind,
)
from vlmopt.planning.together import Plan as Edits
from vlmopt.planning.together_search import TogetherSearch, confirmed
from vlmopt.recipe.schema import Recipe
from vlmopt.registry import make_pass
from vlmopt.workflow.budgeting import folded_components, needs_of
from vlmopt.workflow.choosing import profile_of
from vlmopt.workflow.judging import Judge
from vlmopt.workflow.opening import OpenedTask
from vlmopt.workflow.refusing import without_budget
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.searching import choose_measured
from vlmopt.workflow.together.effects import Effects, effects_of
from vlmopt.workflow.together.held import fastest_first, tightened
from vlmopt.workflow.together.kept import MeasuredPlans
from vlmopt.workflow.together.steps import OpenStep, behind, open_steps, program_behind

SAMPLES = 512, 2048  # of each split: for the search, and for the best it finds
WRITING_SAMPLES = 64, 256  # ... where a model writes, which takes it seconds an item
_N_NEXT = 5


def plan_together(state: RunState, program: Program, passes: Sequence[Pass]) -> list[Pass]:
    """The passes of the recipe with the sites of the plan named; the recipe of the state says the same afterwards.

    Raises:
        PlanError: no plan meets the budgets.
    """
    if state.bound is None or not state.recipe.budgets.limits:
        raise without_budget()
    with state.stage("one plan"):
        profile = profile_of(state, state.bound)
        state.importance.update(profile.importance())
        recipe = _planned(state, state.bound, program, passes)
    state.recipe = recipe
    folders = [Path(folder) for folder in recipe.pass_dirs]
    return [make_pass(step.name, step.options, folders) for step in recipe.passes]


def _planned(state: RunState, bound: OpenedTask, program: Program, passes: Sequence[Pass]) -> Recipe:
    steps = open_steps(state, program, passes)
    meter = _Meter(state, bound, program, steps)
    with state.progress.stage(f"what {sum(len(step.sites) for step in steps)} sites of {len(steps)} passes do"):
        effects = effects_of(state, program, steps, meter.on_few, _device(state))
    for line in effects.left_out:
        state.progress.message(f"plan: {line}")
    variants = variants_of(effects.options, effects.wholes)
    folded = folded_components(state.recipe, program)
    needs = {name: need for name, need in needs_of(state, program, effects.times_us, folded=folded).items() if need > 0}
    is_met = not needs and meter.max_drop is None
    seeds = {} if is_met else _seeds(state, bound, program, steps, variants)

    def searched(needs: Mapping[str, float]) -> tuple[TogetherSearch, list[Tried], list[str]]:
        search = TogetherSearch(variants, meter.on_few, "latency", meter.max_drop, needs)
        search.run(seeds)
        held, notes = confirmed(search, meter.on_more)
        return search, held, notes

    search, held, notes = tightened(state, program, steps, needs, effects, searched, folded=folded)
    held = fastest_first(state, program, steps, held, folded=folded)
    chosen = held[0] if held else Tried("nothing", (), Measurement(0.0, 0.0))
    notes = [*notes, "the budgets are met without an edit"] if is_met else notes
    _keep(state, search, chosen, meter.n_items, meter.max_drop, notes)
    state.together = _told(search, chosen, effects, variants, meter.on_more)
    named = behind(state, program, steps, chosen.plan)[1]
    return state.recipe.model_copy(update={"passes": named, "planning": "in-turn"})


def _device(state: RunState) -> DeviceProfile | None:
    place = state.recipe.device_profile
    return None if place is None else read_device_profile(Path(place), allow_other_runtime=True)


class _Meter:
    """Measures plans on few items, and on more of them, each behind the steps that would run."""

    def __init__(self, state: RunState, bound: OpenedTask, program: Program, steps: Sequence[OpenStep]) -> None:
        self._state, self._program, self._steps = state, program, steps
        counts = SAMPLES if program.generation is None else WRITING_SAMPLES
        self._few, self._more = (Judge(state, bound, n) for n in counts)
        self._plans = MeasuredPlans(state, bound, program, steps)
        self.n_items = self._more.n_items
        drop = state.recipe.budgets.drop
        points = self._few.reference_points if drop is not None and drop.is_relative else 100.0
        self.max_drop = None if drop is None else drop.resolve(points) + state.headroom

    def on_few(self, plan: Edits) -> Measurement:
        """With the error that the same drop would have on all items: what is passed on is measured there anyway."""
        found = self._measured(self._few, plan)
        shrink = (self._few.n_items / self.n_items) ** 0.5
        return replace(found, standard_error=found.standard_error * shrink)

    def on_more(self, plan: Edits) -> Measurement:
        return self._measured(self._more, plan)

    def _measured(self, judge: Judge, plan: Edits) -> Measurement:
        with self._state.progress.stage(f"a plan of {len(plan)} sites"):
            return self._plans.measured(
                judge, plan, lambda: program_behind(self._state, self._program, self._steps, plan)
            )


def _seeds(
    state: RunState, bound: OpenedTask, program: Program, steps: Sequence[OpenStep], variants: Sequence[Variant]
) -> dict[str, list[Variant]]:
    """Plans that are measured whatever the integer program says: what a search of cuts alone finds, fewer bits
    everywhere, and both."""
    by_edits = {frozenset(variant.edits): variant for variant in variants}
    cuts: list[Variant] = []
    removing = next((step for step in steps if step.role is Role.REMOVES), None)
    if removing is not None:
        profile = profile_of(state, bound)
        with suppress(PlanError):
            found = choose_measured(state, bound, program, Plan(tuple(removing.sites.values())), profile)
            own = (by_edits.get(frozenset({removing.edit(name)})) for name in found.choice.names)
            cuts = [variant for variant in own if variant is not None]
    seeds: dict[str, list[Variant]] = {"nothing": [], "cuts alone": cuts}
    gone = {place for variant in cuts for place in variant.places}
    for step in steps:
        if step.role is Role.QUANTIZES:
            single = _everywhere(step, variants)
            name = step.pass_.name
            seeds[f"{name} everywhere"] = single
            seeds[f"cuts, then {name}"] = [*cuts, *(one for one in single if not one.places & gone)]
    return seeds


def _everywhere(step: OpenStep, variants: Sequence[Variant]) -> list[Variant]:
    """All sites of one step, at every place."""
    most: dict[frozenset[str], Variant] = {}
    for variant in variants:
        if {number for number, _ in variant.edits} == {step.number}:
            known = most.get(variant.places)
            most[variant.places] = variant if known is None or len(variant.edits) > len(known.edits) else known
    return list(most.values())


def _keep(
    state: RunState, search: TogetherSearch, chosen: Tried, n_items: int, max_drop: float | None, notes: Sequence[str]
) -> None:
    """Leaves the choice where the report finds it."""
    trials = tuple(
        Trial(
            one.origin,
            len(one.plan),
            round(one.saved("macs")),
            one.measurement,
            search.is_within(one.measurement),
            one.saved("latency"),
            round(one.saved("size")),
            search.fits(one.variants),
            _names(one.plan),
        )
        for one in search.tried
    )
    state.choice = Choice(_names(chosen.plan), chosen.measurement, trials, notes=tuple(notes))
    state.choice_items, state.choice_max_drop = n_items, max_drop
    state.ledger.note(
        "plan",
        "together",
        names=state.choice.names,
        origin=chosen.origin,
        drop_points=chosen.measurement.drop_points,
        standard_error=chosen.measurement.standard_error,
        factors=dict(search.factors),
        n_measured=len(search.tried),
    )


def _names(plan: Edits) -> tuple[str, ...]:
    return tuple(site for _, site in sorted(plan))


def _told(
    search: TogetherSearch, chosen: Tried, effects: Effects, variants: Sequence[Variant], measure: Measure
) -> dict[str, Any]:
    """What every pass of the plan saves, and what it loses: the plan with its edits given back, measured."""
    kinds = []
    for kind in search.kinds:
        n_sites = sum(len(one.edits) for variant in chosen.variants for one in variant.options if one.kind == kind)
        row: dict[str, Any] = {"name": kind, "n_sites": n_sites}
        if n_sites:
            left = without_kind(chosen, kind, variants)
            without = measure(plan_of(left)) if left else Measurement(0.0, 0.0)
            row["lost_points"] = chosen.measurement.drop_points - without.drop_points
            for resource in ("latency", "size", "macs"):
                row[f"saved_{resource}"] = saved_by(chosen.variants, resource) - saved_by(left, resource)
        kinds.append(row)
    following = next_to_go(chosen, variants, search.factors, search.resource)[:_N_NEXT]
    now = {place: one for one in chosen.variants for place in one.places}
    whole_us = sum(effects.times_us[name] for name in effects.planned)
    return {
        "origin": chosen.origin,
        "whole_us": whole_us,
        "predicted_us": max(0.0, whole_us - saved_by(chosen.variants, "latency")),  # times of parts are noisy
        "kinds": kinds,
        "next": [
            {
                "edits": [site for _, site in one.edits],
                "passes": [option.kind for option in one.options],
                "saves_us": one.saves.get("latency", 0.0)
                - saved_by({id(now[p]): now[p] for p in one.places if p in now}.values(), "latency"),
                "loss": one.loss(search.factors),
            }
            for one in following
        ],
        "left_out": list(effects.left_out),
    }
