"""Registered facts: what passes may require, produce or break.

The order of a recipe is checked against them before it runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vlmopt.core.errors import PassError


@dataclass(frozen=True)
class Fact:
    """A named property of a program that one pass leaves behind and another relies on."""

    name: str
    meaning: str


_FACTS: dict[str, Fact] = {}


def register_fact(name: str, meaning: str) -> Fact:
    """The fact under this name; a second registration must mean the same.

    Raises:
        PassError: the name is not kebab-case, the meaning is empty, or the name means something else already.
    """
    if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name)):
        raise PassError(f"fact {name!r}", "is not kebab-case", expected="a name such as 'inputs-folded'")
    if not (isinstance(meaning, str) and meaning.strip()):
        raise PassError(f"fact {name}", "has no meaning", expected="what holds for a program that has it")
    fact = Fact(name, meaning)
    known = _FACTS.setdefault(name, fact)
    if known != fact:
        raise PassError(
            f"fact {name}", f"is registered already as {known.meaning!r}", remedy="choose another name for the new fact"
        )
    return known


def is_registered(fact: Fact) -> bool:
    return _FACTS.get(fact.name) == fact


def registered_facts() -> Mapping[str, Fact]:
    """All facts that were registered so far, by name."""
    return MappingProxyType(_FACTS)


CAPTURED = register_fact("captured", "components are flat graphs over torch.nn leaves, equal to the original model")
CANONICAL = register_fact("canonical", "no dead nodes, no assertions and no nodes that only hand on their input")
TASK_BOUND = register_fact("task-bound", "the program holds what one task needs, and names its head")
STREAM_CUT = register_fact("stream-cut", "residual branches were skipped, so the head wants a re-fit")
INPUTS_FOLDED = register_fact("inputs-folded", "components whose inputs the task fixes are evaluated and gone")
ADAPTERS_INSERTED = register_fact(
    "adapters-inserted", "adapters lie under their own names, ready to be tuned or folded"
)
QUANTIZED = register_fact("quantized", "some layers hold integers for weights: what edits weights comes before")
TRAVERSAL_INSERTED = register_fact("traversal-inserted", "layers read their own output again, mixed in by gates")
