"""The search finds the first bad state wherever it is, with no more checks than halving needs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmopt.verify.bisection import Answer, Outcome, Verdict, first_bad, most_checks


def searched(n_sites: int, first: int | None, unknown: frozenset[int] = frozenset()) -> tuple[Verdict, list[int]]:
    """The verdict where all states from `first` on are bad, and the states that were asked about."""
    asked: list[int] = []

    def check(state: int) -> Answer:
        asked.append(state)
        if state in unknown:
            return Answer.UNKNOWN
        return Answer.BAD if first is not None and state >= first else Answer.GOOD

    return first_bad(n_sites, check), asked


@given(st.data())
def test_a_planted_fault_is_found_at_any_position_of_any_number(data: st.DataObject) -> None:
    n_sites = data.draw(st.integers(0, 300))
    first = data.draw(st.none() | st.integers(0, n_sites))
    verdict, asked = searched(n_sites, first)
    if first is None:
        assert (verdict.outcome, verdict.first, verdict.last) == (Outcome.NOTHING, 0, 0)
    elif first == 0:
        assert (verdict.outcome, verdict.first, verdict.last) == (Outcome.ORIGINAL, 0, 0)
    else:
        assert (verdict.outcome, verdict.first, verdict.last) == (Outcome.SITE, first, first)
    assert verdict.n_checks == len(asked) <= most_checks(n_sites)
    assert max(Counter(asked).values()) == 1
    assert all(0 <= state <= n_sites for state in asked)


@pytest.mark.parametrize(("n_sites", "most"), [(0, 1), (1, 2), (2, 2), (6, 3), (62, 6), (63, 7), (64, 7), (126, 7)])
def test_the_bound_is_reached_and_never_exceeded(n_sites: int, most: int) -> None:
    counts = {searched(n_sites, first)[0].n_checks for first in (None, *range(n_sites + 1))}
    assert max(counts) == most == most_checks(n_sites)


@given(st.data())
def test_states_that_cannot_be_told_leave_the_smallest_range_that_holds_the_fault(data: st.DataObject) -> None:
    n_sites = data.draw(st.integers(0, 40))
    first = data.draw(st.none() | st.integers(0, n_sites))
    unknown = data.draw(st.frozensets(st.integers(0, n_sites)))
    verdict, asked = searched(n_sites, first, unknown)
    known = [state for state in range(n_sites + 1) if state not in unknown]
    good = max((state for state in known if first is None or state < first), default=-1)
    bad = min((state for state in known if first is not None and state >= first), default=n_sites + 1)
    assert len(asked) == len(set(asked))
    if good == n_sites:
        assert verdict.outcome is Outcome.NOTHING
    elif bad == 0:
        assert verdict.outcome is Outcome.ORIGINAL
    else:
        assert (verdict.first, verdict.last) == (good + 1, bad)
        assert verdict.outcome is (Outcome.SITE if bad == good + 1 <= n_sites else Outcome.RANGE)


def test_a_check_that_never_can_tell_says_so() -> None:
    verdict, asked = searched(3, 2, frozenset(range(4)))
    assert (verdict.outcome, verdict.first, verdict.last) == (Outcome.RANGE, 0, 4)
    assert len(asked) == 4
