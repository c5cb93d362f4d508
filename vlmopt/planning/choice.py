"""Chooses which candidates to cut under a bound on the drop of the metric, by measuring on the validation split.

Why two orders: single-branch scores do not add up, and on real towers "the deepest first" is hard to beat. Both depth
and the measured order are searched for the cut that saves most, so a plan is never worse than plain truncation. All
truncations together cost one pass, since everything in front of a truncation is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# A cut is accepted when its drop is within the bound at the upper end of a one-sided 95 % interval: many cuts are
# looked at, and the best of many noisy means looks better than it is.
MARGIN_IN_STANDARD_ERRORS = 1.645
# On top of the best cut so many single candidates, the least needed ones, are tried together, and so many times over.
EXTENSION_WIDTH, EXTENSION_ROUNDS = 3, 2


@dataclass(frozen=True)
class Candidate:
    """Something that can be cut: its measured score (higher is needed more), its place in the stream, what it saves."""

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


Cut = tuple[Candidate, ...]
Measure = Callable[[Sequence[frozenset[str]]], list[Measurement]]


@dataclass
class _Search:
    measure: Measure
    max_drop: float
    trials: list[Trial] = field(default_factory=list)
    known: dict[frozenset[str], Measurement] = field(default_factory=dict)

    def accepted(self, order: str, cuts: Sequence[Cut]) -> list[Cut]:
        """Those of the cuts whose drop stays within the bound; new ones are measured together."""
        new = list(dict.fromkeys(key for cut in cuts if (key := _names(cut)) not in self.known))
        self.known.update(zip(new, self.measure(new) if new else [], strict=True))
        kept = []
        for cut in cuts:
            found = self.known[_names(cut)]
            is_accepted = found.cautious_drop <= self.max_drop
            self.trials.append(Trial(order, len(cut), _macs(cut), found, is_accepted))
            if is_accepted:
                kept.append(cut)
        return kept


def choose(candidates: Sequence[Candidate], measure: Measure, *, max_drop: float) -> Choice:
    """The cut that saves most MACs among those whose measured drop stays within `max_drop` points."""
    search = _Search(measure, max_drop)
    by_score = sorted(candidates, key=lambda c: (c.score, -c.position))
    by_depth = sorted(candidates, key=lambda c: -c.position)
    truncations = [tuple(by_depth[:n]) for n in range(1, len(by_depth) + 1)]
    best = max(search.accepted("depth", truncations), key=_macs, default=())
    best = max(best, _largest_prefix(by_score, search), key=_macs)
    best = _extend(best, by_score, search)
    names = tuple(candidate.name for candidate in sorted(best, key=lambda c: c.position))
    return Choice(names, search.known.get(_names(best), Measurement(0.0, 0.0)), tuple(search.trials))


def _largest_prefix(ranked: Sequence[Candidate], search: _Search) -> Cut:
    """Bisects for the longest accepted prefix of the measured order."""
    low, high = 0, len(ranked) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if search.accepted("importance", [tuple(ranked[:middle])]):
            low = middle
        else:
            high = middle
    return tuple(ranked[:low])


def _extend(best: Cut, by_score: Sequence[Candidate], search: _Search) -> Cut:
    """Adds the accepted candidate that saves most, again and again, trying the least needed few each time."""
    for _ in range(EXTENSION_ROUNDS):
        left = [candidate for candidate in by_score if candidate not in best][:EXTENSION_WIDTH]
        accepted = search.accepted("extension", [(*best, candidate) for candidate in left])
        if not accepted:
            break
        best = max(accepted, key=_macs)
    return best


def _names(cut: Cut) -> frozenset[str]:
    return frozenset(candidate.name for candidate in cut)


def _macs(cut: Cut) -> int:
    return sum(candidate.macs for candidate in cut)
