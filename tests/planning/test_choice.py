"""The planner cuts as much as the bound allows, and never more."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from vlmopt.planning.choice import MARGIN_IN_STANDARD_ERRORS, Candidate, Measurement, choose

Drop = Callable[[frozenset[str]], float]


def candidates(scores: Sequence[float], macs: Sequence[int] | None = None) -> list[Candidate]:
    """Candidates `b0`, `b1`, ... in the order of the stream."""
    sizes = macs or [100] * len(scores)
    return [Candidate(f"b{i}", score, i, size) for i, (score, size) in enumerate(zip(scores, sizes, strict=True))]


def measure_by(drop: Drop, *, error: float = 0.0) -> Callable[[Sequence[frozenset[str]]], list[Measurement]]:
    return lambda cuts: [Measurement(drop(cut), error) for cut in cuts]


def additive(costs: Mapping[str, float]) -> Drop:
    return lambda cut: sum(costs[name] for name in cut)


def best_macs(pool: Sequence[Candidate], drop: Drop, max_drop: float) -> int:
    """Exhaustive search."""
    cuts = itertools.chain.from_iterable(itertools.combinations(pool, n) for n in range(len(pool) + 1))
    allowed = [cut for cut in cuts if drop(frozenset(c.name for c in cut)) <= max_drop]
    return max(sum(c.macs for c in cut) for cut in allowed)


def saved(pool: Sequence[Candidate], names: Sequence[str]) -> int:
    return sum(c.macs for c in pool if c.name in names)


@pytest.mark.parametrize("seed", range(20))
def test_on_an_additive_problem_it_finds_what_an_exhaustive_search_finds(seed: int) -> None:
    generator = random.Random(seed)
    costs = {f"b{i}": generator.choice([0.0, generator.random(), 3 * generator.random()]) for i in range(9)}
    pool, drop = candidates(list(costs.values())), additive(costs)
    found = choose(pool, measure_by(drop), max_drop=1.5)
    assert saved(pool, found.names) == best_macs(pool, drop, 1.5)
    assert found.measurement.drop_points == pytest.approx(drop(frozenset(found.names)))
    assert found.measurement.drop_points <= 1.5


def test_with_other_sizes_it_comes_close_to_the_exhaustive_optimum() -> None:
    ratios = []
    for seed in range(30):
        generator = random.Random(seed)
        costs = {f"b{i}": generator.choice([0.0, generator.random(), 3 * generator.random()]) for i in range(9)}
        macs = [generator.choice([90, 130]) for _ in costs]  # attention and FFN of one tower
        pool, drop = candidates(list(costs.values()), macs), additive(costs)
        found = choose(pool, measure_by(drop), max_drop=1.5)
        assert drop(frozenset(found.names)) <= 1.5
        ratios.append(saved(pool, found.names) / best_macs(pool, drop, 1.5))
    assert min(ratios) > 0.85
    assert sum(ratios) / len(ratios) > 0.97


def test_it_is_never_worse_than_cutting_the_deepest_first() -> None:
    """Scores that mislead: a branch is harmless only when all behind it are gone too."""

    def drop(cut: frozenset[str]) -> float:
        depth = 0
        while f"b{7 - depth}" in cut:
            depth += 1
        return 0.0 if len(cut) == depth <= 5 else 10.0

    pool = candidates([float(i) for i in range(8)])  # says: the deepest are needed most
    found = choose(pool, measure_by(drop), max_drop=1.0)
    assert found.names == ("b3", "b4", "b5", "b6", "b7")
    assert found.measurement == Measurement(0.0, 0.0)


def test_a_drop_counts_with_its_margin() -> None:
    pool = candidates([0.1, 0.2, 0.3])
    drop = additive({"b0": 0.4, "b1": 0.4, "b2": 0.4})
    assert len(choose(pool, measure_by(drop), max_drop=0.8).names) == 2
    margin = 0.3 / MARGIN_IN_STANDARD_ERRORS
    assert len(choose(pool, measure_by(drop, error=margin), max_drop=0.8).names) == 1
    assert choose(pool, measure_by(drop, error=float("nan")), max_drop=100.0).names == ()  # unknown is not within


def test_where_nothing_is_acceptable_nothing_is_cut() -> None:
    pool = candidates([0.0, 0.0])
    found = choose(pool, measure_by(lambda cut: 50.0), max_drop=1.0)
    assert found.names == ()
    assert found.measurement == Measurement(0.0, 0.0)
    assert not any(trial.is_accepted for trial in found.trials)
    assert choose([], measure_by(lambda cut: 0.0), max_drop=1.0).names == ()


def test_a_gain_is_taken_even_without_a_budget() -> None:
    costs = {"b0": -2.0, "b1": 3.0}
    assert choose(candidates([-2.0, 3.0]), measure_by(additive(costs)), max_drop=0.0).names == ("b0",)


def test_no_cut_is_measured_twice_and_every_trial_is_kept() -> None:
    seen: list[frozenset[str]] = []
    drop = additive({f"b{i}": 0.3 * i for i in range(6)})

    def measure(cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        seen.extend(cuts)
        return [Measurement(drop(cut), 0.0) for cut in cuts]

    found = choose(candidates([0.3 * i for i in range(6)]), measure, max_drop=1.0)
    assert len(seen) == len(set(seen))
    assert found.names == ("b0", "b1", "b2")
    assert {trial.order for trial in found.trials} == {"depth", "importance", "program", "extension"}
    assert all(trial.is_accepted == (trial.measurement.drop_points <= 1.0) for trial in found.trials)
