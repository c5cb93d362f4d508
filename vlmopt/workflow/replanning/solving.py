"""One cut for one or several tasks under budgets, as plain data for `vlmopt plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmopt.core.budgets import RESOURCES, Budgets, Quantity, amount_text
from vlmopt.core.errors import PlanError, VlmoptError
from vlmopt.planning.solving import Problem, Solution, best_cut, weighted
from vlmopt.workflow.replanning.profiles import (
    TaskProblem,
    drops_of,
    max_points,
    needs_of,
    read_problems,
    totals_of,
)

COMBINING = ("worst", "weighted")


@dataclass(frozen=True)
class Request:
    """What was asked of `vlmopt plan`. `weights` are of the profiles, in order; empty means equal ones."""

    profiles: tuple[Path, ...]
    budgets: Budgets
    scope: str = "branches"
    keep: tuple[str, ...] = ()
    combine: str | None = None
    weights: tuple[float, ...] = ()


def replan(request: Request) -> dict[str, Any]:
    """The cut that the profiles predict to be best under the budgets, with what it loses and saves.

    Raises:
        PlanError: no cut meets the budgets, with the closest for each.
        ProfileError, BudgetError: a profile cannot answer what was asked.
    """
    tasks = open_request(request)
    if not request.budgets:
        limits = "--max-drop, --latency, --macs or --size"
        raise PlanError("plan", "has no budget", expected=limits, remedy="set one, or draw the --front")
    together = _solved(tasks, request)
    return {
        "model": tasks[0].profile.model.path,
        "budgets": request.budgets.text,
        "combine": request.combine if len(tasks) > 1 else None,
        "sites": [_site(tasks, name) for name in together.names],
        "saves": savings(tasks[0], together.names),
        "tasks": [_task(one, together, request) for one in tasks],
    }


def open_request(request: Request) -> list[TaskProblem]:
    """The problems of all tasks; refuses options that contradict each other."""
    n = len(request.profiles)
    if n > 1 and request.combine is None:
        remedy = "--combine worst (the task that loses most decides) or --combine weighted"
        raise VlmoptError("plan", f"{n} profiles are given, and nothing says how to weigh them", remedy=remedy)
    if n == 1 and request.combine is not None:
        raise VlmoptError("--combine", "there is one profile only", remedy="give one profile a task")
    if request.weights and request.combine != "weighted":
        raise VlmoptError("--weights", "nothing is weighted", remedy="add --combine weighted, or leave them out")
    if request.weights and len(request.weights) != n:
        raise VlmoptError("--weights", f"{len(request.weights)} are given", expected=f"{n}, one a profile")
    if request.weights and (min(request.weights) < 0 or sum(request.weights) == 0):
        raise VlmoptError("--weights", "must be zero or more, and not all zero")
    return read_problems(request.profiles, scope=request.scope, keep=request.keep)


def combined(problems: Sequence[Problem], request: Request) -> list[Problem]:
    """The problems as the solver is to take them: one with the weighted loss, or all of which the worst decides."""
    if request.combine != "weighted":
        return list(problems)
    weights = request.weights or (1.0,) * len(problems)
    return [weighted(problems, [weight / sum(weights) for weight in weights])]


def savings(one: TaskProblem, names: Sequence[str]) -> dict[str, Any]:
    """What the cut saves of every resource, in its unit, and the share of the whole where the profile tells it."""
    found: dict[str, Any] = {}
    for quantity in RESOURCES:
        saved = one.losses.saved(frozenset(names), quantity.value)
        if quantity is not Quantity.MACS and not is_known(one, quantity):
            continue
        total = totals_of(one, quantity) if is_known(one, quantity) else None
        found[quantity.value] = {"saved": saved, "total": total, "share": saved / total if total else None}
    return found


def is_known(one: TaskProblem, quantity: Quantity) -> bool:
    totals = one.profile.totals
    return bool(totals) and (quantity is not Quantity.LATENCY or all(t.latency_us is not None for t in totals))


def _solved(tasks: Sequence[TaskProblem], request: Request) -> Solution:
    """Under a drop alone the cut that saves most MACs; with resources limited the one that loses least."""
    needs, points = needs_of(tasks[0], request.budgets), max_points(request.budgets)
    if points is None:
        found = best_cut(combined([one.losses for one in tasks], request), needs=needs)
        return found if found is not None else _refuse(tasks, needs, None)
    drops = [drops_of(one) for one in tasks]  # every task must stay within the drop, however losses are weighed
    if not any(need > 0 for need in needs.values()):
        found = best_cut(drops, save_most="macs", max_loss=points)
    else:
        merged = combined(drops, request)
        found = best_cut(merged, needs=needs)
        if found is not None and any(one.loss(frozenset(found.names)) > points for one in drops):
            found = best_cut(drops, needs=needs, max_loss=points)
    return found if found is not None else _refuse(tasks, needs, points)


def _refuse(tasks: Sequence[TaskProblem], needs: Mapping[str, float], points: float | None) -> Solution:
    """Raises PlanError with the closest that can be reached for every budget while the others hold."""
    problems = [one.losses if points is None else drops_of(one) for one in tasks]
    closest = []
    for resource, need in needs.items():
        others = {name: value for name, value in needs.items() if name != resource}
        best = best_cut(problems, save_most=resource, needs=others, max_loss=points)
        quantity = Quantity(resource)
        total = totals_of(tasks[0], quantity)
        asked = amount_text(quantity, total - need)
        if best is None:
            closest.append(f"--{resource} {asked} not even with every other budget missed least")
            continue
        reached = total - problems[0].saved(frozenset(best.names), resource)
        closest.append(f"{resource} {amount_text(quantity, reached)} ({reached / total:.3g}x), asked {asked}")
    if points is not None:
        least = best_cut(problems, needs=needs)
        closest.append(
            f"a predicted drop of {least.loss:.2f} points, asked {points:g}" if least is not None else "no drop at all"
        )
    raise PlanError(
        "the budgets",
        f"no cut of the {len(problems[0].sites)} sites meets them; the closest for each while the others hold: "
        + "; ".join(closest),
        remedy="relax one of them",
    )


def _site(tasks: Sequence[TaskProblem], name: str) -> dict[str, Any]:
    row = tasks[0].rows[name]
    return {
        "name": name,
        "scope": row.scope,
        "kind": row.kind,
        "macs": row.macs,
        "params": row.params,
        "latency_us": row.latency_us,
        "scores": {one.task: one.rows[name].score for one in tasks},
        "stderrs": {one.task: one.rows[name].stderr for one in tasks},
        "ranks": {one.task: _ranks(one, name) for one in tasks},
    }


def _ranks(one: TaskProblem, name: str) -> tuple[float, float] | None:
    """The 90 % interval of the rank over resamples, where the profile has it."""
    return None if one.profile.stability is None else one.profile.stability.ranks.get(name)


def _task(one: TaskProblem, together: Solution, request: Request) -> dict[str, Any]:
    """What the cut means for one task, and what this task alone would cut."""
    row = {"task": one.task, "unit": one.profile.unit, **_predicted(one, together.names)}
    if len(request.profiles) == 1:
        return row
    single = Request((request.profiles[0],), request.budgets, request.scope, request.keep)
    try:
        alone = _solved([one], single)
    except PlanError as error:  # possible under a drop only, where another task's drop is no smaller
        return {**row, "alone": None, "why_not": error.one_line()}
    shared = set(alone.names) & set(together.names)
    return {
        **row,
        "alone": {
            **_predicted(one, alone.names),
            "sites": list(alone.names),
            "n_shared": len(shared),
            "saves": savings(one, alone.names),
        },
    }


def _predicted(one: TaskProblem, names: Sequence[str]) -> dict[str, Any]:
    cut = frozenset(names)
    drop = None if one.drops is None else one.drops.loss(cut)
    return {
        "n_cut": len(names),
        "loss": one.losses.loss(cut),
        "loss_error": one.loss_error(names),
        "drop_points": drop,
        "drop_error": None if drop is None else one.drop_error(names),
    }
