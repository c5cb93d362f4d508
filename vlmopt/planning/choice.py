"""Chooses which candidates to cut under a bound on the drop of the metric, under budgets of resources, or under both.

Cuts are measured on the validation split. Why several orders: single-branch scores do not add up, and on real towers
"the deepest first" is hard to beat. Depth, the measured order and the integer program are all searched, so a plan is
never worse than plain truncation. All truncations together cost one pass, since what lies in front of one is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmopt.planning.cuts import (
    MARGIN_IN_STANDARD_ERRORS,
    Candidate,
    Choice,
    Cut,
    Measure,
    Measurement,
    Trial,
    names_of,
)
from vlmopt.planning.search import Search
from vlmopt.planning.solving import Interaction
from vlmopt.planning.strategies import N_FINALISTS, refined, search_all
from vlmopt.planning.unmet import refuse_unreachable, unmet

__all__ = [
    "MARGIN_IN_STANDARD_ERRORS",
    "Candidate",
    "Choice",
    "Measure",
    "Measurement",
    "Trial",
    "choose",
]


def choose(
    candidates: Sequence[Candidate],
    measure: Measure,
    *,
    max_drop: float | None = None,
    needs: Mapping[str, float] | None = None,
    interactions: Sequence[Interaction] = (),
    confirm: Measure | None = None,
    refine: Measure | None = None,
    proposed: Sequence[Cut] = (),
) -> Choice:
    """The cut that saves most MACs with a measured drop within `max_drop`; with `needs`, of those that meet all budgets
    the one that loses least.

    Args:
        needs: what must be saved, by resource (`macs`, `latency` in microseconds, `size` in bytes); what is not above
            zero is met already.
        interactions: of the candidates, in the unit of their scores, for the integer program.
        confirm: measures on all items, those included that the search does not see; a pick that does not hold there
            gives way to the next best. With `refine` it must measure what `refine` does.
        refine: a better and dearer measure (on more items, or with a recovery behind every cut); truncations and the
            best few are measured again by it, and extended.
        proposed: cuts of a search of its own, each a part of the next.

    Raises:
        PlanError: no cut meets the budgets, with the closest that does.
    """
    open_needs = {resource: need for resource, need in (needs or {}).items() if need > 0}
    if not open_needs and max_drop is None:
        return Choice((), Measurement(0.0, 0.0), (), notes=("the budgets are met without a cut",))
    refuse_unreachable(candidates, open_needs)
    first = search = Search(measure, max_drop, open_needs)
    search_all(search, candidates, interactions, proposed)
    if refine is not None:
        search = refined(first, refine, candidates)
    found = _picked(search, confirm)
    if found is None:
        # What can be saved within the drop is worth a search: it tells the user which budget to relax.
        within = Search(first.measure, max_drop, {}, known=first.known)
        search_all(within, candidates, interactions, proposed)
        raise unmet(search, within)
    return found


def _picked(search: Search, confirm: Measure | None) -> Choice | None:
    """The best cut that also holds on all items; None where budgets of resources leave none."""
    ranked, notes = search.best_first(), list[str]()
    if confirm is not None and ranked:
        ranked, notes = _confirmed(search, ranked, confirm)
    if not ranked and search.needs:
        return None
    best = ranked[0] if ranked else ()
    names = tuple(candidate.name for candidate in sorted(best, key=lambda c: c.position))
    found = search.known.get(names_of(best), Measurement(0.0, 0.0))
    return Choice(names, found, tuple(search.trials), notes=tuple(notes))


def _confirmed(search: Search, ranked: Sequence[Cut], confirm: Measure) -> tuple[list[Cut], list[str]]:
    """The cuts from the first that holds on all items, and a note where that is not the first."""
    if search.max_drop is None:
        few = list(ranked[:N_FINALISTS])
        search.known.update(zip(map(names_of, few), confirm([names_of(cut) for cut in few]), strict=True))
        return sorted(few, key=lambda cut: search.found(cut).rank), []
    for i, cut in enumerate(ranked):
        (found,) = confirm([names_of(cut)])
        if search.is_within(found):
            search.known[names_of(cut)] = found
            note = f"{i} better-looking cut{'s' if i > 1 else ''} did not hold on the items kept out of the search"
            return list(ranked[i:]), [note] if i else []
    return [], ["no cut that looked acceptable held on the items kept out of the search"]
