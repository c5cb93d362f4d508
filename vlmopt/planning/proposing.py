"""Cuts that are worth measuring, from predicted losses: the integer program at several levels, prefixes, exchanges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlmopt.planning.cuts import Candidate, Cut, fits, macs_of, without_overlaps
from vlmopt.planning.solving import Interaction, Problem, Site, least_loss

# A plan that just meets its budgets is not always the one that loses least when it is measured, so tighter ones are
# tried beside it.
TIGHTNESS = (1.0, 1.05, 1.15)
N_PREFIXES = 3  # so many prefixes of the measured order that fit, the shortest first


def problem_of(candidates: Sequence[Candidate], interactions: Sequence[Interaction] = ()) -> Problem:
    """The candidates as the solver takes them; interactions of others are left out."""
    known = {candidate.name for candidate in candidates}
    sites = tuple(
        Site(c.name, c.score, {name: max(0.0, saved) for name, saved in c.saves.items()}, _branches(c))
        for c in candidates
    )
    return Problem(sites, tuple(one for one in interactions if {one.first, one.second} <= known))


def level_cuts(candidates: Sequence[Candidate], problem: Problem, levels: Sequence[float]) -> list[Cut]:
    """For every share of all MACs the cut of least predicted loss that saves at least as much; each cut once."""
    total = sum(candidate.macs for candidate in candidates)
    found = [least_loss(problem, {"macs": level * total}) for level in levels]
    cuts = {solution.names: _cut(candidates, solution.names) for solution in found if solution is not None}
    return sorted(cuts.values(), key=macs_of)


def fitting_cuts(candidates: Sequence[Candidate], problem: Problem, needs: Mapping[str, float]) -> list[Cut]:
    """Cuts of least predicted loss that save what is needed, and somewhat more; each once.

    A loss below zero is noise more often than a gain, so every level is solved a second time with such losses at zero.
    """
    clipped = replace(problem, sites=tuple(replace(site, loss=max(0.0, site.loss)) for site in problem.sites))
    cuts: dict[tuple[str, ...], Cut] = {}
    for tightness in TIGHTNESS:
        for variant in (problem, clipped):
            solution = least_loss(variant, {resource: tightness * need for resource, need in needs.items()})
            if solution is not None:
                cuts[solution.names] = _cut(candidates, solution.names)
    return list(cuts.values())


def fitting_prefixes(ranked: Sequence[Candidate], needs: Mapping[str, float]) -> list[Cut]:
    """The shortest prefixes of the measured order that save what is needed."""
    prefixes = [without_overlaps(ranked[:n]) for n in range(1, len(ranked) + 1)]
    return list(dict.fromkeys(cut for cut in prefixes if fits(cut, needs)))[:N_PREFIXES]


def exchanges(cut: Cut, ranked: Sequence[Candidate], needs: Mapping[str, float], *, width: int) -> list[Cut]:
    """The cut with one of its most needed members given back, and the least needed others taken in until it fits."""
    outside = [candidate for candidate in ranked if candidate not in cut]
    made: dict[frozenset[str], Cut] = {}
    for member in sorted(cut, key=lambda c: -c.score)[:width]:
        rest = tuple(candidate for candidate in cut if candidate is not member)
        for start in range(min(2, len(outside))):
            grown = _grown(rest, outside[start:], needs)
            if grown is not None:
                made[frozenset(c.name for c in grown)] = grown
    return list(made.values())


def _grown(cut: Cut, others: Sequence[Candidate], needs: Mapping[str, float]) -> Cut | None:
    for candidate in (None, *others):
        if candidate is not None:
            cut = without_overlaps((*cut, candidate))
        if fits(cut, needs):
            return cut
    return None


def _branches(candidate: Candidate) -> frozenset[str]:
    return candidate.branches or frozenset({candidate.name})


def _cut(candidates: Sequence[Candidate], names: Sequence[str]) -> Cut:
    chosen = frozenset(names)
    return tuple(candidate for candidate in candidates if candidate.name in chosen)
