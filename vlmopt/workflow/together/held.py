"""Holds plans to what they really take: emitted and timed, budgets tightened where one was missed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from vlmopt.core.errors import PlanError
from vlmopt.core.program import Program
from vlmopt.emit import emit_program
from vlmopt.planning.together import Tried
from vlmopt.planning.together_search import TogetherSearch
from vlmopt.workflow.budgeting import LATENCY_NOISE, Found, allowed_amounts, really_takes
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.timing import arrays_of, time_each
from vlmopt.workflow.together.effects import Effects
from vlmopt.workflow.together.steps import OpenStep, program_behind

_MAX_TIGHTENED = 3
_OVERSHOOT, _LARGEST_STEP = 1.25, 0.1
_RUNS, _ROUNDS = 60, 10

Searched = tuple[TogetherSearch, list[Tried], list[str]]


def tightened(
    state: RunState,
    program: Program,
    steps: Sequence[OpenStep],
    needs: Mapping[str, float],
    effects: Effects,
    searched: Callable[[Mapping[str, float]], Searched],
    *,
    folded: Collection[str],
) -> Searched:
    """The search under needs whose best plan, emitted, is within the budgets.

    Raises:
        PlanError: none is, or the plan still misses them after a few tightenings.
    """
    notes: list[str] = []
    if not needs:
        return searched(needs)
    tighter = dict(needs)
    for _ in range(_MAX_TIGHTENED + 1):
        search, held, own = searched(tighter)
        found = really_takes(state, program_behind(state, program, steps, held[0].plan), folded=folded)
        missed = [one for one in found if not one.is_met_without_noise]
        if not missed:
            return search, held[:1], [*notes, *own]
        notes.append(f"a plan that missed its budget was tightened: {'; '.join(one.text for one in missed)}")
        state.progress.message(f"plan: {notes[-1]}")
        _tighten(tighter, missed, held[0], allowed_amounts(state, effects.times_us))
    raise PlanError(
        "the budgets",
        f"the plan still misses them after {_MAX_TIGHTENED} tightenings: {'; '.join(one.text for one in missed)}",
        remedy="relax the budget",
    )


def _tighten(needs: dict[str, float], missed: Sequence[Found], plan: Tried, allowed: Mapping[str, float]) -> None:
    """Asks for what the plan was to save and for what it lacked."""
    for one in missed:
        resource = one.limit.quantity.value
        share = min(_OVERSHOOT * (one.found / one.allowed - 1.0), _LARGEST_STEP)
        needs[resource] = max(needs.get(resource, 0.0), plan.saved(resource)) + share * allowed[resource]


def fastest_first(
    state: RunState, program: Program, steps: Sequence[OpenStep], held: Sequence[Tried], *, folded: Collection[str]
) -> list[Tried]:
    """Plans that a bound on the drop alone let through, the one first that is fastest when it is emitted and timed.

    What a sum of single times promised decides nothing; a plan that is no faster than the one before it but for noise
    comes behind it.
    """
    if len(held) < 2 or state.recipe.budgets.limits.resources or state.recipe.device_profile is not None:
        return list(held)
    programs = {str(i): program_behind(state, program, steps, one.plan) for i, one in enumerate(held)}
    totals = dict.fromkeys(programs, 0.0)
    feeds = {name: state.sample_feeds(one) for name, one in programs.items()}
    with tempfile.TemporaryDirectory(prefix="vlmopt-finalists-") as folder:
        files = {}
        for name, one in programs.items():
            (Path(folder) / name).mkdir()
            left = one.with_components({key: part for key, part in one.components.items() if key not in folded})
            files[name] = emit_program(
                left, ("onnx",), Path(folder) / name, progress=state.progress, opset=state.recipe.opset
            )
        for component in files["0"]:
            paths = {name: Path(folder) / name / own[component]["onnx"] for name, own in files.items()}
            arrays = {name: arrays_of(programs[name], component, feeds[name][component]) for name in paths}
            table = time_each(paths, arrays, progress=state.progress, runs=_RUNS, rounds=_ROUNDS, threads=1)
            for name, latency in table.items():
                totals[name] += 1e3 * latency.quietest_ms
    best = min(totals, key=lambda name: totals[name])
    if totals[best] > totals["0"] * (1.0 - LATENCY_NOISE):
        best = "0"
    order = [int(best), *(i for i in range(len(held)) if i != int(best))]
    return [held[i] for i in order]
