"""Checks the order of a recipe's passes against the facts they require, produce and break, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vlmopt.core.contract import Pass
from vlmopt.core.errors import RecipeError
from vlmopt.core.facts import Fact


def check_order(
    passes: Sequence[Pass | type[Pass]],
    *,
    initial: Iterable[Fact],
    producers: Mapping[str, Sequence[str]] | None = None,
) -> frozenset[Fact]:
    """The facts that hold after the last pass.

    Args:
        initial: facts that hold before the first pass.
        producers: for each fact, the names of passes that produce it (`registry.producers`), for the remedy.

    Raises: RecipeError for the first step that lacks a fact: which step and fact, who broke it, who would produce it.
    """
    holding = frozenset(initial)
    broken_by: dict[Fact, str] = {}
    for index, step in enumerate(passes):
        for fact in sorted(step.requires - holding, key=lambda fact: fact.name):
            raise _lacking(passes, index, fact, broken_by.get(fact), producers or {})
        broken_by |= {fact: _label(passes, index) for fact in step.breaks & holding}
        holding = (holding - step.breaks) | step.produces
    return holding


def _lacking(
    passes: Sequence[Pass | type[Pass]],
    index: int,
    fact: Fact,
    breaker: str | None,
    producers: Mapping[str, Sequence[str]],
) -> RecipeError:
    found = f"{passes[index].name!r} requires {fact.name!r} ({fact.meaning}), "
    found += f"which {breaker} breaks" if breaker else "which no step before it produces"
    return RecipeError(f"recipe, {_label(passes, index)}", found, remedy=_remedy(passes, index, fact, producers))


def _remedy(passes: Sequence[Pass | type[Pass]], index: int, fact: Fact, producers: Mapping[str, Sequence[str]]) -> str:
    before = repr(passes[index].name)
    later = [n for n in range(index + 1, len(passes)) if fact in passes[n].produces]
    if later:
        return f"move {_label(passes, later[0])} before {before}"
    names = {step.name for step in passes if fact in step.produces} | set(producers.get(fact.name, ()))
    if names:
        return f"put {' or '.join(map(repr, sorted(names)))} before {before}"
    return "no known pass produces it"


def _label(passes: Sequence[Pass | type[Pass]], index: int) -> str:
    return f"step {index + 1} ({passes[index].name!r})"
