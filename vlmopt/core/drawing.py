"""A graph to be drawn, as plain data: the rooms that know torch make it, the room that knows pictures renders it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Mark(Enum):
    """What happened to a node."""

    PLAIN = "plain"
    ADDED = "added"
    REMOVED = "removed"
    REFUSED = "refused"  # a candidate that a pass left alone
    SITE = "site"  # a candidate that a pass may edit


@dataclass(frozen=True)
class DrawnNode:
    """One box. `group` names what it belongs to (a module path); `detail` is shown on hover, a line each."""

    key: str
    label: str
    group: str = ""
    detail: tuple[str, ...] = ()
    mark: Mark = Mark.PLAIN


@dataclass(frozen=True)
class Drawing:
    """Boxes in topological order and the edges between them, by key."""

    title: str
    nodes: tuple[DrawnNode, ...]
    edges: tuple[tuple[str, str], ...]
    note: str = ""
