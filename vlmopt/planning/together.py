"""One plan over edits of all kinds: what is cut, what is narrowed, and what is computed in fewer bits.

At every place (a branch, or what lies outside of all branches) one structure and one precision are chosen; all pairs of
them, and taking the place out, exclude each other. So the plan is a multiple-choice knapsack, solved exactly by
`solving.least_loss`:

    minimise    sum_v x_v sum_k f_k loss_vk          x_v in {0, 1}: variant v is taken; k: the pass that loses it
    subject to  sum_v saving_vr x_v >= need_r        for every resource r that is limited
                sum_(v: p in places_v) x_v <= 1      for every place p

Losses do not add up: what is cut together loses more than the sum, or less where branches stand in for each other. So
plans are measured whole, the factors f are fitted to what was measured (non-negative least squares, held near one
common factor), and the program is solved again, nearer and nearer to the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from vlmopt.planning.cuts import Measurement
from vlmopt.planning.solving import Problem, Site, least_loss

Edit = tuple[int, str]  # the number of a step, and a site of its pass
Plan = frozenset[Edit]
Factors = Mapping[str, float]

_HELD = 0.3  # how much the factors are held near one common factor, relative to what was measured
_LEAST_FACTOR = 1e-3
_FLOOR = 0.1  # of the median loss: below it plans are alike


class Role(Enum):
    """How an option changes its place."""

    REDUCES = "reduces"  # what one component hands on to the next
    REMOVES = "removes"
    NARROWS = "narrows"
    QUANTIZES = "quantizes"


@dataclass(frozen=True)
class Option:
    """What one pass does to a place, all of it or nothing.

    Args:
        kind: the pass.
        loss: predicted growth of the task's loss by this alone.
        saves: by resource: `macs`, `latency` in microseconds, `size` in bytes.
    """

    kind: str
    role: Role
    edits: tuple[Edit, ...]
    places: frozenset[str]
    loss: float
    saves: Mapping[str, float]


@dataclass(frozen=True)
class Variant:
    """What becomes of a place: one option, or a width and a precision together."""

    options: tuple[Option, ...]
    saves: Mapping[str, float]

    @property
    def name(self) -> str:
        return " + ".join(f"{step}:{site}" for step, site in self.edits)

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(edit for option in self.options for edit in option.edits)

    @property
    def places(self) -> frozenset[str]:
        return self.options[0].places

    def loss(self, factors: Factors) -> float:
        return sum(factors.get(option.kind, 1.0) * option.loss for option in self.options)


def variants_of(options: Sequence[Option], wholes: Mapping[str, Mapping[str, float]]) -> list[Variant]:
    """All that may become of the places, each with what it saves.

    Args:
        wholes: what every place takes of every resource. What a width and a precision save together follows from it:
            each leaves a share, and both leave the product of the shares.
    """
    whole = [one for one in options if one.role in (Role.REDUCES, Role.REMOVES)]
    widths = [one for one in options if one.role is Role.NARROWS]
    precisions = [one for one in options if one.role is Role.QUANTIZES]
    single = [Variant((one,), one.saves) for one in (*whole, *widths, *precisions)]
    pairs = [
        Variant((width, precision), _together(width, precision, wholes))
        for width in widths
        for precision in precisions
        if width.places == precision.places
    ]
    return [*single, *pairs]


def _together(first: Option, second: Option, wholes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    saves = {}
    for resource in first.saves.keys() | second.saves.keys():
        whole = sum(wholes.get(place, {}).get(resource, 0.0) for place in first.places)
        one, other = first.saves.get(resource, 0.0), second.saves.get(resource, 0.0)
        saves[resource] = one + other - (one * other / whole if whole > 0 else 0.0)
    return saves


@dataclass(frozen=True)
class Tried:
    """A plan that was measured: how it came about, what it saves as predicted, and what it loses."""

    origin: str
    variants: tuple[Variant, ...]
    measurement: Measurement

    @property
    def plan(self) -> Plan:
        return plan_of(self.variants)

    def saved(self, resource: str) -> float:
        return saved_by(self.variants, resource)


def plan_of(variants: Collection[Variant]) -> Plan:
    return frozenset(edit for variant in variants for edit in variant.edits)


def saved_by(variants: Collection[Variant], resource: str) -> float:
    return sum(variant.saves.get(resource, 0.0) for variant in variants)


def solved(variants: Sequence[Variant], factors: Factors, needs: Mapping[str, float]) -> tuple[Variant, ...] | None:
    """The plan of least predicted loss that saves what is needed; None where none does.

    A loss below zero is noise more often than a gain, and counts as none.
    """
    by_name = {variant.name: variant for variant in variants}
    sites = tuple(
        Site(name, max(0.0, one.loss(factors)), {key: max(0.0, value) for key, value in one.saves.items()}, one.places)
        for name, one in by_name.items()
    )
    found = least_loss(Problem(sites), needs)
    return None if found is None else tuple(by_name[name] for name in found.names)


def fitted_factors(tried: Sequence[Tried], kinds: Sequence[str]) -> dict[str, float]:
    """By how much losses of each kind count in whole plans, from what was measured.

    Plans that lose much say little about those that may be taken, and weigh less.
    """
    import numpy as np
    from scipy.optimize import nnls

    used = [one for one in tried if one.variants and math.isfinite(one.measurement.loss)]
    if not used:
        return dict.fromkeys(kinds, 1.0)
    losses = np.array([[_loss_of(one.variants, kind) for kind in kinds] for one in used])
    measured = np.array([max(0.0, one.measurement.loss) for one in used])
    drops = np.array([max(0.0, one.measurement.drop_points) for one in used])
    # Relative errors: a plan that lost all would drown those near the bound, which alone are to be told apart.
    floor = _FLOOR * float(np.median(measured)) + 1e-12
    weights = 1.0 / ((1.0 + drops) * (measured + floor))
    sums = losses.sum(1)
    square = float((weights**2 * sums**2).sum())
    common = max(float((weights**2 * sums * measured).sum()) / square, _LEAST_FACTOR) if square > 0 else 1.0
    sizes = np.sqrt((weights[:, None] ** 2 * losses**2).sum(0))
    held = np.diag(_HELD * np.maximum(sizes, 1e-3 * sizes.max() + 1e-12))
    rows = np.concatenate([weights[:, None] * losses, held])
    wanted = np.concatenate([weights * measured, held @ np.full(len(kinds), common)])
    found, _ = nnls(rows, wanted)
    return {kind: max(float(value), _LEAST_FACTOR * common) for kind, value in zip(kinds, found, strict=True)}


def _loss_of(variants: Sequence[Variant], kind: str) -> float:
    return sum(max(0.0, one.loss) for variant in variants for one in variant.options if one.kind == kind)


def without_kind(tried: Tried, kind: str, variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """The plan with all edits of one pass given back."""
    by_edits = {frozenset(one.edits): one for one in variants}
    left = []
    for variant in tried.variants:
        edits = frozenset(edit for one in variant.options if one.kind != kind for edit in one.edits)
        if edits:
            left.append(by_edits[edits])
    return tuple(left)


def next_to_go(tried: Tried, variants: Sequence[Variant], factors: Factors, resource: str) -> list[Variant]:
    """What would be taken next: variants that save more at their places, the least loss for what they save first."""
    now: dict[str, Variant] = {place: one for one in tried.variants for place in one.places}
    ranked: dict[frozenset[str], tuple[float, Variant]] = {}
    for variant in variants:
        held = {id(now[place]): now[place] for place in variant.places if place in now}
        more = variant.saves.get(resource, 0.0) - saved_by(held.values(), resource)
        if more > 0:
            lost = variant.loss(factors) - sum(one.loss(factors) for one in held.values())
            price = max(0.0, lost) / more
            if variant.places not in ranked or price < ranked[variant.places][0]:
                ranked[variant.places] = price, variant
    return [variant for _, variant in sorted(ranked.values(), key=lambda pair: pair[0])]


def stepped_back(
    taken: Sequence[Variant], variants: Sequence[Variant], factors: Factors, resource: str
) -> tuple[Variant, ...]:
    """A plan with one place at its next milder variant, or left alone: where most loss goes for the least saving."""
    milder: list[tuple[float, Variant, Variant | None]] = []
    for one in taken:
        lost, saved = one.loss(factors), one.saves.get(resource, 0.0)
        others: list[Variant | None] = [None]
        others += [v for v in variants if v.places == one.places and v.saves.get(resource, 0.0) < saved]
        for other in others:
            less = lost - (0.0 if other is None else other.loss(factors))
            given = saved - (0.0 if other is None else other.saves.get(resource, 0.0))
            milder.append((less / max(given, 1e-9), one, other))
    if not milder:
        return ()
    _, gone, instead = max(milder, key=lambda step: step[0])
    left = tuple(one for one in taken if one is not gone)
    return left if instead is None else (*left, instead)


Measure = Callable[[Plan], Measurement]
