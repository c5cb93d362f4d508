"""Measures cuts while a plan is searched for: each once, each noted with what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlmopt.planning.cuts import Cut, Measure, Measurement, Trial, fits, macs_of, names_of, saved_by


@dataclass
class Search:
    """The cuts that were measured under one goal.

    Args:
        max_drop: points that may be lost; None where only resources are limited.
        needs: what a cut must save, by resource.
    """

    measure: Measure
    max_drop: float | None
    needs: Mapping[str, float] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    known: dict[frozenset[str], Measurement] = field(default_factory=dict)
    cuts: dict[frozenset[str], Cut] = field(default_factory=dict)

    def accepted(self, order: str, cuts: Sequence[Cut]) -> list[Cut]:
        """Those of the cuts that meet the goal; new ones are measured together."""
        new = list(dict.fromkeys(key for cut in cuts if (key := names_of(cut)) not in self.known))
        self.known.update(zip(new, self.measure(new) if new else [], strict=True))
        kept = []
        for cut in cuts:
            names = names_of(cut)
            is_accepted = self.is_within(self.known[names]) and fits(cut, self.needs)
            self.cuts.setdefault(names, cut)
            self.trials.append(self._trial(order, cut, is_accepted=is_accepted))
            if is_accepted:
                kept.append(cut)
        return kept

    def is_within(self, found: Measurement) -> bool:
        """Whether a measured drop is within the bound, with its margin."""
        return self.max_drop is None or found.cautious_drop <= self.max_drop

    def best_first(self) -> list[Cut]:
        """Every cut that meets the goal, the best first: with resources limited the one that loses least, since what it
        must save is said; otherwise the one that saves most."""
        meeting = [cut for key, cut in self.cuts.items() if self.is_within(self.known[key]) and fits(cut, self.needs)]
        if self.needs:
            return sorted(meeting, key=lambda cut: (self.found(cut).rank, -macs_of(cut)))
        return sorted(meeting, key=lambda cut: -macs_of(cut))

    def least_losing(self) -> list[Cut]:
        """Cuts that fit, whatever they lose: the way to one that loses little may lead over one that does not."""
        fitting = [cut for cut in self.cuts.values() if fits(cut, self.needs)]
        return sorted(fitting, key=lambda cut: self.found(cut).rank)

    def found(self, cut: Cut) -> Measurement:
        return self.known[names_of(cut)]

    def _trial(self, order: str, cut: Cut, *, is_accepted: bool) -> Trial:
        return Trial(
            order=order,
            n_cut=len(cut),
            macs=macs_of(cut),
            measurement=self.found(cut),
            is_accepted=is_accepted,
            latency_us=saved_by(cut, "latency"),
            size_bytes=round(saved_by(cut, "size")),
            fits=fits(cut, self.needs),
            names=tuple(candidate.name for candidate in sorted(cut, key=lambda c: c.position)),
        )
