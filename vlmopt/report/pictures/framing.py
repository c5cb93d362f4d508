"""Frames around the boxes of a module, where a rectangle holds exactly them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vlmopt.core.drawing import Drawing

MAX_SHARE = 0.6  # a frame around nearly everything says nothing


@dataclass(frozen=True)
class Cells:
    """The rows and lanes of a frame; `above` and `below` count the frames that begin or end with it, it included."""

    group: str
    first_row: int
    last_row: int
    first_lane: int
    last_lane: int
    above: int = 1
    below: int = 1
    inside: int = 1  # frames nested in it, it included


def frames(drawing: Drawing, rows: Sequence[int], lanes: Sequence[int]) -> list[Cells]:
    """Frames from the outside inwards; any two lie apart or one inside the other."""
    members = members_of(drawing)
    box_at = {(row, lane): i for i, (row, lane) in enumerate(zip(rows, lanes, strict=True))}
    found: list[Cells] = []
    for group in sorted(members, key=lambda group: (group.count("."), group)):
        inside = members[group]
        if len(inside) < 2 or len(inside) > MAX_SHARE * len(rows) or _is_same_as_child(group, members):
            continue
        own_rows, own_lanes = [rows[i] for i in inside], [lanes[i] for i in inside]
        cells = Cells(group, min(own_rows), max(own_rows), min(own_lanes), max(own_lanes))
        if _holds_only(cells, set(inside), box_at) and all(_is_apart_or_inside(cells, other) for other in found):
            found.append(cells)
    return _nested(found)


def members_of(drawing: Drawing) -> dict[str, list[int]]:
    """For every module path the boxes in it, those of its parts included."""
    members: defaultdict[str, list[int]] = defaultdict(list)
    for i, node in enumerate(drawing.nodes):
        parts = node.group.split(".") if node.group else []
        for n in range(1, len(parts) + 1):
            members[".".join(parts[:n])].append(i)
    return dict(members)


def _is_same_as_child(group: str, members: dict[str, list[int]]) -> bool:
    """Whether one part of the module holds all of it; its frame is then the one to draw, with the longer name."""
    size = len(members[group])
    return any(other.startswith(f"{group}.") and len(inside) == size for other, inside in members.items())


def _holds_only(cells: Cells, inside: set[int], box_at: dict[tuple[int, int], int]) -> bool:
    return all(
        box_at.get((row, lane), -1) in inside or (row, lane) not in box_at
        for row in range(cells.first_row, cells.last_row + 1)
        for lane in range(cells.first_lane, cells.last_lane + 1)
    )


def _is_apart_or_inside(cells: Cells, outer: Cells) -> bool:
    is_apart = (
        cells.first_row > outer.last_row
        or cells.last_row < outer.first_row
        or cells.first_lane > outer.last_lane
        or cells.last_lane < outer.first_lane
    )
    return is_apart or (cells.group.startswith(f"{outer.group}.") and _is_within(cells, outer))


def _is_within(cells: Cells, outer: Cells) -> bool:
    return (
        outer.first_row <= cells.first_row
        and cells.last_row <= outer.last_row
        and outer.first_lane <= cells.first_lane
        and cells.last_lane <= outer.last_lane
    )


def _nested(found: Sequence[Cells]) -> list[Cells]:
    """With the counts of frames that share an edge, inner ones first counted."""
    counted: dict[str, Cells] = {}
    for cells in reversed(found):
        parts = [inner for inner in counted.values() if inner.group.startswith(f"{cells.group}.")]
        above = 1 + max((inner.above for inner in parts if inner.first_row == cells.first_row), default=0)
        below = 1 + max((inner.below for inner in parts if inner.last_row == cells.last_row), default=0)
        inside = 1 + max((inner.inside for inner in parts), default=0)
        place = (cells.first_row, cells.last_row, cells.first_lane, cells.last_lane)
        counted[cells.group] = Cells(cells.group, *place, above, below, inside)
    return [counted[cells.group] for cells in found]
