"""Finds the first of many edits after which something is wrong, with as few checks as can be.

State n is the program with the first n edits; a state that is bad stays bad. With n edits there are n + 2 outcomes (the
original is bad, edit 1 ... edit n brings it in, nothing is bad), so ceil(log2(n + 2)) checks always do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Answer(Enum):
    """What a check says about one state. `UNKNOWN`: it could not tell, so that its neighbours are asked."""

    GOOD = "good"
    BAD = "bad"
    UNKNOWN = "unknown"


class Outcome(Enum):
    NOTHING = "nothing is bad"
    ORIGINAL = "the original is bad"
    SITE = "one site"
    RANGE = "one of several sites"  # the states between them could not be checked


@dataclass(frozen=True)
class Verdict:
    """Where the fault is: among the sites `first` to `last`, numbered from 1 and equal for `SITE`.

    In a `RANGE`, 0 stands for the original and `n_sites + 1` for nothing at all: unchecked ends leave them possible.
    """

    outcome: Outcome
    first: int
    last: int
    n_checks: int
    answers: tuple[tuple[int, Answer], ...]  # (state, answer), in the order of the checks


def most_checks(n_sites: int) -> int:
    """The most checks that a search among so many sites takes when every check has an answer."""
    return math.ceil(math.log2(n_sites + 2))


def first_bad(n_sites: int, check: Callable[[int], Answer]) -> Verdict:
    """Searches the states 0 (the original) to `n_sites` for the first that is bad.

    Args:
        check: answers for one state; it is asked about a state at most once.
    """
    good, bad = -1, n_sites + 1  # states that are as good as checked
    answers: dict[int, Answer] = {}
    while (state := _next(good, bad, answers)) is not None:
        answers[state] = check(state)
        if answers[state] is Answer.GOOD:
            good = state
        elif answers[state] is Answer.BAD:
            bad = state
    return _verdict(n_sites, good, bad, answers)


def _next(good: int, bad: int, answers: dict[int, Answer]) -> int | None:
    """The unanswered state nearest to the middle."""
    middle = (good + bad) // 2
    open_states = [state for state in range(good + 1, bad) if state not in answers]
    return min(open_states, key=lambda state: abs(state - middle), default=None)


def _verdict(n_sites: int, good: int, bad: int, answers: dict[int, Answer]) -> Verdict:
    asked = tuple(answers.items())
    if bad > n_sites and good == n_sites:
        return Verdict(Outcome.NOTHING, 0, 0, len(asked), asked)
    if bad == 0:
        return Verdict(Outcome.ORIGINAL, 0, 0, len(asked), asked)
    first, last = good + 1, bad
    outcome = Outcome.SITE if first == last else Outcome.RANGE
    return Verdict(outcome, first, last, len(asked), asked)
