"""As many edits as a bound allows, tried on losses that are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vlmopt.planning.cuts import Measurement
from vlmopt.planning.prefix import Edit, longest_prefix

COSTS = {"a": 0.1, "b": 0.9, "c": 0.0, "d": 0.4, "e": 0.2}
SIZES = {"a": 10.0, "b": 100.0, "c": 1.0, "d": 10.0, "e": 0.0}


def take(max_drop: float, error: float = 0.0) -> tuple[tuple[str, ...], list[tuple[str, ...]], int]:
    """Names taken, what was measured together, and how often single ones were asked for."""
    measured, asked = list[tuple[str, ...]](), []

    def measure(names: Sequence[str]) -> Measurement:
        measured.append(tuple(names))
        return Measurement(sum(COSTS[name] for name in names), error)

    def sensitivities() -> list[Edit]:
        asked.append(1)
        return [Edit(name, SIZES[name], cost) for name, cost in COSTS.items()]

    taken = longest_prefix(list(COSTS), measure, sensitivities, max_drop)
    assert taken.n_measured == len(measured)
    assert taken.measurement.drop_points == pytest.approx(sum(COSTS[name] for name in taken.names))
    return taken.names, measured, len(asked)


def test_all_are_taken_with_one_measurement_where_they_fit() -> None:
    assert take(1.6) == (tuple(COSTS), [tuple(COSTS)], 0)


@pytest.mark.parametrize(
    ("max_drop", "names"),
    [(1.5, "cbad"), (1.0, "cba"), (0.95, "cb"), (0.5, "c"), (-0.1, "")],  # e saves nothing and comes last
)
def test_else_those_that_lose_least_for_what_they_save(max_drop: float, names: str) -> None:
    found, measured, asked = take(max_drop)
    assert found == tuple(names)
    assert asked == 1
    assert len(measured) <= 4


def test_the_margin_of_the_measurement_counts() -> None:
    assert take(1.0, error=0.1)[0] == ("c",)
    assert take(1.1, error=0.1)[0] == ("c", "b")
