"""Places of boxes, lines and frames in pixels.

A line leaves its box below, turns in the gap under it, runs down a lane that is free there or a gutter between lanes,
turns in the gap above its reader and enters it from above. Lanes are free by `ranking`, gutters and gaps hold no boxes:
so no line runs through a box. In a gap every source has a track of its own as far as others would lie over it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vlmopt.core.drawing import Drawing
from vlmopt.report.pictures.framing import Cells, frames
from vlmopt.report.pictures.ranking import SHORT_RUN, Graph, Ranks, rank

CHARACTER = 6.7  # width of a letter at 11 px in a monospaced font
_MARGIN, _ROW, _GAP, _TRACK, _PORT, _GUTTER = 16.0, 36.0, 20.0, 6.0, 9.0, 30.0
_FRAME_TOP, _FRAME_BOTTOM, _FRAME_SIDE = 15.0, 7.0, 6.0


@dataclass(frozen=True)
class Box:
    """Where node `index` of the drawing lies; lines leave and enter it at its middle, `x`."""

    index: int
    x: float
    top: float
    width: float
    height: float = _ROW

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def bottom(self) -> float:
        return self.top + self.height


@dataclass(frozen=True)
class Line:
    """An edge of the drawing as corners, from the source's bottom to the target's top; `is_stream` on the spine."""

    source: int
    target: int
    corners: tuple[tuple[float, float], ...]
    is_stream: bool = False


@dataclass(frozen=True)
class Frame:
    group: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Places:
    """A drawing in pixels."""

    width: float
    height: float
    boxes: tuple[Box, ...] = ()
    lines: tuple[Line, ...] = ()
    frames: tuple[Frame, ...] = ()


@dataclass
class _Intervals:
    """Gives every interval the first track on which nothing of another owner lies over it."""

    tracks: list[list[tuple[float, float, int]]] = field(default_factory=list)

    def add(self, low: float, high: float, owner: int) -> int:
        for number, track in enumerate(self.tracks):
            if all(high < start or end < low or owner == other for start, end, other in track):
                track.append((low, high, owner))
                return number
        self.tracks.append([(low, high, owner)])
        return len(self.tracks) - 1


def place(drawing: Drawing) -> Places:
    """Boxes, lines and frames, the same for the same drawing."""
    if not drawing.nodes:
        return Places(2 * _MARGIN, 2 * _MARGIN)
    graph = Graph.of(drawing)
    return _Placing(graph, rank(graph)).places()


def _width(label: str) -> float:
    return min(max(CHARACTER * max(map(len, label.split("\n"))) + 18, 60.0), 260.0)


class _Placing:
    """The steps of `place`: runs down gutters, lanes from left to right, turns in gaps, rows from top to bottom."""

    def __init__(self, graph: Graph, ranks: Ranks) -> None:
        self.graph, self.ranks = graph, ranks
        self.frames = frames(graph.drawing, ranks.rows, ranks.lanes)
        self.widths = [_width(node.label) for node in graph.drawing.nodes]
        self.occupied = set(zip(ranks.rows, ranks.lanes, strict=True))
        self.n_rows, self.n_lanes = max(ranks.rows) + 1, max(ranks.lanes) + 1
        self.runs = self._gutter_runs()
        self.lane_x, self.gutter_x, self.width = self._across()
        self.turns, self.n_tracks = self._turns()
        self.tops = self._down()

    def places(self) -> Places:
        boxes = tuple(
            Box(i, self.lane_x[lane], self.tops[row], self.widths[i])
            for i, (row, lane) in enumerate(zip(self.ranks.rows, self.ranks.lanes, strict=True))
        )
        lines = tuple(self._line(source, target, boxes) for source, target in self._edges())
        height = self.tops[-1] + _ROW + self._below(self.n_rows - 1) + _MARGIN
        return Places(self.width, height, boxes, lines, tuple(self._frame(cells) for cells in self.frames))

    def _edges(self) -> Iterable[tuple[int, int]]:
        return ((source, reader) for source, readers in enumerate(self.graph.readers) for reader in readers)

    def _gutter_runs(self) -> dict[int, tuple[int, int]]:
        """For every source whose lines must pass rows beside its lane: the gutter and the track in it. Short runs take
        the gutter beside the source, long ones the one left of everything."""
        rows, lanes = self.ranks.rows, self.ranks.lanes
        gutters: defaultdict[int, _Intervals] = defaultdict(_Intervals)
        runs = {}
        for source, readers in enumerate(self.graph.readers):
            far = [rows[reader] for reader in readers if self._needs_gutter(source, reader)]
            if far:
                is_short = max(far) - rows[source] <= SHORT_RUN
                gutter = lanes[source] + 1 if is_short else 0
                runs[source] = (gutter, gutters[gutter].add(rows[source], max(far), source))
        return runs

    def _needs_gutter(self, source: int, reader: int) -> bool:
        rows = self.ranks.rows
        is_near = rows[reader] == rows[source] + 1 or rows[reader] - 1 <= self.ranks.trails.get(source, -1)
        return not is_near and (source, reader) not in self.ranks.straight

    def _across(self) -> tuple[list[float], list[float], float]:
        """The middle of every lane, the first track of every gutter (number g lies left of lane g), the width."""
        n_tracks: defaultdict[int, int] = defaultdict(int)
        for gutter, track in self.runs.values():
            n_tracks[gutter] = max(n_tracks[gutter], track + 1)
        lane_width = [0.0] * self.n_lanes
        for lane, width in zip(self.ranks.lanes, self.widths, strict=True):
            lane_width[lane] = max(lane_width[lane], width)
        side = _FRAME_SIDE * max((cells.inside for cells in self.frames), default=0)
        x, lane_x, gutter_x = _MARGIN, [], []
        for lane in range(self.n_lanes + 1):
            gutter_x.append(x + side + _TRACK)
            x += max(2 * side + _TRACK * (n_tracks[lane] + 1), _GUTTER if lane else 0)
            if lane < self.n_lanes:
                lane_x.append(x + lane_width[lane] / 2)
                x += lane_width[lane]
        return lane_x, gutter_x, max(x, 240.0)

    def _gutter(self, source: int) -> float:
        gutter, track = self.runs[source]
        return self.gutter_x[gutter] + _TRACK * track

    def _port(self, source: int, target: int) -> float:
        """Where a line enters its target: in the middle when it comes straight down, beside it otherwise."""
        rows, lanes = self.ranks.rows, self.ranks.lanes
        entering = self.graph.operands[target]
        straight = [operand for operand in entering if (operand, target) in self.ranks.straight]
        others = sorted(
            (operand for operand in entering if operand not in straight), key=lambda i: (self._comes_from(i, target), i)
        )
        if source in straight:
            return self.lane_x[lanes[target]]
        left = [operand for operand in others if self._comes_from(operand, target) < self.lane_x[lanes[target]]]
        is_below_another = (rows[target] - 1, lanes[target]) in self.occupied
        if len(others) == 1 and not straight and not is_below_another:
            return self.lane_x[lanes[target]]
        step = min(_PORT, (self.widths[target] / 2 - 6) / max(len(others), 1))
        offset = others.index(source) - len(left)
        return self.lane_x[lanes[target]] + step * (offset if offset < 0 else offset + 1)

    def _comes_from(self, source: int, target: int) -> float:
        return self._gutter(source) if self._needs_gutter(source, target) else self.lane_x[self.ranks.lanes[source]]

    def _turns(self) -> tuple[dict[tuple[int, int], int], list[int]]:
        """For every gap (number g lies under row g) and source the track on which the source's lines turn."""
        spans: dict[tuple[int, int], list[float]] = defaultdict(list)
        for source, target in self._edges():
            for gap, start, end in self._passages(source, target):
                spans[gap, source] += [start, end]
        gaps = [_Intervals() for _ in range(self.n_rows)]
        turns = {}
        for (gap, source), xs in sorted(spans.items(), key=lambda item: (item[0][0], min(item[1]), item[0][1])):
            if min(xs) < max(xs):
                turns[gap, source] = gaps[gap].add(min(xs), max(xs), source)
        return turns, [len(gap.tracks) for gap in gaps]

    def _passages(self, source: int, target: int) -> Iterable[tuple[int, float, float]]:
        """The gaps in which an edge turns: their number, and from where to where."""
        rows, lanes = self.ranks.rows, self.ranks.lanes
        start, port = self.lane_x[lanes[source]], self._port(source, target)
        if self._needs_gutter(source, target):
            run = self._gutter(source)
            yield rows[source], start, run
            yield rows[target] - 1, run, port
        elif start != port:
            yield rows[target] - 1, start, port

    def _down(self) -> list[float]:
        """The top of every row: gaps are as high as their tracks and the edges of frames need."""
        tops, y = [], _MARGIN
        for row in range(self.n_rows):
            y += _FRAME_TOP * max((cells.above for cells in self.frames if cells.first_row == row), default=0)
            tops.append(y)
            y += _ROW + self._below(row) + _GAP + _TRACK * max(self.n_tracks[row] - 1, 0)
        return tops

    def _below(self, row: int) -> float:
        return _FRAME_BOTTOM * max((cells.below for cells in self.frames if cells.last_row == row), default=0)

    def _track_y(self, gap: int, source: int) -> float:
        return self.tops[gap] + _ROW + self._below(gap) + _GAP / 2 + _TRACK * self.turns[gap, source]

    def _line(self, source: int, target: int, boxes: Sequence[Box]) -> Line:
        x, y = boxes[source].x, boxes[source].bottom
        corners = [(x, y)]
        for gap, start, end in self._passages(source, target):
            if start != end:
                level = self._track_y(gap, source)
                corners += [(start, level), (end, level)]
                x = end
        corners.append((x, boxes[target].top))
        is_stream = self.ranks.lanes[target] == 0 and (source, target) in self.ranks.straight
        return Line(source, target, tuple(corners), is_stream)

    def _frame(self, cells: Cells) -> Frame:
        side = _FRAME_SIDE * cells.inside
        inside = [
            i
            for i, (row, lane) in enumerate(zip(self.ranks.rows, self.ranks.lanes, strict=True))
            if cells.first_row <= row <= cells.last_row and cells.first_lane <= lane <= cells.last_lane
        ]
        left = min(self.lane_x[self.ranks.lanes[i]] - self.widths[i] / 2 for i in inside) - side
        right = max(self.lane_x[self.ranks.lanes[i]] + self.widths[i] / 2 for i in inside) + side
        top = self.tops[cells.first_row] - _FRAME_TOP * cells.above + 3
        bottom = self.tops[cells.last_row] + _ROW + _FRAME_BOTTOM * cells.below
        return Frame(cells.group, left, top, right - left, bottom - top)
