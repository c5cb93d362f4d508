"""What a plan is made of: candidates, cuts of them, and what was measured about a cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# A cut is accepted when its drop is within the bound at the upper end of a one-sided 95 % interval: many cuts are
# looked at, and the best of many noisy means looks better than it is.
MARGIN_IN_STANDARD_ERRORS = 1.645


@dataclass(frozen=True)
class Candidate:
    """Something that can be cut: its measured score (higher is needed more), its place in the stream, what it saves.

    `branches` are what goes with it; two candidates that share one exclude each other.
    """

    name: str
    score: float
    position: int
    macs: int
    latency_us: float = 0.0
    size_bytes: int = 0
    branches: frozenset[str] = frozenset()

    @property
    def saves(self) -> Mapping[str, float]:
        """What it saves by resource, under the names that budgets have in recipes."""
        return {"macs": float(self.macs), "latency": self.latency_us, "size": float(self.size_bytes)}


@dataclass(frozen=True)
class Measurement:
    """Drop of the metric in points against the reference, on the same items, with its standard error; and by how much
    the loss grew, which tells cuts apart that have lost all of the metric."""

    drop_points: float
    standard_error: float
    loss: float = 0.0

    @property
    def cautious_drop(self) -> float:
        return self.drop_points + MARGIN_IN_STANDARD_ERRORS * self.standard_error

    @property
    def sort_key(self) -> float:
        """The cautious drop, or the plain one where items of one group alone leave the error unknown."""
        return self.cautious_drop if math.isfinite(self.cautious_drop) else self.drop_points

    @property
    def rank(self) -> tuple[float, float]:
        """What loses less comes first; of those that lose as much of the metric, by the loss."""
        return self.sort_key, self.loss


@dataclass(frozen=True)
class Trial:
    """One cut that was measured. `fits` says whether it saves what the resource budgets ask for."""

    order: str
    n_cut: int
    macs: int
    measurement: Measurement
    is_accepted: bool
    latency_us: float = 0.0
    size_bytes: int = 0
    fits: bool = True
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What to cut, and everything that was tried on the way.

    `kept_out` is the drop on items that no search looked at, where there are any (the last pick among a few finalists
    does, on all items); `notes` says what did not go
    straight.
    """

    names: tuple[str, ...]
    measurement: Measurement
    trials: tuple[Trial, ...]
    kept_out: Measurement | None = None
    notes: tuple[str, ...] = ()


Cut = tuple[Candidate, ...]
Measure = Callable[[Sequence[frozenset[str]]], list[Measurement]]


def names_of(cut: Cut) -> frozenset[str]:
    return frozenset(candidate.name for candidate in cut)


def macs_of(cut: Cut) -> int:
    return sum(candidate.macs for candidate in cut)


def saved_by(cut: Cut, resource: str) -> float:
    return sum(candidate.saves[resource] for candidate in cut)


def fits(cut: Cut, needs: Mapping[str, float]) -> bool:
    """Whether the cut saves what is needed of every resource; a billionth is left to rounding."""
    return all(saved_by(cut, resource) >= need - 1e-9 * abs(need) for resource, need in needs.items())


def without_overlaps(candidates: Sequence[Candidate]) -> Cut:
    """The candidates in their order, less those one of whose branches an earlier one takes along."""
    kept: list[Candidate] = []
    taken: set[str] = set()
    for candidate in candidates:
        if not taken & candidate.branches:
            kept.append(candidate)
            taken |= candidate.branches
    return tuple(kept)
