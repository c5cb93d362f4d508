"""Checks the order of a recipe's passes against the facts they require, produce and break, before anything runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlmopt.core.contract import Pass
from vlmopt.core.errors import RecipeError
from vlmopt.core.facts import Fact
from vlmopt.registry import PassInfo

Facts = frozenset[str]


@dataclass(frozen=True)
class _Step:
    """What the search for a remedy knows of a pass. `number`: its place in the recipe, where it comes later."""

    name: str
    requires: Facts
    produces: Facts
    breaks: Facts
    number: int | None = None

    def after(self, facts: Facts) -> Facts:
        return (facts - self.breaks) | self.produces


def check_order(
    passes: Sequence[Pass | type[Pass]],
    *,
    initial: Iterable[Fact],
    producers: Mapping[str, Sequence[PassInfo]] | None = None,
) -> frozenset[Fact]:
    """The facts that hold after the last pass.

    Args:
        initial: facts that hold before the first pass.
        producers: for each fact, the passes that produce it (`registry.producers`), for the remedy.

    Raises:
        RecipeError: a step lacks a fact: which step and fact, who broke it, and what to do. Doing so makes that step
            work; where nothing can, it says why.
    """
    holding = frozenset(initial)
    broken_by: dict[Fact, str] = {}
    for index, step in enumerate(passes):
        for fact in sorted(step.requires - holding, key=lambda fact: fact.name):
            names = frozenset(fact.name for fact in holding)
            raise _lacking(passes, index, fact, broken_by.get(fact), names, producers or {})
        broken_by |= {fact: _label(passes, index) for fact in step.breaks & holding}
        holding = (holding - step.breaks) | step.produces
    return holding


def _lacking(
    passes: Sequence[Pass | type[Pass]],
    index: int,
    fact: Fact,
    breaker: str | None,
    holding: Facts,
    producers: Mapping[str, Sequence[PassInfo]],
) -> RecipeError:
    found = f"{passes[index].name!r} requires {fact.name!r} ({fact.meaning}), "
    found += f"which {breaker} breaks" if breaker else "which no step before it produces"
    known = _known(passes, index, producers)
    wanted = _step_of(passes[index], None)
    remedy = _remedy(wanted, holding, known) or _why_not(wanted, fact.name, holding, known)
    return RecipeError(f"recipe, {_label(passes, index)}", found, remedy=remedy)


def _known(passes: Sequence[Pass | type[Pass]], index: int, producers: Mapping[str, Sequence[PassInfo]]) -> list[_Step]:
    """Every pass that could be put before the step at `index`, those that come later in the recipe first."""
    known: dict[str, _Step] = {}
    for number in (*range(index + 1, len(passes)), *range(index + 1)):
        step = _step_of(passes[number], number if number > index else None)
        known.setdefault(step.name, step)
    for info in sorted({info.name: info for infos in producers.values() for info in infos}.values(), key=_name):
        facts = (frozenset(info.requires), frozenset(info.produces), frozenset(info.breaks))
        known.setdefault(info.name, _Step(info.name, *facts))
    return list(known.values())


def _name(info: PassInfo) -> str:
    return info.name


def _step_of(step: Pass | type[Pass], number: int | None) -> _Step:
    requires, produces, breaks = (
        frozenset(fact.name for fact in facts) for facts in (step.requires, step.produces, step.breaks)
    )
    return _Step(step.name, requires, produces, breaks, number)


def _remedy(wanted: _Step, holding: Facts, known: Sequence[_Step]) -> str:
    """The fewest passes that, put before the wanted one, give it all it requires; empty when there are none."""
    ways = _shortest(wanted.requires, holding, known)
    if not ways:
        return ""
    before = f"before {wanted.name!r}"
    way = min(ways, key=lambda steps: sum(step.number is None for step in steps))
    moved = sorted({step.number + 1 for step in way if step.number is not None})
    if len(way) == 1 and moved:
        return f"move step {moved[0]} ({way[0].name!r}) {before}"
    if len(way) == 1:
        return f"put {' or '.join(sorted(repr(steps[0].name) for steps in ways))} {before}"
    remedy = f"put {', then '.join(repr(step.name) for step in way)} {before}"
    if moved:
        remedy += f" (moving step {' and '.join(map(str, moved))})"
    return remedy


def _shortest(goal: Facts, holding: Facts, known: Sequence[_Step]) -> list[tuple[_Step, ...]]:
    """All shortest sequences of passes that work one after another and after which the goal holds.

    A breadth-first search over sets of facts: every set is visited once, so a longer sequence is one of several.
    """
    queue: deque[tuple[Facts, tuple[_Step, ...]]] = deque([(holding, ())])
    seen, ways = {holding}, list[tuple[_Step, ...]]()
    while queue:
        facts, way = queue.popleft()
        if ways and len(way) >= len(ways[0]):
            break
        for step in known:
            if not step.requires <= facts:
                continue
            after = step.after(facts)
            if goal <= after:
                ways.append((*way, step))
            elif after not in seen:
                seen.add(after)
                queue.append((after, (*way, step)))
    return ways


def _why_not(wanted: _Step, fact: str, holding: Facts, known: Sequence[_Step]) -> str:
    """Why no order of the known passes gives the wanted one what it requires."""
    advice = f"leave {wanted.name!r} out"
    chain, lacking = [f"{wanted.name!r} requires {fact!r}"], [fact]
    while True:
        makers = [step for step in known if lacking[-1] in step.produces]
        if not makers:
            if len(chain) == 1:
                return f"no known pass produces it: {advice}"
            return f"no known pass produces {lacking[-1]!r}: {', and '.join(chain)}; {advice}"
        maker = makers[0]
        missing = sorted(maker.requires - _reachable(holding, known))
        if not missing:
            return f"no order of the known passes gives {_spelled(wanted.requires)} at once; {advice}"
        chain[-1] += f", which {'only ' if len(makers) == 1 else ''}{maker.name!r} produces"
        chain.append(f"{maker.name!r} requires {missing[0]!r}")
        if missing[0] in lacking:
            return f"they require each other in a circle: {', and '.join(chain)}; no order works: {advice}"
        lacking.append(missing[0])


def _reachable(holding: Facts, known: Sequence[_Step]) -> Facts:
    """Every fact that some order of the known passes could produce, were nothing ever broken."""
    facts = holding
    while more := frozenset().union(*(step.produces for step in known if step.requires <= facts)) - facts:
        facts |= more
    return facts


def _spelled(facts: Facts) -> str:
    return " and ".join(repr(fact) for fact in sorted(facts))


def _label(passes: Sequence[Pass | type[Pass]], index: int) -> str:
    return f"step {index + 1} ({passes[index].name!r})"
