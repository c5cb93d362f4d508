"""Profiles as problems for the solver: sites with losses, costs and interactions, and what the whole model takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlmopt.core.budgets import Budgets, Quantity
from vlmopt.core.errors import BudgetError, ProfileError, VlmoptError
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.planning.cuts import Candidate
from vlmopt.planning.interacting import site_interactions
from vlmopt.planning.proposing import problem_of
from vlmopt.planning.solving import Problem, Site
from vlmopt.profiling.document import Profile, ProfiledScore, read_profile

SCOPES = ("branches", "layers", "both")
_MEASURE_AGAIN = "measure it again with `vlmopt profile -m MODEL -t TASK -o FILE`"


@dataclass(frozen=True)
class TaskProblem:
    """One profile ready to be planned with. `drops` is the problem in points of the metric; None where not measured."""

    profile: Profile
    place: str
    rows: Mapping[str, ProfiledScore]
    losses: Problem
    drops: Problem | None

    @property
    def task(self) -> str:
        return self.profile.task.name

    def loss_error(self, names: Sequence[str]) -> float | None:
        """Standard error of the summed loss, as if errors of single scores were independent."""
        return _root_of_squares([self.rows[name].stderr for name in names])

    def drop_error(self, names: Sequence[str]) -> float | None:
        return _root_of_squares([self.rows[name].drop_stderr for name in names])


def read_problems(paths: Sequence[Path], *, scope: str, keep: Sequence[str]) -> list[TaskProblem]:
    """The profiles, which must be of one model and score the same sites.

    Args:
        scope: which sites may be cut: branches, layers or both.
        keep: names or patterns of sites that stay.

    Raises:
        ProfileError: a file is no profile, has no site of that scope, or two profiles do not belong together.
        PassOptionError: a pattern of `keep` means nothing.
    """
    found = [_problem(read_profile(path), str(path), scope=scope, keep=keep) for path in paths]
    first = found[0]
    for other in found[1:]:
        _refuse_strangers(first, other)
    order = [site.name for site in first.losses.sites]
    return [replace(one, losses=_ordered(one.losses, order), drops=one.drops and _ordered(one.drops, order))
            for one in found]  # fmt: skip


def totals_of(one: TaskProblem, quantity: Quantity) -> float:
    """What the whole model takes of a resource, in its unit.

    Raises:
        ProfileError: the profile does not say.
    """
    totals = one.profile.totals
    if not totals:
        found = f"does not say what the whole model takes, so {quantity.option} cannot be planned for"
        raise ProfileError(one.place, found, remedy=_MEASURE_AGAIN)
    if quantity is Quantity.LATENCY:
        times = [total.latency_us for total in totals]
        if any(time is None for time in times):
            remedy = _MEASURE_AGAIN.replace("-o FILE", "-o FILE --latency")
            raise ProfileError(one.place, "has no measured times, so --latency cannot be planned for", remedy=remedy)
        return math.fsum(time for time in times if time is not None)
    return float(sum(total.macs if quantity is Quantity.MACS else total.params_bytes for total in totals))


def needs_of(one: TaskProblem, budgets: Budgets) -> dict[str, float]:
    """What a cut must save of every limited resource; zero where the model is within the budget as it is."""
    totals = {limit.quantity: totals_of(one, limit.quantity) for limit in budgets.resources}
    return {
        limit.quantity.value: max(0.0, totals[limit.quantity] - limit.resolve(totals[limit.quantity]))
        for limit in budgets.resources
    }


def drops_of(one: TaskProblem) -> Problem:
    """The problem in points of the metric.

    Raises:
        ProfileError: the profile holds losses only.
    """
    if one.drops is None:
        found = "has no drops in points, so --max-drop cannot be planned for"
        remedy = f"{_MEASURE_AGAIN} --estimator leave-one-out, or limit a resource instead"
        raise ProfileError(one.place, found, remedy=remedy)
    return one.drops


def max_points(budgets: Budgets) -> float | None:
    """The drop that is allowed, in points.

    Raises:
        BudgetError: it is a share of the original's metric, which no profile holds.
    """
    if budgets.drop is None:
        return None
    if budgets.drop.is_relative:
        found = f"{budgets.drop.text} of the original's metric means nothing without the metric, and a profile has none"
        raise BudgetError("--max-drop", found, expected="points such as 1", remedy="give points; `optimize` takes both")
    return budgets.drop.value


def _problem(profile: Profile, place: str, *, scope: str, keep: Sequence[str]) -> TaskProblem:
    wanted = {"branches": ("branch",), "layers": ("layer",), "both": ("branch", "layer")}[scope]
    scores = {f"{s.component}/{s.name}": s for s in profile.scores if s.scope in wanted}
    if not scores:
        raise ProfileError(place, f"scores no {scope}", remedy="choose other --sites, or " + _MEASURE_AGAIN)
    check_patterns("--keep", keep, list(scores))
    rows = {name: score for name, score in scores.items() if not is_match(name, keep)}
    strange = next((name for name, row in rows.items() if not math.isfinite(row.score)), None)
    if strange is not None:
        raise ProfileError(place, f"the score of {strange} is no number", remedy=_MEASURE_AGAIN)
    bytes_each = _bytes_per_parameter(profile)
    candidates = [_candidate(name, row, bytes_each) for name, row in rows.items()]
    pairs = [(one.first, one.second, one.score) for one in profile.interactions]
    losses = problem_of(candidates, site_interactions(candidates, pairs))
    drops = None
    if all(row.drop_points is not None for row in rows.values()):
        drops = Problem(tuple(replace(site, loss=_points(rows[site.name])) for site in losses.sites))
    return TaskProblem(profile, place, rows, losses, drops)


def _candidate(name: str, row: ProfiledScore, bytes_each: Mapping[str, float]) -> Candidate:
    return Candidate(
        name=name,
        score=row.score,
        position=row.layer,
        macs=row.macs,
        latency_us=row.latency_us or 0.0,
        size_bytes=round(row.params * bytes_each.get(row.component, 0.0)),
        branches=frozenset(f"{row.component}/{branch}" for branch in row.branches),
    )


def _bytes_per_parameter(profile: Profile) -> dict[str, float]:
    return {total.component: total.params_bytes / total.params for total in profile.totals if total.params}


def _points(row: ProfiledScore) -> float:
    assert row.drop_points is not None, "the caller has looked"
    return row.drop_points


def _ordered(problem: Problem, order: Sequence[str]) -> Problem:
    place = {name: i for i, name in enumerate(order)}
    sites: list[Site] = sorted(problem.sites, key=lambda site: place[site.name])
    return Problem(tuple(sites), problem.interactions)


def _refuse_strangers(first: TaskProblem, other: TaskProblem) -> None:
    a, b = first.profile, other.profile
    if a.model.fingerprint != b.model.fingerprint:
        found = f"is of another model ({b.model.path}) than {first.place} ({a.model.path})"
        raise ProfileError(
            other.place, found, expected="profiles of one model", remedy="profile one model on all tasks"
        )
    if (a.unit, a.scoring) != (b.unit, b.scoring):
        found = f"measures {b.unit} ({b.scoring}), and {first.place} measures {a.unit} ({a.scoring})"
        raise ProfileError(other.place, found, remedy="profile all tasks with one estimator and one --scoring")
    missing = sorted(set(first.rows) ^ set(other.rows))
    if missing:
        found = f"{missing[0]} is scored in one of {first.place} and {other.place} only"
        raise ProfileError(other.place, found, expected="profiles of the same sites")
    if a.task.fingerprint == b.task.fingerprint and a.task.kind == b.task.kind:
        raise VlmoptError(other.place, f"is of the same task as {first.place}", remedy="give each task once")


def _root_of_squares(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(math.fsum(error**2 for error in known)) if len(known) == len(errors) else None
