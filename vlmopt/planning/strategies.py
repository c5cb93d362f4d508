"""The orders in which cuts are tried: depth, measured importance, the integer program, single changes of the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmopt.planning.cuts import Candidate, Cut, Measure, fits, macs_of, names_of, without_overlaps
from vlmopt.planning.proposing import exchanges, fitting_cuts, fitting_prefixes, level_cuts, problem_of
from vlmopt.planning.search import Search
from vlmopt.planning.solving import Interaction

# On top of the best cut so many single candidates, the least needed ones, are tried together, and so many times over.
EXTENSION_WIDTH, EXTENSION_ROUNDS = 3, 2
REFINING_ROUNDS = 1  # by the dearer measure
N_LEVELS = 16  # of saved MACs at which the integer program is solved
N_FINALISTS = 4  # cuts that the expensive meter looks at first, and among which all items decide


def search_all(
    search: Search,
    candidates: Sequence[Candidate],
    interactions: Sequence[Interaction],
    proposed: Sequence[Cut] = (),
) -> None:
    """Measures the cuts of every order that the goal of the search leaves worth measuring."""
    by_score = _by_score(candidates)
    search.accepted("depth", _truncations(candidates, search.needs))
    problem = problem_of(candidates, interactions)
    if search.needs:
        search.accepted("importance", fitting_prefixes(by_score, search.needs))
        search.accepted("program", fitting_cuts(candidates, problem, search.needs))
        search.accepted("elimination", [cut for cut in proposed if fits(cut, search.needs)])
        _exchange(search, by_score, EXTENSION_ROUNDS)
        return
    prefixes = [without_overlaps(by_score[:n]) for n in range(1, len(by_score) + 1)]
    _largest("importance", list(dict.fromkeys(prefixes)), search)
    low, high = _largest(
        "program", level_cuts(candidates, problem, [i / N_LEVELS for i in range(1, N_LEVELS + 1)]), search
    )
    between = [low + (high - low) * i / 8 for i in range(1, 8)]
    _largest("program", level_cuts(candidates, problem, between), search)
    _largest("elimination", proposed, search)
    _extend(search, by_score, EXTENSION_ROUNDS)


def _truncations(candidates: Sequence[Candidate], needs: Mapping[str, float]) -> list[Cut]:
    """The deepest candidate, the two deepest, and so on; together they cost one pass."""
    by_depth = sorted(candidates, key=lambda c: -c.position)
    cuts = dict.fromkeys(without_overlaps(by_depth[:n]) for n in range(1, len(by_depth) + 1))
    return [cut for cut in cuts if fits(cut, needs)]  # one that does not fit can be told without measuring


def _largest(order: str, cuts: Sequence[Cut], search: Search) -> tuple[float, float]:
    """Bisects for the longest accepted cut of a growing sequence; returns the shares of all MACs between which its end
    lies, so that they can be searched more finely."""
    low, high = 0, len(cuts) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if search.accepted(order, [cuts[middle - 1]]):
            low = middle
        else:
            high = middle
    total = max((macs_of(cut) for cut in cuts), default=0) or 1
    shares = [0.0, *(macs_of(cut) / total for cut in cuts), 1.0]
    return shares[low], shares[high]


def _extend(search: Search, by_score: Sequence[Candidate], n_rounds: int) -> None:
    """Adds the accepted candidate that saves most, again and again, trying the least needed few each time."""
    best = next(iter(search.best_first()), ())
    for _ in range(n_rounds):
        taken = frozenset[str]().union(*(candidate.branches for candidate in best))
        left = [c for c in by_score if c not in best and not c.branches & taken][:EXTENSION_WIDTH]
        accepted = search.accepted("extension", [(*best, candidate) for candidate in left])
        if not accepted:
            break
        best = max(accepted, key=macs_of)


def _exchange(search: Search, by_score: Sequence[Candidate], n_rounds: int) -> None:
    """Exchanges single members of the cut that loses least, as long as that helps."""
    for _ in range(n_rounds):
        ranked = search.least_losing()
        if not ranked:
            break
        before = ranked[0]
        tried = exchanges(before, by_score, search.needs, width=EXTENSION_WIDTH)
        search.accepted("exchange", [cut for cut in tried if names_of(cut) not in search.known])
        if search.least_losing()[0] is before:
            break


def refined(search: Search, refine: Measure, candidates: Sequence[Candidate]) -> Search:
    """A search by the dearer measure from the finalists of the first, which keeps the first one's trials.

    Beside the best, near misses that save more go in: what a recovery gives back may bring them within the bound.
    Truncations are all measured again, so that no plan is worse than one of them.
    """
    by_score = _by_score(candidates)
    second = Search(refine, search.max_drop, search.needs, trials=search.trials)
    second.accepted("depth", _truncations(candidates, search.needs))
    ranked = search.best_first()
    best = ranked[:N_FINALISTS]
    for start in range(0, len(ranked), N_FINALISTS):  # down the list until one holds
        if second.accepted("refined", ranked[start : start + N_FINALISTS]):
            break
    if search.needs:
        second.accepted("refined", [cut for cut in search.least_losing()[:N_FINALISTS] if cut not in best])
        _exchange(second, by_score, REFINING_ROUNDS)
        return second
    reached = macs_of(best[0]) if best else 0
    _largest("refined", _near_misses(search, reached), second)
    _extend(second, by_score, REFINING_ROUNDS)
    return second


def _near_misses(search: Search, reached: int) -> list[Cut]:
    """Cuts that save more than was reached, each losing less than all that save as much or more."""
    larger = sorted((cut for cut in search.cuts.values() if macs_of(cut) > reached), key=lambda cut: -macs_of(cut))
    front: list[Cut] = []
    for cut in larger:
        if not front or search.found(cut).sort_key < search.found(front[-1]).sort_key:
            front.append(cut)
    return front[::-1]


def _by_score(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The least needed first; of those alike the deepest."""
    return sorted(candidates, key=lambda c: (c.score, -c.position))
