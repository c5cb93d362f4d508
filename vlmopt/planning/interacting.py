"""Interactions of branches as interactions of the sites that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from vlmopt.planning.cuts import Candidate
from vlmopt.planning.solving import Interaction


def site_interactions(candidates: Sequence[Candidate], pairs: Iterable[tuple[str, str, float]]) -> list[Interaction]:
    """For every two candidates the sum over pairs of branches, one of each.

    Pairs within one candidate count for nothing: its score was measured with all its branches gone. Candidates that
    share a branch are never cut together.
    """
    known: dict[frozenset[str], float] = {}
    for first, second, score in pairs:
        key = frozenset({first, second})
        known[key] = known.get(key, 0.0) + score
    found = []
    for a, b in combinations(candidates, 2):
        if a.branches & b.branches:
            continue
        together = [known[pair] for i in a.branches for j in b.branches if (pair := frozenset({i, j})) in known]
        if together:
            found.append(Interaction(a.name, b.name, sum(together)))
    return found
