"""The Pareto front of predicted loss against what is saved of one resource."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmopt.planning.solving import Problem, least_loss

N_POINTS = 24


@dataclass(frozen=True)
class FrontPoint:
    """A cut that no other beats in both: what it saves, and its predicted loss."""

    names: tuple[str, ...]
    saved: float
    loss: float


def pareto_front(
    problem: Problem, resource: str, *, n_points: int = N_POINTS, needs: Mapping[str, float] | None = None
) -> list[FrontPoint]:
    """Cuts of least predicted loss at evenly spaced savings, the smallest first, less those that another one beats.

    Each is exact for its saving; between two of them there may be more.
    """
    most = sum(site.saves.get(resource, 0.0) for site in problem.without(_overlapping(problem)).sites)
    found: dict[tuple[str, ...], FrontPoint] = {}
    for i in range(n_points + 1):
        solution = least_loss(problem, {**(needs or {}), resource: most * i / n_points})
        if solution is not None:
            saved = problem.saved(frozenset(solution.names), resource)
            found[solution.names] = FrontPoint(solution.names, saved, solution.loss)
    front: list[FrontPoint] = []
    for point in sorted(found.values(), key=lambda p: (-p.saved, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front[::-1]


def _overlapping(problem: Problem) -> frozenset[str]:
    """Sites whose branches a smaller site holds too, so that what is left can be cut together."""
    taken: set[str] = set()
    left_out = set()
    for site in sorted(problem.sites, key=lambda s: len(s.branches)):
        if taken & site.branches:
            left_out.add(site.name)
        else:
            taken |= site.branches
    return frozenset(left_out)
