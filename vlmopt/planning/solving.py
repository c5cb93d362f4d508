"""Which sites to cut under budgets, exactly: an integer program over predicted losses and counted costs.

    minimise    sum_i loss_i x_i + sum_(i,j) w_ij z_ij                      x_i in {0, 1}: site i is cut
    subject to  sum_i saving_ri x_i >= need_r         for every resource r that is limited
                sum_(i: b in branches_i) x_i <= 1     for every branch b: a layer and its branches exclude each other
                z_ij <= x_i,  z_ij <= x_j,  z_ij >= x_i + x_j - 1           z_ij = x_i x_j wherever all x are integers

or the other way round: the most of one resource is saved with the loss bounded. For several tasks the largest of their
losses is minimised, and each is bounded. Losses and needs are scaled to about
one before HiGHS sees them, since its tolerances are absolute; what it hands back is evaluated again without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    return best_cut([problem], needs=needs)


def most_saved(problem: Problem, resource: str, *, max_loss: float | None = None) -> Solution | None:
    """The cut that saves most of one resource with a predicted loss of at most `max_loss`; None where no cut does."""
    return best_cut([problem], save_most=resource, max_loss=max_loss)


def weighted(problems: Sequence[Problem], weights: Sequence[float]) -> Problem:
    """One problem whose loss is the weighted sum of those of several tasks over the same sites."""
    sites = tuple(
        replace(same[0], loss=sum(weight * site.loss for weight, site in zip(weights, same, strict=True)))
        for same in zip(*(problem.sites for problem in problems), strict=True)
    )
    pairs = [
        replace(one, loss=weight * one.loss)
        for weight, problem in zip(weights, problems, strict=True)
        for one in problem.interactions
    ]
    return Problem(sites, tuple(pairs))


def best_cut(
    problems: Sequence[Problem],
    *,
    needs: Mapping[str, float] | None = None,
    max_loss: float | None = None,
    save_most: str | None = None,
) -> Solution | None:
    """One cut for all tasks: of the least largest loss, or of the most saved; None where there is none.

    Args:
        problems: one a task, over the same sites.
        max_loss: of every task.
        save_most: the resource to save; without it the largest loss is minimised.

    Returns:
        The cut, with the largest of its losses.
    """
    sites = problems[0].sites
    pairs = {frozenset({one.first, one.second}): None for problem in problems for one in problem.interactions}
    losses = [_coefficients(problem, list(pairs)) for problem in problems]
    n, n_products = len(sites), len(pairs)
    if n == 0:
        is_enough = all(need <= 0 for need in (needs or {}).values()) and (max_loss is None or max_loss >= 0)
        return Solution((), 0.0) if is_enough else None
    rows = _Rows()
    _add_needs(rows, sites, needs or {})
    _add_conflicts(rows, sites)
    _add_products(rows, sites, list(pairs))
    scale = _scale([value for one in losses for value in one.values()] + ([max_loss] if max_loss is not None else []))
    worst = n + n_products  # the last variable: the largest loss of any task
    for one in losses:
        scaled = {i: value / scale for i, value in one.items()}
        if max_loss is not None:
            rows.add(scaled, high=max_loss / scale + _TOLERANCE * max(abs(max_loss) / scale, 1e-3))
        if save_most is None:
            rows.add({**scaled, worst: -1.0}, high=0.0)
    if save_most is None:
        objective = {worst: 1.0}
    else:
        largest = max(site.saves.get(save_most, 0.0) for site in sites) or 1.0
        objective = {i: -site.saves.get(save_most, 0.0) / largest for i, site in enumerate(sites)}
    return _run(problems, objective, rows, n_products)


def _coefficients(problem: Problem, pairs: Sequence[frozenset[str]]) -> dict[int, float]:
    """Coefficients of the predicted loss: one a site, then one a product."""
    n, place = len(problem.sites), {pair: i for i, pair in enumerate(pairs)}
    found = {i: site.loss for i, site in enumerate(problem.sites)}
    for one in problem.interactions:
        k = n + place[frozenset({one.first, one.second})]
        found[k] = found.get(k, 0.0) + one.loss
    return found


def _run(problems: Sequence[Problem], objective: Mapping[int, float], rows: _Rows, n_products: int) -> Solution | None:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    sites = problems[0].sites
    n, n_all = len(sites), len(sites) + n_products + 1
    low, high = np.zeros(n_all), np.ones(n_all)
    low[-1], high[-1] = -np.inf, np.inf
    if n_all - 1 not in objective:
        low[-1] = high[-1] = 0.0
    found = milp(
        _vector(objective, n_all),
        constraints=[LinearConstraint(_matrix(rows, n_all), rows.low, rows.high)] if rows.rows else [],
        integrality=_vector(dict.fromkeys(range(n), 1.0), n_all),
        bounds=Bounds(low, high),
        # scipy's default gap of 1e-4 would hand back cuts that are merely near the optimum.
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    names = tuple(site.name for site, value in zip(sites, found.x[:n], strict=True) if value > 0.5)
    return Solution(names, max(problem.loss(frozenset(names)) for problem in problems))


def _add_needs(rows: _Rows, sites: Sequence[Site], needs: Mapping[str, float]) -> None:
    for resource, need in needs.items():
        if need > 0:
            savings = {i: site.saves.get(resource, 0.0) / need for i, site in enumerate(sites)}
            rows.add(savings, low=1.0 - _TOLERANCE)


def _add_conflicts(rows: _Rows, sites: Sequence[Site]) -> None:
    owners: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        for branch in site.branches:
            owners.setdefault(branch, []).append(i)
    for group in dict.fromkeys(tuple(owner) for owner in owners.values()):
        if len(group) > 1:
            rows.add(dict.fromkeys(group, 1.0), high=1.0)


def _add_products(rows: _Rows, sites: Sequence[Site], pairs: Sequence[frozenset[str]]) -> None:
    index = {site.name: i for i, site in enumerate(sites)}
    for k, pair in enumerate(pairs, len(sites)):
        first, second = (index[name] for name in sorted(pair))
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
