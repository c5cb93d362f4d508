"""Under budgets of resources the planner takes what loses least of what fits; finalists are measured better."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from vlmopt.core.errors import PlanError
from vlmopt.planning.choice import Candidate, Measurement, choose
from vlmopt.planning.interacting import site_interactions
from vlmopt.planning.solving import Interaction

Drop = Callable[[frozenset[str]], float]


def pool_of(seed: int, n: int = 9) -> list[Candidate]:
    """Candidates of two sizes, as attention and FFN of one tower have."""
    draw = random.Random(seed)
    return [
        Candidate(
            f"b{i}",
            draw.choice([0.0, draw.random(), 3 * draw.random()]),
            i,
            draw.choice([90, 130]),
            latency_us=draw.choice([50.0, 80.0]),
            branches=frozenset({f"b{i}"}),
        )
        for i in range(n)
    ]


def additive(pool: Sequence[Candidate]) -> Drop:
    scores = {candidate.name: candidate.score for candidate in pool}
    return lambda cut: sum(scores[name] for name in cut)


def measure_by(drop: Drop, *, error: float = 0.0) -> Callable[[Sequence[frozenset[str]]], list[Measurement]]:
    return lambda cuts: [Measurement(drop(cut), error) for cut in cuts]


def fitting(pool: Sequence[Candidate], needs: dict[str, float]) -> list[frozenset[str]]:
    """All cuts that save what is needed."""
    cuts = itertools.chain.from_iterable(itertools.combinations(pool, n) for n in range(len(pool) + 1))
    return [
        frozenset(c.name for c in cut)
        for cut in cuts
        if all(sum(c.saves[name] for c in cut) >= need for name, need in needs.items())
    ]


@pytest.mark.parametrize("seed", range(20))
def test_on_an_additive_problem_the_least_drop_that_fits_is_found(seed: int) -> None:
    pool = pool_of(seed)
    drop, needs = additive(pool), {"macs": 500.0, "latency": 310.0}
    found = choose(pool, measure_by(drop), needs=needs)
    assert frozenset(found.names) in fitting(pool, needs)
    assert found.measurement.drop_points == pytest.approx(min(map(drop, fitting(pool, needs))), abs=1e-9)
    assert all(trial.fits for trial in found.trials)


@pytest.mark.parametrize("seed", range(10))
def test_where_scores_mislead_it_is_no_worse_than_the_truncation_that_fits(seed: int) -> None:
    pool = pool_of(seed)
    draw = random.Random(seed + 100)
    truth = {candidate.name: draw.random() for candidate in pool}

    def drop(cut: frozenset[str]) -> float:
        return sum(truth[name] for name in cut)

    needs = {"macs": 450.0}
    found = choose(pool, measure_by(drop), needs=needs)
    truncations = [frozenset(c.name for c in pool[-n:]) for n in range(1, len(pool) + 1)]
    assert found.measurement.drop_points <= min(drop(cut) for cut in truncations if cut in fitting(pool, needs))


def test_both_budgets_hold_or_the_closest_for_both_is_told() -> None:
    pool = pool_of(4)
    drop, needs = additive(pool), {"macs": 500.0}
    least = min(map(drop, fitting(pool, needs)))
    found = choose(pool, measure_by(drop), needs=needs, max_drop=least + 1e-9)
    assert found.measurement.drop_points == pytest.approx(least, abs=1e-9)
    bound = 0.5 * least
    with pytest.raises(PlanError) as caught:
        choose(pool, measure_by(drop), needs=needs, max_drop=bound)
    cuts = fitting(pool, {})
    most = max(sum(c.macs for c in pool if c.name in cut) for cut in cuts if drop(cut) <= bound)
    text = caught.value.one_line()
    assert f"drops {least:.2f} ± 0.00 points" in text
    assert f"saves {100 * most / 500:.0f} % of what --macs asks to save" in text


def test_a_need_beyond_all_candidates_is_refused_before_anything_is_measured() -> None:
    pool = [Candidate("a", 0.1, 1, 100), Candidate("b", 0.2, 2, 200)]

    def never(cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        raise AssertionError(cuts)

    with pytest.raises(PlanError, match=r"--macs: cannot be met: cutting all 2 candidates saves 75 % of what must go"):
        choose(pool, never, needs={"macs": 400.0})
    assert choose(pool, never, needs={"macs": 0.0}).notes == ("the budgets are met without a cut",)


def test_a_layer_and_its_branches_are_never_cut_together() -> None:
    a, b = (Candidate(f"layer.{n}", 0.3, i, 100, branches=frozenset({f"layer.{n}"})) for i, n in enumerate("ab"))
    layer = Candidate("layer", 0.4, 1, 200, branches=frozenset({"layer.a", "layer.b"}))
    other = Candidate("other", 5.0, 3, 100, branches=frozenset({"other"}))
    pool = [a, b, layer, other]
    seen: list[frozenset[str]] = []

    def measure(cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        seen.extend(cuts)
        return [Measurement(sum(c.score for c in pool if c.name in cut), 0.0) for cut in cuts]

    assert choose(pool, measure, needs={"macs": 200.0}).names == ("layer",)
    choose(pool, measure, max_drop=1.0)
    assert not any("layer" in cut and cut & {"layer.a", "layer.b"} for cut in seen)


def test_interactions_of_branches_become_those_of_the_sites_that_hold_them() -> None:
    layer = Candidate("l", 0.0, 1, 1, branches=frozenset({"x", "y"}))
    pool = [
        layer,
        Candidate("x", 0.0, 1, 1, branches=frozenset({"x"})),
        Candidate("z", 0, 2, 1, branches=frozenset("z")),
    ]
    found = site_interactions(pool, [("x", "z", 0.25), ("z", "y", 0.5), ("x", "y", 9.0)])
    assert found == [Interaction("l", "z", 0.75), Interaction("x", "z", 0.25)]


def test_a_pick_that_does_not_hold_on_all_items_gives_way_to_the_next_best() -> None:
    pool = [Candidate(f"b{i}", float(i), i, 100, branches=frozenset({f"b{i}"})) for i in range(4)]
    flattered = frozenset({"b0", "b1", "b2"})  # seems to lose nothing on the items of the search

    def searched(cut: frozenset[str]) -> float:
        return 0.0 if len(cut) <= 2 or cut == flattered else 9.0

    def truth(cut: frozenset[str]) -> float:
        return 5.0 if cut == flattered else searched(cut)

    plain = choose(pool, measure_by(searched), max_drop=1.0)
    assert frozenset(plain.names) == flattered
    found = choose(pool, measure_by(searched), max_drop=1.0, confirm=measure_by(truth))
    assert len(found.names) == 2
    assert found.measurement.drop_points == 0.0
    assert "did not hold on the items kept out of the search" in found.notes[0]
    nothing = choose(pool, measure_by(searched), max_drop=1.0, confirm=measure_by(lambda cut: 5.0))
    assert nothing.names == ()
    assert "no cut that looked acceptable held" in nothing.notes[0]


def test_under_a_resource_budget_all_items_decide_among_the_finalists() -> None:
    pool = [Candidate(f"b{i}", 0.1 * i, i, 100, branches=frozenset({f"b{i}"})) for i in range(4)]
    drop = additive(pool)
    first = choose(pool, measure_by(drop), needs={"macs": 200.0})
    assert first.names == ("b0", "b1")
    best = frozenset({"b0", "b2"})
    found = choose(pool, measure_by(drop), needs={"macs": 200.0}, confirm=measure_by(lambda cut: float(cut != best)))
    assert frozenset(found.names) == best


def test_a_better_measure_takes_up_the_best_few_and_goes_on_from_there() -> None:
    """Recovery gives back three quarters of every drop: what the first measure refuses then fits."""
    pool = [Candidate(f"b{i}", 0.3, i, 100, branches=frozenset({f"b{i}"})) for i in range(10)]
    plain = additive(pool)
    asked: list[frozenset[str]] = []

    def recovered(cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        asked.extend(cuts)
        return [Measurement(plain(cut) / 4, 0.0) for cut in cuts]

    assert len(choose(pool, measure_by(plain), max_drop=0.65).names) == 2
    found = choose(pool, measure_by(plain), max_drop=0.65, refine=recovered)
    assert len(found.names) == 8
    assert found.measurement.drop_points == pytest.approx(0.6, abs=1e-12)
    assert len(asked) == len(set(asked)) <= 20
    assert "refined" in {trial.order for trial in found.trials}


def test_a_better_measure_decides_among_cuts_that_fit() -> None:
    pool = pool_of(2)
    needs, drop = {"macs": 500.0}, additive(pool)
    plain = choose(pool, measure_by(drop), needs=needs)
    tried = sorted({frozenset(trial.names) for trial in plain.trials}, key=drop)
    assert frozenset(plain.names) == tried[0]

    def other(cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        return [Measurement(0.0 if cut == tried[1] else 1.0, 0.0) for cut in cuts]

    found = choose(pool, measure_by(drop), needs=needs, refine=other)
    assert frozenset(found.names) == tried[1]
    assert found.measurement.drop_points == 0.0
