"""Takes out the candidate that is missed least, looks at the others again, and so on.

Where nothing makes up for a cut, as in a decoder whose words are its own, many branches are each missed by nobody and
by everybody together, so scores of single ones do not add up. As in SLEB (arXiv 2402.09025) and BlockPruner (arXiv
2406.10594) every step is measured behind the steps before it; but of the candidates only those are looked at again
whose last known loss is among the least, for what is missed seldom grows less as more is gone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from vlmopt.planning.cuts import Candidate, Cut, Measure, Measurement, names_of

WIDTH = 8  # so many candidates are measured at a time
N_LOOKS = 2  # at most so many times a step, where the first ones have become dear
NEARLY_AS_GOOD = 1.5  # a second candidate goes in the same step, if it costs up to so many times what the first does
_SLACK = 0.1  # of the middle score: a loss below it is noise, and what saves more goes first


class Elimination:
    """One cut that grows; `path` holds it behind every step. It goes on where it stopped.

    Args:
        measure: the loss of cuts on few items.
    """

    def __init__(self, candidates: Sequence[Candidate], measure: Measure) -> None:
        self._measure = measure
        self._missed = {candidate: candidate.score for candidate in candidates}  # loss of going next, as last measured
        self._slack = _SLACK * abs(statistics.median(self._missed.values())) if self._missed else 0.0
        self.path: list[tuple[Cut, Measurement]] = []

    def until(self, is_enough: Callable[[Cut, Measurement], bool], needs: Mapping[str, float]) -> list[Cut]:
        """The cuts of the path up to the first that is enough, or all where none is.

        Args:
            needs: what is wanted, by resource: of two candidates that are missed alike the one that saves more of it
                goes first. Without any, it is MACs.
        """
        for i, (cut, found) in enumerate(self.path):
            if is_enough(cut, found):
                return [cut for cut, _ in self.path[: i + 1]]
        while step := self._step(needs):
            self.path.append(step)
            if is_enough(*step):
                break
        return [cut for cut, _ in self.path]

    def _step(self, needs: Mapping[str, float]) -> tuple[Cut, Measurement] | None:
        before, whole = self.path[-1] if self.path else ((), Measurement(0.0, 0.0))
        taken = frozenset[str]().union(*(candidate.branches for candidate in before))
        left = [one for one in self._missed if one not in before and not one.branches & taken]
        if not left:
            return None
        fresh: dict[Candidate, Measurement] = {}
        for _ in range(N_LOOKS):
            stale = sorted((one for one in left if one not in fresh), key=lambda one: self._price(one, needs))
            if fresh and (not stale or min(self._price(o, needs) for o in fresh) <= self._price(stale[0], needs)):
                break
            looked_at = stale[:WIDTH]
            measured = self._measure([names_of((*before, one)) for one in looked_at])
            fresh.update(zip(looked_at, measured, strict=True))
            self._missed.update({one: fresh[one].loss - whole.loss for one in looked_at})
        first, *others = sorted(fresh, key=lambda one: self._price(one, needs))
        limit = NEARLY_AS_GOOD * self._price(first, needs)
        second = next((one for one in others if not one.branches & first.branches), None)
        if second is None or self._price(second, needs) > limit:
            return (*before, first), fresh[first]
        cut = (*before, first, second)
        (found,) = self._measure([names_of(cut)])
        is_sum = found.loss - whole.loss <= NEARLY_AS_GOOD * sum(map(self._cost, (first, second)))
        return (cut, found) if is_sum else ((*before, first), fresh[first])  # else one stood in for the other

    def _price(self, candidate: Candidate, needs: Mapping[str, float]) -> float:
        """What going next costs in loss for what it saves."""
        wanted = {name: need for name, need in needs.items() if need > 0}
        saved = sum(candidate.saves[name] / need for name, need in wanted.items()) if wanted else candidate.macs
        return self._cost(candidate) / max(saved, 1e-12)

    def _cost(self, candidate: Candidate) -> float:
        return max(0.0, self._missed[candidate]) + self._slack
