"""A search looks at few items first; what it picks is measured on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.profiling.workloads import planted_program, planted_workload, with_head
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.planning.cuts import Candidate, Measurement
from vlmopt.planning.measuring import MeasuredPlanner
from vlmopt.planning.meter import CutMeter

FIT = planted_workload(seed=1, n=240)
CHECK = replace(planted_workload(seed=2, n=160), group_names=[f"check {i // 2}" for i in range(160)])
NEEDED = "model/layers.1.ffn"
CANDIDATES = [
    Candidate(name, score, i, macs=100, branches=frozenset({name}))
    for i, (name, score) in enumerate(
        zip((f"model/layers.{i}.ffn" for i in range(4)), (0.1, 2.0, 0.2, 0.0), strict=True)
    )
]


class Counting(CutMeter):
    """Notes which cuts it was asked for."""

    asked: list[frozenset[str]]

    def measure(self, cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        self.asked = [*getattr(self, "asked", []), *cuts]
        return super().measure(cuts)


@pytest.fixture(scope="module")
def program() -> Program:
    return with_head(planted_program(), FIT)


def planner(program: Program, *, is_screened: bool = True) -> tuple[MeasuredPlanner, Counting, Counting]:
    meter = Counting(program, FIT, CHECK, {}, progress=Silent(), kept_out=0.25)
    few = [side.part(range(len(side.targets) // 3)) for side in (FIT, CHECK)]
    screen = Counting(program, few[0], few[1], {}, progress=Silent(), hidden=meter.hidden)
    return MeasuredPlanner(CANDIDATES, meter, screen if is_screened else None), meter, screen


def test_the_pick_is_measured_on_all_items(program: Program) -> None:
    made, meter, screen = planner(program)
    choice = made.choose(max_drop=8.0)
    assert NEEDED not in choice.names
    assert len(choice.names) >= 2
    assert choice.measurement == meter.measure_all([made.branches(frozenset(choice.names))])[0]
    assert choice.kept_out == meter.measure_kept_out([frozenset(choice.names)])[0]
    assert screen.asked
    truncations = {frozenset(c.name for c in CANDIDATES[4 - n :]) for n in range(1, 5)}
    assert truncations <= set(meter.asked)


def test_the_screen_sees_nothing_of_what_is_kept_out(program: Program) -> None:
    _, meter, screen = planner(program)
    assert screen.hidden == meter.hidden
    groups = [*screen.fit.item_groups, *screen.check.item_groups]
    assert screen.n_measured == sum(group not in meter.hidden for group in groups)


def test_a_second_budget_measures_only_what_is_new(program: Program) -> None:
    made, meter, _ = planner(program)
    first = made.choose(needs={"macs": 100.0})
    n_before = len(meter._changes)
    assert made.choose(needs={"macs": 100.0}) == first
    assert len(meter._changes) == n_before
    second = made.choose(needs={"macs": 200.0})
    assert len(second.names) == 2
    assert NEEDED not in second.names


def test_without_a_screen_all_items_are_searched(program: Program) -> None:
    made, meter, screen = planner(program, is_screened=False)
    assert NEEDED not in made.choose(max_drop=8.0).names
    assert not hasattr(screen, "asked")
    assert meter.asked
