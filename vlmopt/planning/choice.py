"""Chooses which candidates to cut under a bound on the drop of the metric, by measuring on the validation split.

Why two orders: single-branch scores do not add up, and on real towers "the deepest first" is hard to beat. Both the
measured order and depth are searched for the largest acceptable cut, and the cheaper result wins; a plan is therefore
never worse than plain truncation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# A cut is accepted when its drop is within the bound even one standard error further out: validation data are few.
MARGIN_IN_STANDARD_ERRORS = 1.0


@dataclass(frozen=True)
class Candidate:
    """Something that can be cut: its measured score (higher is needed more), its position in the stream, what it saves."""

    name: str
    score: float
    position: int
    macs: int


@dataclass(frozen=True)
class Measurement:
    """Drop of the metric in points against the reference, on the same items, with its standard error."""

    drop_points: float
    standard_error: float

    @property
    def cautious_drop(self) -> float:
        return self.drop_points + MARGIN_IN_STANDARD_ERRORS * self.standard_error


@dataclass(frozen=True)
class Trial:
    """One cut that was measured."""

    order: str
    n_cut: int
    macs: int
    measurement: Measurement
    is_accepted: bool


@dataclass(frozen=True)
class Choice:
    """What to cut, and everything that was tried on the way."""

    names: tuple[str, ...]
    measurement: Measurement
    trials: tuple[Trial, ...]


Measure = Callable[[frozenset[str]], Measurement]


@dataclass
class _Search:
    measure: Measure
    max_drop: float
    trials: list[Trial] = field(default_factory=list)
    known: dict[frozenset[str], Measurement] = field(default_factory=dict)

    def accepts(self, order: str, cut: Sequence[Candidate]) -> bool:
        names = frozenset(candidate.name for candidate in cut)
        if names not in self.known:
            self.known[names] = self.measure(names)
        found = self.known[names]
        accepted = found.cautious_drop <= self.max_drop
        self.trials.append(Trial(order, len(cut), sum(c.macs for c in cut), found, accepted))
        return accepted


def choose(candidates: Sequence[Candidate], measure: Measure, *, max_drop: float) -> Choice:
    """The cut that saves most MACs among those whose measured drop stays within `max_drop` points."""
    search = _Search(measure, max_drop)
    by_score = sorted(candidates, key=lambda c: (c.score, -c.position))
    by_depth = sorted(candidates, key=lambda c: -c.position)
    best: tuple[Candidate, ...] = ()
    for order, ranked in (("importance", by_score), ("depth", by_depth)):
        found = _largest_prefix(order, ranked, search)
        best = max(best, found, key=lambda cut: sum(c.macs for c in cut))
    best = _extend(best, by_score, search)
    names = tuple(candidate.name for candidate in sorted(best, key=lambda c: c.position))
    nothing = Measurement(0.0, 0.0)
    return Choice(names, search.known.get(frozenset(names), nothing), tuple(search.trials))


def _largest_prefix(order: str, ranked: Sequence[Candidate], search: _Search) -> tuple[Candidate, ...]:
    """Bisects for the longest accepted prefix."""
    low, high = 0, len(ranked) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if search.accepts(order, ranked[:middle]):
            low = middle
        else:
            high = middle
    return tuple(ranked[:low])


def _extend(best: tuple[Candidate, ...], by_score: Sequence[Candidate], search: _Search) -> tuple[Candidate, ...]:
    """Adds single candidates, the least needed first, until three in a row are refused."""
    refused = 0
    for candidate in by_score:
        if candidate in best or refused == 3:
            continue
        if search.accepts("extension", (*best, candidate)):
            best, refused = (*best, candidate), 0
        else:
            refused += 1
    return best
