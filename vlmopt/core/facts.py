"""Registered facts: what passes may require, produce or break.

The order of a recipe is checked against them before it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmopt.core.errors import PassError


@dataclass(frozen=True)
class Fact:
    """A named property of a program that one pass leaves behind and another relies on."""

    name: str
    meaning: str


_FACTS: dict[str, Fact] = {}


def register_fact(name: str, meaning: str) -> Fact:
    """The fact under this name; a second registration must mean the same."""
    fact = Fact(name, meaning)
    known = _FACTS.setdefault(name, fact)
    if known != fact:
        raise PassError(
            f"fact {name}", f"is registered already as {known.meaning!r}", remedy="choose another name for the new fact"
        )
    return known


def is_registered(fact: Fact) -> bool:
    return _FACTS.get(fact.name) == fact


CAPTURED = register_fact("captured", "components are flat graphs over torch.nn leaves, equal to the original model")
CANONICAL = register_fact("canonical", "no dead nodes, no assertions and no nodes that only hand on their input")
TASK_BOUND = register_fact("task-bound", "the program holds what one task needs, and names its head")
STREAM_CUT = register_fact("stream-cut", "residual branches were skipped, so the head wants a re-fit")
INPUTS_FOLDED = register_fact("inputs-folded", "components whose inputs the task fixes are evaluated and gone")
