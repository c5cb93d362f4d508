"""Chooses a cut by measuring it: a first look at few items for many cuts, all items for the best of them.

Most cuts that a search proposes lose far too much, and few items show that. What is chosen in the end is measured on
all items, and truncations always are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlmopt.planning.choice import choose
from vlmopt.planning.cuts import Candidate, Choice, Cut, Measurement, fits
from vlmopt.planning.elimination import Elimination
from vlmopt.planning.meter import CutMeter
from vlmopt.planning.solving import Interaction

OVERRUN = 4.0  # an elimination on few items goes on until so many points, and times the bound, are lost


class MeasuredPlanner:
    """Plans under one budget after another; what was measured for one is not measured again for the next.

    Args:
        meter: measures on all items.
        screen: measures on few of them, none of which `meter` keeps out; None where all are few.
        eliminating: measures on very few of them, for an elimination step by step; None where scores add up well
            enough, as they do behind heads that are fitted again.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        meter: CutMeter,
        screen: CutMeter | None,
        eliminating: CutMeter | None = None,
    ) -> None:
        self.candidates, self.meter, self._screen = tuple(candidates), meter, screen
        self._branches = {candidate.name: candidate.branches for candidate in candidates}
        self._elimination = None
        if eliminating is not None:
            few = eliminating  # not None from here on
            self._elimination = Elimination(candidates, lambda cuts: few.measure([self.branches(cut) for cut in cuts]))

    def choose(
        self,
        *,
        max_drop: float | None = None,
        needs: Mapping[str, float] | None = None,
        interactions: Sequence[Interaction] = (),
    ) -> Choice:
        """What `planning.choice.choose` picks, with its drop on the items that were kept out of the search.

        Raises:
            PlanError: no cut meets the budgets.
        """
        choice = choose(
            self.candidates,
            self._all if self._screen is None else self._few,
            max_drop=max_drop,
            needs=needs,
            interactions=interactions,
            confirm=lambda cuts: self.meter.measure_all([self.branches(cut) for cut in cuts]),
            refine=None if self._screen is None else self._all,
            proposed=self._proposed(max_drop, needs or {}),
        )
        notes = choice.notes
        if not choice.names and self.meter.is_cut_before:  # what is lost already is lost without another cut
            choice = replace(choice, measurement=self.meter.measure_all([frozenset()])[0])
        chosen = self.branches(frozenset(choice.names))
        kept_out = self.meter.measure_kept_out([chosen]) if chosen else []
        if not math.isfinite(choice.measurement.cautious_drop):
            notes = ("the items are all of one group, so the error of a drop is unknown", *notes)
        return replace(choice, kept_out=next(iter(kept_out), None), notes=notes)

    def _proposed(self, max_drop: float | None, needs: Mapping[str, float]) -> list[Cut]:
        """Cuts of the elimination, until they save what is needed, or lose far more than is allowed."""
        if self._elimination is None:
            return []
        unmet = {name: need for name, need in needs.items() if need > 0}
        if unmet:
            return self._elimination.until(lambda cut, _: fits(cut, unmet), unmet)
        if max_drop is None:
            return []
        limit = OVERRUN * max_drop + OVERRUN
        return self._elimination.until(lambda _, found: found.drop_points > limit, unmet)

    def branches(self, cut: frozenset[str]) -> frozenset[str]:
        """The branches, `component/branch`, that go with the candidates of these names."""
        return frozenset[str]().union(*(self._branches[name] for name in cut))

    def _all(self, cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        return self.meter.measure([self.branches(cut) for cut in cuts])

    def _few(self, cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        """With the error that the same drop would have on all items: what is passed on is measured there anyway."""
        assert self._screen is not None
        shrink = math.sqrt(self._screen.n_measured / self.meter.n_measured)
        found = self._screen.measure([self.branches(cut) for cut in cuts])
        return [replace(one, standard_error=one.standard_error * shrink) for one in found]
