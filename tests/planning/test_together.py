"""One plan over edits of several kinds: the integer program against trying everything, and the search around it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest

from vlmopt.core.errors import PlanError
from vlmopt.planning.cuts import Measurement
from vlmopt.planning.together import (
    Option,
    Plan,
    Role,
    Tried,
    Variant,
    fitted_factors,
    next_to_go,
    plan_of,
    saved_by,
    solved,
    stepped_back,
    variants_of,
    without_kind,
)
from vlmopt.planning.together_search import TogetherSearch, confirmed

_STEPS = {"cut": (1, Role.REMOVES), "half": (2, Role.NARROWS), "int8": (3, Role.QUANTIZES)}


def _option(kind: str, place: str, loss: float, latency: float) -> Option:
    number, role = _STEPS[kind]
    return Option(kind, role, ((number, place),), frozenset({place}), loss, {"latency": latency, "size": 2 * latency})


def _options(n: int, seed: int) -> list[Option]:
    draw = random.Random(seed)
    found = []
    for place in (f"tower/{i}" for i in range(n)):
        need = draw.uniform(0.1, 3.0)
        found.append(_option("cut", place, need, 10.0))
        found.append(_option("half", place, need * draw.uniform(0.05, 0.5), 4.0))
        found.append(_option("int8", place, need * 0.01, 5.0))
    return found


def _variants(n: int = 3, seed: int = 0) -> list[Variant]:
    return variants_of(_options(n, seed), {f"tower/{i}": {"latency": 10.0, "size": 20.0} for i in range(n)})


def test_a_width_and_a_precision_together_leave_the_product_of_their_shares() -> None:
    (pair,) = (one for one in _variants(1) if len(one.options) == 2)
    assert pair.saves["latency"] == pytest.approx(10.0 * (1 - 0.6 * 0.5))
    assert {option.kind for option in pair.options} == {"half", "int8"}


def test_nothing_goes_beside_a_cut() -> None:
    pairs = [one for one in _variants(2) if len(one.options) > 1]
    assert pairs
    assert all(option.role is not Role.REMOVES for one in pairs for option in one.options)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_plan_is_the_best_of_all(seed: int, share: float) -> None:
    variants, factors = _variants(3, seed), {"cut": 2.0, "half": 0.5, "int8": 1.0}
    need = share * 30.0
    found = solved(variants, factors, {"latency": need})
    assert found is not None
    by_place = [[None, *(one for one in variants if f"tower/{i}" in one.places)] for i in range(3)]
    every = [[one for one in plan if one is not None] for plan in itertools.product(*by_place)]
    fitting = [plan for plan in every if saved_by(plan, "latency") >= need - 1e-9]
    assert saved_by(found, "latency") >= need - 1e-6
    assert _loss(found, factors) == pytest.approx(min(_loss(plan, factors) for plan in fitting))


def test_no_plan_saves_more_than_there_is() -> None:
    assert solved(_variants(2), {}, {"latency": 20.1}) is None


def _loss(plan: Sequence[Variant], factors: Mapping[str, float]) -> float:
    return sum(one.loss(factors) for one in plan)


def test_factors_are_found_from_plans_that_mix_kinds() -> None:
    variants, true = _variants(6, 1), {"cut": 4.0, "half": 0.5, "int8": 1.0}
    draw = random.Random(3)
    tried = []
    for _ in range(30):
        plan = tuple(
            draw.choice([one for one in variants if f"tower/{i}" in one.places]) for i in draw.sample(range(6), 3)
        )
        loss = _loss(plan, true)
        tried.append(Tried("drawn", plan, Measurement(loss, 0.1, loss)))
    found = fitted_factors(tried, ["cut", "half", "int8"])
    assert found["cut"] / found["half"] > 3.0
    assert found["cut"] == pytest.approx(4.0, rel=0.35)


def test_a_plan_that_lost_all_does_not_drown_those_near_the_bound() -> None:
    variants = _variants(6, 1)
    cuts = [one for one in variants if {option.kind for option in one.options} == {"cut"}]
    near = [Tried("near", (one,), Measurement(0.5, 0.1, one.loss({}))) for one in cuts]
    lost = Tried("lost", tuple(cuts), Measurement(80.0, 0.1, 50 * _loss(cuts, {})))
    found = fitted_factors([*near, lost], ["cut", "half", "int8"])
    assert found["cut"] < 3.0


class _Truth:
    """Losses that add up, but for what is cut next to each other, which loses four times as much."""

    def __init__(self, variants: Sequence[Variant]) -> None:
        self._variants = {one.edits: one for one in variants}
        self.n = 0

    def __call__(self, plan: Plan) -> Measurement:
        self.n += 1
        taken = [one for one in self._variants.values() if set(one.edits) <= plan]
        best = {place: max((o for o in taken if place in o.places), key=lambda o: len(o.edits)) for one in taken
                for place in one.places}  # fmt: skip
        loss = sum(one.loss({}) for one in best.values())
        cut = sorted(int(place.split("/")[1]) for place, one in best.items() if one.options[0].kind == "cut")
        loss += sum(3.0 for a, b in itertools.pairwise(cut) if b == a + 1)
        return Measurement(loss, 0.01, loss)


def _search(max_drop: float | None, needs: Mapping[str, float] | None = None, n: int = 8) -> TogetherSearch:
    variants = _variants(n, 2)
    return TogetherSearch(variants, _Truth(variants), "latency", max_drop, needs or {})


def test_a_search_saves_more_than_its_seeds_and_keeps_to_the_bound() -> None:
    search = _search(1.0)
    int8 = [one for one in search.variants if {option.kind for option in one.options} == {"int8"}]
    search.run({"nothing": [], "int8 everywhere": int8})
    best = search.ranked()[0]
    assert best.measurement.sort_key <= 1.0
    assert best.saved("latency") > saved_by(int8, "latency")
    assert {option.kind for one in best.variants for option in one.options} >= {"half", "int8"}


def test_a_search_is_never_worse_than_a_seed() -> None:
    variants = _variants(8, 2)
    needed = sorted(variants, key=lambda one: -one.loss({}))
    strange = next(one for one in needed if one.options[0].kind == "cut")

    def measure(plan: Plan) -> Measurement:
        lost = 0.0 if plan in (frozenset(), plan_of([strange])) else 50.0
        return Measurement(lost, 0.0, lost)

    search = TogetherSearch(variants, measure, "latency", 1.0, {})
    search.run({"nothing": [], "found elsewhere": [strange]})
    assert search.ranked()[0].variants == (strange,)


def test_under_a_budget_the_plan_that_loses_least_is_taken() -> None:
    search = _search(None, {"latency": 40.0})
    search.run({"nothing": []})
    best = search.ranked()[0]
    assert best.saved("latency") >= 40.0
    assert best.measurement.loss == min(one.measurement.loss for one in search.tried if search.fits(one.variants))


def test_what_looked_better_gives_way_where_it_does_not_hold() -> None:
    search = _search(1.0)
    search.run({"nothing": []})
    first = search.ranked()[0]
    held, notes = confirmed(search, lambda plan: Measurement(9.0 if plan == first.plan else 0.5, 0.0))
    assert first.plan not in [one.plan for one in held]
    assert notes == ["1 better-looking plans did not hold on more items"]


def test_budgets_that_contradict_each_other_say_what_would_do() -> None:
    search = _search(0.1, {"latency": 70.0})
    search.run({"nothing": []})
    with pytest.raises(PlanError, match=r"no plan that saves enough stays within a drop of 0\.1 points.*a drop of"):
        confirmed(search, search.measure)


def test_a_budget_beyond_all_edits_says_how_much_can_be_saved() -> None:
    search = _search(None, {"latency": 200.0})
    search.run({"everything": [one for one in search.variants if one.options[0].kind == "cut"]})
    with pytest.raises(PlanError, match="at most latency 80 can be saved"):
        confirmed(search, search.measure)


def test_a_kind_is_given_back_without_the_others() -> None:
    variants = _variants(2)
    pair = next(one for one in variants if len(one.options) == 2)
    tried = Tried("", (pair,), Measurement(0.0, 0.0))
    (left,) = without_kind(tried, "half", variants)
    assert [option.kind for option in left.options] == ["int8"]
    assert without_kind(Tried("", left.options and (left,), Measurement(0.0, 0.0)), "int8", variants) == ()


def test_what_goes_next_costs_least_for_its_time() -> None:
    variants = _variants(3, 4)
    ranked = next_to_go(Tried("", (), Measurement(0.0, 0.0)), variants, {}, "latency")
    prices = [one.loss({}) / one.saves["latency"] for one in ranked]
    assert prices == sorted(prices)
    assert len({one.places for one in ranked}) == 3


def test_a_plan_steps_back_where_it_loses_most_for_what_it_saves() -> None:
    variants = _variants(3, 5)
    cuts = [one for one in variants if one.options[0].kind == "cut"]
    worst = max(cuts, key=lambda one: one.loss({}))
    left = stepped_back(cuts, variants, {}, "latency")
    assert worst not in left
    assert {one.name for one in cuts if one is not worst} <= {one.name for one in left}
    assert saved_by(left, "latency") < saved_by(cuts, "latency")


def test_what_harms_on_more_items_is_given_back_and_the_rest_stays() -> None:
    search = _search(1.0)
    search.run({"nothing": []})
    first = search.ranked()[0]
    harmful = max(first.variants, key=lambda one: one.loss(search.factors) / one.saves["latency"])

    def on_more(plan: Plan) -> Measurement:
        return Measurement(9.0 if plan_of([harmful]) <= plan else 0.5, 0.0)

    held, _ = confirmed(search, on_more)
    assert not plan_of([harmful]) <= held[0].plan
    assert held[0].saved("latency") >= first.saved("latency") - harmful.saves["latency"]


def test_where_the_budgets_are_met_nothing_is_edited() -> None:
    search = _search(None)
    search.run({"everything": [one for one in search.variants if one.options[0].kind == "cut"]})
    held, _ = confirmed(search, search.measure)
    assert [one.variants for one in held] == [()]
