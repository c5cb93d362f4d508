"""Which sites to cut under budgets, exactly: an integer program over predicted losses and counted costs.

    minimise    sum_i loss_i x_i + sum_(i,j) w_ij z_ij                      x_i in {0, 1}: site i is cut
    subject to  sum_i saving_ri x_i >= need_r         for every resource r that is limited
                sum_(i: b in branches_i) x_i <= 1     for every branch b: a layer and its branches exclude each other
                z_ij <= x_i,  z_ij <= x_j,  z_ij >= x_i + x_j - 1           z_ij = x_i x_j wherever all x are integers

or the other way round: the most of one resource is saved with the loss bounded. Losses and needs are scaled to about one
before HiGHS sees them, since its tolerances are absolute; what it hands back is evaluated again without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TOLERANCE = 1e-9  # relative, of a need or a bound


@dataclass(frozen=True)
class Site:
    """What may be cut: its predicted loss, what it saves by resource, and the branches that go with it."""

    name: str
    loss: float
    saves: Mapping[str, float]
    branches: frozenset[str]


@dataclass(frozen=True)
class Interaction:
    """What two sites lose together beyond the sum of both."""

    first: str
    second: str
    loss: float


@dataclass(frozen=True)
class Problem:
    """All sites and their interactions."""

    sites: tuple[Site, ...]
    interactions: tuple[Interaction, ...] = ()

    def loss(self, names: frozenset[str]) -> float:
        """Predicted loss of cutting these sites together."""
        single = sum(site.loss for site in self.sites if site.name in names)
        return single + sum(one.loss for one in self.interactions if {one.first, one.second} <= names)

    def saved(self, names: frozenset[str], resource: str) -> float:
        return sum(site.saves.get(resource, 0.0) for site in self.sites if site.name in names)

    def without(self, names: frozenset[str]) -> Problem:
        """The problem in which these sites are kept."""
        sites = tuple(site for site in self.sites if site.name not in names)
        left = {site.name for site in sites}
        return Problem(sites, tuple(one for one in self.interactions if {one.first, one.second} <= left))


@dataclass(frozen=True)
class Solution:
    """Sites to cut, in the order of the problem, with their predicted loss."""

    names: tuple[str, ...]
    loss: float


@dataclass
class _Rows:
    """Constraints `low <= A v <= high`, row by row."""

    rows: list[dict[int, float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, row: dict[int, float], *, low: float = float("-inf"), high: float = float("inf")) -> None:
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)


def least_loss(problem: Problem, needs: Mapping[str, float]) -> Solution | None:
    """The cut of least predicted loss that saves at least `needs` of every resource; None where no cut does."""
    return _solve(problem, _losses(problem), needs=needs, max_loss=None)


def most_saved(
    problem: Problem, resource: str, *, max_loss: float | None = None, needs: Mapping[str, float] | None = None
) -> Solution | None:
    """The cut that saves most of one resource with a predicted loss of at most `max_loss`; None where no cut does."""
    largest = max((site.saves.get(resource, 0.0) for site in problem.sites), default=0.0) or 1.0
    objective = {i: -site.saves.get(resource, 0.0) / largest for i, site in enumerate(problem.sites)}
    return _solve(problem, objective, needs=needs or {}, max_loss=max_loss)


def _losses(problem: Problem) -> dict[int, float]:
    """Coefficients of the predicted loss: sites first, then one variable an interaction."""
    n = len(problem.sites)
    single = {i: site.loss for i, site in enumerate(problem.sites)}
    return single | {n + k: one.loss for k, one in enumerate(problem.interactions)}


def _solve(
    problem: Problem, objective: Mapping[int, float], *, needs: Mapping[str, float], max_loss: float | None
) -> Solution | None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    n, n_all = len(problem.sites), len(problem.sites) + len(problem.interactions)
    if n == 0:
        is_enough = all(need <= 0 for need in needs.values()) and (max_loss is None or max_loss >= 0)
        return Solution((), 0.0) if is_enough else None
    rows = _Rows()
    _add_needs(rows, problem, needs)
    if max_loss is not None:
        losses = _losses(problem)
        scale = _scale([*losses.values(), max_loss])
        slack = _TOLERANCE * max(abs(max_loss) / scale, 1e-3)
        rows.add({i: loss / scale for i, loss in losses.items()}, high=max_loss / scale + slack)
    _add_conflicts(rows, problem.sites)
    _add_products(rows, problem)
    scale = _scale(list(objective.values()))
    costs = _vector({i: value / scale for i, value in objective.items()}, n_all)
    constraints = [LinearConstraint(_matrix(rows, n_all), rows.low, rows.high)] if rows.rows else []
    whole = _vector(dict.fromkeys(range(n), 1.0), n_all)
    # scipy's default gap of 1e-4 would hand back cuts that are merely near the optimum.
    found = milp(costs, constraints=constraints, integrality=whole, bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0})
    if found.x is None:
        return None
    names = tuple(site.name for site, value in zip(problem.sites, found.x[:n], strict=True) if value > 0.5)
    return Solution(names, problem.loss(frozenset(names)))


def _add_needs(rows: _Rows, problem: Problem, needs: Mapping[str, float]) -> None:
    for resource, need in needs.items():
        if need > 0:
            savings = {i: site.saves.get(resource, 0.0) / need for i, site in enumerate(problem.sites)}
            rows.add(savings, low=1.0 - _TOLERANCE)


def _add_conflicts(rows: _Rows, sites: Sequence[Site]) -> None:
    owners: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        for branch in site.branches:
            owners.setdefault(branch, []).append(i)
    for group in dict.fromkeys(tuple(owner) for owner in owners.values()):
        if len(group) > 1:
            rows.add(dict.fromkeys(group, 1.0), high=1.0)


def _add_products(rows: _Rows, problem: Problem) -> None:
    index = {site.name: i for i, site in enumerate(problem.sites)}
    for k, one in enumerate(problem.interactions, len(problem.sites)):
        first, second = index[one.first], index[one.second]
        rows.add({k: 1.0, first: -1.0}, high=0.0)
        rows.add({k: 1.0, second: -1.0}, high=0.0)
        rows.add({k: 1.0, first: -1.0, second: -1.0}, low=-1.0)


def _scale(values: Sequence[float]) -> float:
    return max((abs(value) for value in values), default=0.0) or 1.0


def _vector(values: Mapping[int, float], n: int) -> NDArray[Any]:
    import numpy as np

    made = np.zeros(n)
    made[list(values)] = list(values.values())
    return made


def _matrix(rows: _Rows, n: int) -> Any:
    from scipy.sparse import csr_array

    places = [(i, j, value) for i, row in enumerate(rows.rows) for j, value in row.items()]
    lines, columns, values = zip(*places, strict=True)
    return csr_array((values, (lines, columns)), shape=(len(rows.rows), n))
