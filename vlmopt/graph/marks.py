"""Marks of skipped regions: which branches a value of the stream stands for, in the order of the stream.

A skip leaves nothing of a branch behind, and recovery wants to know where one was. So the value that takes a branch's
place is marked with it, and where a marked value is itself replaced its marks move on, in front of or behind those that
are there already. The marks of a value do not depend on the order in which branches were skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from torch import fx

_KEY = "skipped"


class Mark(NamedTuple):
    """One skipped branch. `is_beside`: other branches of the same sum were still there."""

    branch: str
    layer: str
    kind: str
    is_beside: bool = False


def marks_of(node: fx.Node) -> tuple[Mark, ...]:
    """The branches that were skipped at this value, in the order of the stream."""
    found: tuple[Mark, ...] = node.meta.get(_KEY, ())
    return found


def set_marks(node: fx.Node, marks: Iterable[Mark]) -> None:
    """Gives the value these marks and no others."""
    kept = tuple(marks)
    if kept:
        node.meta[_KEY] = kept
    else:
        node.meta.pop(_KEY, None)


def hand_marks_on(node: fx.Node, to: fx.Node) -> None:
    """Moves the marks of a value that is about to be replaced; they follow those of the value that replaces it."""
    set_marks(to, (*marks_of(to), *marks_of(node)))
    set_marks(node, ())


def joined(before: Sequence[Mark], own: Mark, after: Sequence[Mark]) -> tuple[Mark, ...]:
    """The marks of a value at which the branch `own` was skipped.

    Args:
        before: marks of the stream that the branch began at.
        after: marks of the sum that it ended in: branches beside it, skipped before, then those that followed.
    """
    beside = list(takewhile(lambda mark: mark.is_beside, after))
    # Branches of one sum have no order of their own: by name, so that the order of skipping does not show.
    one_sum = sorted((own, *beside))
    if not own.is_beside:
        one_sum = [mark._replace(is_beside=False) for mark in one_sum]
    return (*before, *one_sum, *after[len(beside) :])
