"""Searches one plan over edits of all kinds by measuring: levels of saving by halving, factors fitted in between.

Whatever the levels, plans that come from elsewhere (a search of cuts alone, with and without fewer bits) are measured
among them, so the pick is never worse than the best of those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlmopt.core.errors import PlanError
from vlmopt.planning.cuts import Measurement
from vlmopt.planning.proposing import TIGHTNESS
from vlmopt.planning.together import (
    Factors,
    Measure,
    Plan,
    Role,
    Tried,
    Variant,
    fitted_factors,
    next_to_go,
    plan_of,
    saved_by,
    solved,
    stepped_back,
)

N_LEVELS = 16  # of saving, from nothing to all that there is; halving looks at four of them
N_ROUNDS = 2  # of levels, each between the best plan within the bound and the next beyond it
N_MORE = 4  # single changes of the best plan that are tried at last
N_FINALISTS = 3
N_GIVEN_BACK, N_STEPS_BACK = 2, 4  # of so many plans that do not hold on more items so many edits are given back


@dataclass
class TogetherSearch:
    """A search under a bound on the drop, under needs of resources, or under both.

    Args:
        measure: what a plan loses, on few items.
        resource: what is to be saved where no resource is limited.
        needs: what must be saved of limited resources, above zero.
    """

    variants: Sequence[Variant]
    measure: Measure
    resource: str
    max_drop: float | None
    needs: Mapping[str, float]
    tried: list[Tried] = field(default_factory=list)
    factors: Factors = field(default_factory=dict)

    def run(self, seeds: Mapping[str, Sequence[Variant]]) -> None:
        """Measures the seeds, by what they are called, and what the integer program proposes: of all places, and of
        those that the best seed leaves open, since a cut that was found by measuring beats one that was predicted."""
        if not self.needs and self.max_drop is None:  # what is asked for is met, and nothing says how far to go on
            self._try("nothing", ())
            return
        for origin, variants in seeds.items():
            self._try(origin, tuple(variants))
        self._refit()
        cuts = self._found_cuts()
        for number in range(1, N_ROUNDS + 1):
            before = len(self.tried)
            for base in ((), cuts) if cuts else ((),):
                if self.needs:
                    self._needed(number, base)
                else:
                    self._levels(number, base)
            if len(self.tried) == before:
                break
        if not self.needs:
            self._more()

    def _found_cuts(self) -> tuple[Variant, ...]:
        """What the best of the seeds takes out."""
        within = [one for one in self.tried if self.needs or self.is_within(one.measurement)]
        ranked = sorted(within, key=lambda one: -one.saved(self.resource))
        removed = (tuple(v for v in one.variants if v.options[0].role is Role.REMOVES) for one in ranked)
        return next((variants for variants in removed if variants), ())

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(option.kind for variant in self.variants for option in variant.options))

    def ranked(self) -> list[Tried]:
        """Plans that meet all budgets, the best first."""
        within = [one for one in self.tried if self.fits(one.variants) and self.is_within(one.measurement)]
        if self.needs:
            return sorted(within, key=lambda one: one.measurement.rank)
        return sorted(within, key=lambda one: (-one.saved(self.resource), one.measurement.rank))

    def is_within(self, found: Measurement) -> bool:
        return self.max_drop is None or found.sort_key <= self.max_drop

    def fits(self, variants: Sequence[Variant]) -> bool:
        return all(saved_by(variants, name) >= need * (1 - 1e-9) for name, need in self.needs.items())

    def _levels(self, number: int, base: tuple[Variant, ...]) -> None:
        """Halves the levels between the best plan within the bound and what lies beyond it, around a base."""
        grown = [one for one in self.tried if plan_of(base) <= one.plan]
        best = max((one.saved(self.resource) for one in grown if self.is_within(one.measurement)), default=0.0)
        beyond = [
            one.saved(self.resource)
            for one in grown
            if not self.is_within(one.measurement) and one.saved(self.resource) > best
        ]
        most = self.most_saved(self.resource, base)
        top = most if number == 1 or not beyond else min(min(beyond) * 1.05, most)
        if not most > best:
            return
        low, high = 0, N_LEVELS + 1
        while high - low > 1:
            middle = (low + high) // 2
            # Levels are even in what is left: from a tenth to a twentieth is as far as from all to a half.
            left = 1.0 - best / most
            floor = max(1.0 - top / most, 1e-3)
            share = 1.0 - left * (floor / left) ** (middle / N_LEVELS) if left > floor else top / most
            found = self._solve(f"level {number}{' behind cuts' if base else ''}", {self.resource: share * most}, base)
            low, high = (middle, high) if found is not None and self.is_within(found.measurement) else (low, middle)
        self._refit()

    def _needed(self, number: int, base: tuple[Variant, ...]) -> None:
        for tightness in TIGHTNESS:
            needs = {name: tightness * need for name, need in self.needs.items()}
            self._solve(f"level {number}{' behind cuts' if base else ''}", needs, base)
        self._refit()

    def _more(self) -> None:
        """Tries the single changes that cost least for what they save, on top of the best plan."""
        for _ in range(N_MORE):
            ranked = self.ranked()
            best = ranked[0] if ranked else Tried("", (), Measurement(0.0, 0.0))
            for variant in next_to_go(best, self.variants, self.factors, self.resource):
                kept = tuple(one for one in best.variants if not one.places & variant.places)
                if not self._known(plan_of((*kept, variant))):
                    self._try("one more", (*kept, variant))
                    break

    def _open(self, base: Sequence[Variant]) -> list[Variant]:
        """Variants of the places that a base leaves open."""
        taken = frozenset[str]().union(*(one.places for one in base))
        return [one for one in self.variants if not one.places & taken]

    def most_saved(self, resource: str, base: Sequence[Variant] = ()) -> float:
        """All that can be saved at once, what the base saves included."""
        places: dict[frozenset[str], float] = {}
        for variant in self._open(base):
            own = variant.saves.get(resource, 0.0)
            places[variant.places] = max(own, places.get(variant.places, 0.0))
        taken: set[str] = set()
        total = 0.0
        for where, saved in sorted(places.items(), key=lambda pair: -pair[1]):
            if not taken & where:
                taken |= where
                total += saved
        return (saved_by(base, resource) + total) * (1 - 1e-6)

    def _solve(self, origin: str, needs: Mapping[str, float], base: tuple[Variant, ...]) -> Tried | None:
        left = {name: need - saved_by(base, name) for name, need in needs.items()}
        found = solved(self._open(base), self.factors, left)
        return None if found is None else self._try(origin, (*base, *found))

    def _known(self, plan: Plan) -> Tried | None:
        return next((one for one in self.tried if one.plan == plan), None)

    def _try(self, origin: str, variants: tuple[Variant, ...]) -> Tried:
        known = self._known(plan_of(variants))
        if known is None:
            known = Tried(origin, variants, self.measure(plan_of(variants)))
            self.tried.append(known)
        return known

    def _refit(self) -> None:
        self.factors = fitted_factors(self.tried, self.kinds)


def confirmed(search: TogetherSearch, measure: Measure) -> tuple[list[Tried], list[str]]:
    """The best few measured on more items, those that hold, the best first; and what did not go straight.

    From a plan that does not hold what loses most for the time that it saves is given back, until the rest does.

    Raises:
        PlanError: no plan meets the budgets.
    """
    held: list[Tried] = []
    n_fallen = 0
    for one in search.ranked():
        found = Tried(one.origin, one.variants, measure(one.plan))
        if not search.is_within(found.measurement):
            n_fallen += 1
            less = _given_back(search, found, measure) if n_fallen <= N_GIVEN_BACK else None
            if less is None:
                continue
            found = less
        held.append(found)
        if len(held) == N_FINALISTS:
            break
    if not held and search.needs:
        raise _unmet(search)
    if search.needs:
        held.sort(key=lambda one: one.measurement.rank)
    else:
        held.sort(key=lambda one: -one.saved(search.resource))
    notes = [f"{n_fallen} better-looking plans did not hold on more items"] if n_fallen else []
    return held, notes


def _given_back(search: TogetherSearch, fallen: Tried, measure: Measure) -> Tried | None:
    """What is left of a plan that holds; None where little was given back and it still does not."""
    variants = fallen.variants
    for _ in range(N_STEPS_BACK):
        variants = stepped_back(variants, search.variants, search.factors, search.resource)
        if not variants or not search.fits(variants):
            return None
        found = Tried("given back", variants, measure(plan_of(variants)))
        search.tried.append(found)
        if search.is_within(found.measurement):
            return found
    return None


def _unmet(search: TogetherSearch) -> PlanError:
    """Which budget to relax, and how far."""
    fitting = [one for one in search.tried if search.fits(one.variants)]
    if not fitting:
        wanted = ", ".join(f"{name} by {need:.4g}" for name, need in search.needs.items())
        most = ", ".join(f"{name} {search.most_saved(name):.4g}" for name in search.needs)
        return PlanError(
            "the budgets",
            f"must save {wanted}, and all edits of the recipe together do not",
            expected=f"at most {most} can be saved",
            remedy="relax the budget, or add passes to the recipe",
        )
    least = min(fitting, key=lambda one: one.measurement.sort_key)
    return PlanError(
        "the budgets",
        f"no plan that saves enough stays within a drop of {search.max_drop:g} points",
        expected=f"a drop of {least.measurement.sort_key:.2f} points or more, its margin included",
        remedy="allow more drop, or relax the other budgets",
    )
