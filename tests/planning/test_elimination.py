"""Elimination: every step is measured behind the ones before it, and few candidates are looked at again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vlmopt.planning.choice import choose
from vlmopt.planning.cuts import Candidate, Cut, Measure, Measurement, fits, macs_of, names_of
from vlmopt.planning.elimination import WIDTH, Elimination

N_PAIRS = 10
PARTNER = 10.0  # loss of cutting both of a pair, each of which is missed by nobody alone


def candidates(scores: Sequence[float] | None = None, macs: Sequence[int] | None = None) -> list[Candidate]:
    """`a0`, `b0`, `a1`, ...: by their scores all nearly alike."""
    names = [f"{side}{i}" for i in range(N_PAIRS) for side in "ab"]
    scores = scores or [0.01 * (1 + i) for i in range(len(names))]
    sizes = macs or [1] * len(names)
    return [
        Candidate(name, score, i, size, branches=frozenset({name}))
        for i, (name, score, size) in enumerate(zip(names, scores, sizes, strict=True))
    ]


def loss_of(cut: frozenset[str], pool: Sequence[Candidate]) -> float:
    both = sum({f"a{i}", f"b{i}"} <= cut for i in range(N_PAIRS))
    return PARTNER * both + sum(one.score for one in pool if one.name in cut)


def measure_of(pool: Sequence[Candidate], asked: list[frozenset[str]] | None = None) -> Measure:
    """A metric that is lost as soon as anything is: only the loss tells cuts apart."""

    def measure(cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        if asked is not None:
            asked.extend(cuts)
        losses = [loss_of(cut, pool) for cut in cuts]
        return [Measurement(100.0 if loss > 1.5 else 0.0, 0.0, loss) for loss in losses]

    return measure


def grown(pool: Sequence[Candidate], n: int, asked: list[frozenset[str]] | None = None) -> list[Cut]:
    needs = {"macs": float(n)}
    return Elimination(pool, measure_of(pool, asked)).until(lambda cut, _: fits(cut, needs), needs)


def test_of_two_that_stand_in_for_each_other_one_stays() -> None:
    pool = candidates()
    found = names_of(grown(pool, N_PAIRS)[-1])
    assert len(found) == N_PAIRS
    assert all(len(found & {f"a{i}", f"b{i}"}) == 1 for i in range(N_PAIRS))
    prefix = frozenset(one.name for one in pool[:N_PAIRS])  # what single scores would cut
    assert loss_of(found, pool) < 2 < loss_of(prefix, pool)


def test_few_are_looked_at_again() -> None:
    asked: list[frozenset[str]] = []
    path = grown(candidates(), N_PAIRS, asked)
    assert len(asked) < len(path) * (2 * WIDTH + 1)
    assert len(asked) < N_PAIRS * len(candidates())
    assert all(names_of(before) < names_of(after) for before, after in itertools.pairwise(path))


def test_it_goes_on_where_it_stopped() -> None:
    asked: list[frozenset[str]] = []
    pool = candidates()
    elimination = Elimination(pool, measure_of(pool, asked))
    short = elimination.until(lambda cut, _: len(cut) >= 3, {})
    n_asked = len(asked)
    assert elimination.until(lambda cut, _: len(cut) >= 3, {}) == short
    assert len(asked) == n_asked
    long = elimination.until(lambda cut, _: len(cut) >= 6, {})
    assert long[: len(short)] == short
    assert names_of(long[-1]) > names_of(short[-1])


def test_of_two_that_are_missed_alike_the_larger_goes() -> None:
    macs = [1] * 2 * N_PAIRS
    macs[7] = 5
    pool = candidates([0.1] * len(macs), macs)
    assert "b3" in names_of(grown(pool, 5)[0])


def test_it_ends_when_nothing_is_left() -> None:
    pool = [
        Candidate("layer", 0.1, 0, 2, branches=frozenset({"x", "y"})),
        *(Candidate(n, 0.1, 1, 1, branches=frozenset({n})) for n in "xy"),
    ]
    zero: Measure = lambda cuts: [Measurement(0.0, 0.0, 0.0) for _ in cuts]  # noqa: E731
    path = Elimination(pool, zero).until(lambda *_: False, {})
    assert sum(macs_of(cut) for cut in path[-1:]) == 2
    assert Elimination([], zero).until(lambda *_: False, {}) == []


def test_a_plan_takes_what_the_elimination_found_where_single_scores_mislead() -> None:
    pool = candidates()
    needs = {"macs": float(N_PAIRS)}
    without = choose(pool, measure_of(pool), needs=needs)
    found = choose(pool, measure_of(pool), needs=needs, proposed=grown(pool, N_PAIRS))
    assert found.measurement.loss < PARTNER < without.measurement.loss
    within = choose(pool, measure_of(pool), max_drop=1.0, proposed=grown(pool, N_PAIRS))
    assert len(within.names) >= N_PAIRS - 1


def test_of_cuts_that_have_lost_all_of_the_metric_the_loss_decides() -> None:
    pool = candidates([1.0 + i for i in range(2 * N_PAIRS)])
    found = choose(pool, measure_of(pool), needs={"macs": 2.0})
    assert found.measurement.drop_points == 100.0
    assert len(found.names) < 4
