"""The solver finds what trying every subset finds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmopt.planning.solving import Interaction, Problem, Site, least_loss, most_saved

LOSSES = st.integers(-20, 100).map(lambda n: n / 100)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to seven branches, some in layers that exclude them, with interactions of either sign."""
    n = draw(st.integers(1, 7))
    sizes = [(draw(st.integers(1, 9)), draw(st.integers(0, 5))) for _ in range(n)]
    sites = [
        Site(f"b{i}", draw(LOSSES), {"macs": float(macs), "latency_us": float(time)}, frozenset({f"b{i}"}))
        for i, (macs, time) in enumerate(sizes)
    ]
    for i in range(0, n - 1, 2):
        if draw(st.booleans()):
            both = {"macs": float(sizes[i][0] + sizes[i + 1][0]), "latency_us": float(sizes[i][1] + sizes[i + 1][1])}
            sites.append(Site(f"l{i}", draw(LOSSES), both, frozenset({f"b{i}", f"b{i + 1}"})))
    pairs = [(a.name, b.name) for a, b in itertools.combinations(sites, 2) if not a.branches & b.branches]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=5, unique=True)) if pairs else []
    return Problem(tuple(sites), tuple(Interaction(a, b, draw(LOSSES)) for a, b in chosen))


def subsets(problem: Problem) -> Iterator[tuple[Site, ...]]:
    """All cuts in which no branch is cut twice."""
    for n in range(len(problem.sites) + 1):
        for cut in itertools.combinations(problem.sites, n):
            if sum(len(site.branches) for site in cut) == len(frozenset().union(*(site.branches for site in cut))):
                yield cut


def loss_by_hand(problem: Problem, cut: tuple[Site, ...]) -> float:
    names = [site.name for site in cut]
    together = [one.loss for one in problem.interactions if one.first in names and one.second in names]
    return sum(site.loss for site in cut) + sum(together)


def saved_by_hand(cut: tuple[Site, ...], resource: str) -> float:
    return sum(site.saves[resource] for site in cut)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(), st.fixed_dictionaries({"macs": st.integers(0, 40), "latency_us": st.integers(0, 20)}))
def test_the_least_loss_under_resource_budgets_is_that_of_the_best_subset(
    problem: Problem, needs: Mapping[str, int]
) -> None:
    fitting = [cut for cut in subsets(problem) if all(saved_by_hand(cut, r) >= need for r, need in needs.items())]
    found = least_loss(problem, {resource: float(need) for resource, need in needs.items()})
    assert (found is None) == (not fitting)
    if found is not None:
        cut = tuple(site for site in problem.sites if site.name in found.names)
        assert cut in fitting
        assert found.loss == pytest.approx(loss_by_hand(problem, cut), abs=1e-12)
        assert found.loss == pytest.approx(min(loss_by_hand(problem, cut) for cut in fitting), abs=1e-6)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(), st.integers(-10, 150).map(lambda n: n / 100), st.sampled_from(["macs", "latency_us"]))
def test_the_most_saved_under_a_bound_on_the_loss_is_that_of_the_best_subset(
    problem: Problem, max_loss: float, resource: str
) -> None:
    fitting = [cut for cut in subsets(problem) if loss_by_hand(problem, cut) <= max_loss + 1e-9]
    found = most_saved(problem, resource, max_loss=max_loss)
    assert (found is None) == (not fitting)
    if found is not None:
        cut = tuple(site for site in problem.sites if site.name in found.names)
        assert cut in fitting
        assert saved_by_hand(cut, resource) == max(saved_by_hand(cut, resource) for cut in fitting)


def test_an_interaction_can_make_the_cheapest_pair_the_wrong_one() -> None:
    sites = tuple(Site(n, loss, {"macs": 1.0}, frozenset({n})) for n, loss in (("a", 0.1), ("b", 0.1), ("c", 0.3)))
    alone = least_loss(Problem(sites), {"macs": 2.0})
    assert alone is not None
    assert alone.names == ("a", "b")
    together = least_loss(Problem(sites, (Interaction("a", "b", 0.5),)), {"macs": 2.0})
    assert together is not None
    assert together.names in {("a", "c"), ("b", "c")}
    assert together.loss == pytest.approx(0.4, abs=1e-12)


def test_real_sizes_do_not_disturb_the_optimum() -> None:
    """Losses of 1e-4 beside savings of 1e10: HiGHS compares both with absolute tolerances."""
    losses = [3e-4, 1e-4, 2e-4, 5e-4]
    sites = tuple(Site(f"b{i}", x, {"macs": 1.5e10 + i}, frozenset({f"b{i}"})) for i, x in enumerate(losses))
    found = least_loss(Problem(sites), {"macs": 3.0e10})
    assert found is not None
    assert found.names == ("b1", "b2")
    assert most_saved(Problem(sites), "macs", max_loss=3e-4 - 1e-9) is not None
    best = most_saved(Problem(sites), "macs", max_loss=3e-4)
    assert best is not None
    assert best.names == ("b1", "b2")


def test_without_sites_only_nothing_can_be_asked() -> None:
    assert least_loss(Problem(()), {"macs": 1.0}) is None
    empty = least_loss(Problem(()), {"macs": 0.0})
    assert empty is not None
    assert empty.names == ()
