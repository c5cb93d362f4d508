"""A graph to be drawn, as plain data: the rooms that know torch make it, the room that knows pictures renders it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Mark(Enum):
    """What happened to a node or to an edge."""

    PLAIN = "plain"
    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"  # kept under its name with another shape, weight or constant
    REFUSED = "refused"  # a candidate that a pass left alone
    SITE = "site"  # a candidate that a pass may edit


class NodeKind(Enum):
    """What a node does, as far as a picture tells nodes apart."""

    INPUT = "input"
    OUTPUT = "output"
    TENSOR = "tensor"  # a stored weight or constant
    MODULE = "module"  # a layer with weights
    OPERATION = "operation"
    VIEW = "view"  # the same numbers under another shape
    SIZE = "size"  # a number, not a tensor
    SUM = "sum"  # where a residual branch joins the stream
    GROUP = "group"  # several nodes that are drawn as one


@dataclass(frozen=True)
class DrawnNode:
    """One box. Every line of `label` is a line in it; `group` is the module path it belongs to; `detail` is shown on
    hover, a line each; `follows` is the operand that it continues (the residual stream), where that is known."""

    key: str
    label: str
    group: str = ""
    detail: tuple[str, ...] = ()
    mark: Mark = Mark.PLAIN
    kind: NodeKind = NodeKind.OPERATION
    follows: str = ""


@dataclass(frozen=True)
class Drawing:
    """Boxes in topological order and the edges between them, by key; edges that are not plain have a mark."""

    title: str
    nodes: tuple[DrawnNode, ...]
    edges: tuple[tuple[str, str], ...]
    note: str = ""
    edge_marks: Mapping[tuple[str, str], Mark] = field(default_factory=dict)
