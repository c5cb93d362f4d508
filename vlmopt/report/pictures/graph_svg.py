"""A drawing as SVG: boxes, lines and frames, with colours for light and for dark, and shapes beside the colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlmopt.core.drawing import Drawing, DrawnNode, Mark, NodeKind
from vlmopt.report.pictures.markup import asset, number, short, text
from vlmopt.report.pictures.placing import CHARACTER, Box, Frame, Line, Places, place

_BADGES = {Mark.ADDED: "+", Mark.REMOVED: "−", Mark.CHANGED: "~", Mark.REFUSED: "!", Mark.SITE: "◆"}
_MEANINGS = {
    Mark.ADDED: "added",
    Mark.REMOVED: "removed",
    Mark.CHANGED: "changed",
    Mark.REFUSED: "refused",
    Mark.SITE: "may be edited",
}
_FAINT = (NodeKind.SIZE, NodeKind.TENSOR)
_HEAD = 64.0  # height of the title above the boxes
_KEY_WIDTH = 26  # beside the words of a mark in the legend


def drawing_svg(drawing: Drawing) -> str:
    """A file of its own: title, note, legend of the marks that occur, and the graph."""
    return _standalone([(drawing, place(drawing))], gap=0.0)


def drawings_svg(drawings: Sequence[Drawing]) -> str:
    """Several drawings beside each other in one file."""
    return _standalone([(drawing, place(drawing)) for drawing in drawings], gap=40.0)


def inner_svg(drawing: Drawing) -> str:
    """The graph alone, for a page that brings the title and the style."""
    places = place(drawing)
    size = f'width="{number(places.width)}" height="{number(places.height)}"'
    view = f'viewBox="0 0 {number(places.width)} {number(places.height)}"'
    label = text(f"graph of {drawing.title}")
    opening = f'<svg class="vd" xmlns="http://www.w3.org/2000/svg" {size} {view} role="group" aria-label="{label}">'
    return f"{opening}{_graph(drawing, places)}</svg>"


def style() -> str:
    """The style sheet of these pictures."""
    return asset("graph.css")


def badge(mark: Mark) -> str:
    return _BADGES.get(mark, "")


def meaning(mark: Mark) -> str:
    return _MEANINGS.get(mark, "")


def _standalone(placed: Sequence[tuple[Drawing, Places]], *, gap: float) -> str:
    parts, x, height = [], 0.0, 0.0
    for drawing, places in placed:
        width = max(places.width, _head_width(drawing))
        parts.append(f'<g class="drawing" transform="translate({number(x)} 0)">\n{_head(drawing)}')
        shift = (width - places.width) / 2
        parts.append(f'<g transform="translate({number(shift)} {number(_HEAD)})">{_graph(drawing, places)}</g></g>')
        x += width + gap
        height = max(height, places.height + _HEAD)
    size = f"{number(max(x - gap, 1.0))} {number(max(height, 1.0))}"
    width_text, height_text = size.split()
    opening = (
        f'<svg class="vd alone" xmlns="http://www.w3.org/2000/svg" width="{width_text}" height="{height_text}" '
        f'viewBox="0 0 {size}">\n<style>{style()}</style>\n'
    )
    return opening + "\n".join(parts) + "\n</svg>\n"


def _head_width(drawing: Drawing) -> float:
    legend = sum(CHARACTER * len(_MEANINGS[mark]) + _KEY_WIDTH for mark in _marks(drawing))
    return 24 + max(9.3 * len(drawing.title), CHARACTER * len(drawing.note), legend)


def _marks(drawing: Drawing) -> list[Mark]:
    used = {node.mark for node in drawing.nodes}
    return [mark for mark in _MEANINGS if mark in used]


def _head(drawing: Drawing) -> str:
    parts = [f'<text class="head" x="12" y="22">{text(drawing.title)}</text>']
    if drawing.note:
        parts.append(f'<text class="sub" x="12" y="40">{text(drawing.note)}</text>')
    x = 12.0
    for mark in _marks(drawing):
        parts.append(f'<g class="n key {mark.value}">{_badge(mark, x + 7, 54)}')
        parts.append(f'<text x="{number(x + 17)}" y="58">{_MEANINGS[mark]}</text></g>')
        x += CHARACTER * len(_MEANINGS[mark]) + _KEY_WIDTH
    return "".join(parts)


def _graph(drawing: Drawing, places: Places) -> str:
    """In groups with plain attributes, so that a program without style sheets shows it too."""
    frames = "\n".join(_frame(frame) for frame in places.frames)
    lines = "\n".join(_line(line, drawing) for line in places.lines)
    boxes = "\n".join(_box(box, drawing.nodes[box.index]) for box in places.boxes)
    return (
        f'<g class="frames" fill="none" stroke="#bbb">\n{frames}</g>\n'
        f'<g class="edges" fill="none" stroke="#777">\n{lines}</g>\n'
        f'<g class="nodes" fill="#fff" stroke="#777">\n{boxes}</g>'
    )


def _frame(frame: Frame) -> str:
    place_text = _rectangle(frame.x, frame.y, frame.width, frame.height)
    label = _frame_label(frame.group)
    spot = f'x="{number(frame.x + 6)}" y="{number(frame.y + 4)}"'
    return f'<g data-group="{text(frame.group)}"><rect {place_text} rx="6"/><text {spot}>{text(label)}</text></g>'


def _frame_label(group: str) -> str:
    """The last part of a path, with the one before it where it is a number."""
    parts = group.split(".")
    return short(".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]), 40)


def _line(line: Line, drawing: Drawing) -> str:
    source, target = drawing.nodes[line.source], drawing.nodes[line.target]
    path, (at_x, at_y) = [f"M{_point(line.corners[0])}"], line.corners[0]
    for x, y in line.corners[1:]:
        path.append(f"V{number(y)}" if x == at_x else f"H{number(x)}")
        at_x, at_y = x, y
    path.append(f"M{number(at_x - 3)} {number(at_y - 5)}L{_point((at_x, at_y))}L{number(at_x + 3)} {number(at_y - 5)}")
    words = " ".join(_line_words(line, source, target, drawing))
    return f'<path{f" class={chr(34)}{words}{chr(34)}" if words else ""} d="{"".join(path)}"/>'


def _line_words(line: Line, source: DrawnNode, target: DrawnNode, drawing: Drawing) -> Iterable[str]:
    mark = drawing.edge_marks.get((source.key, target.key), Mark.PLAIN)
    if Mark.REMOVED in (mark, source.mark, target.mark):
        yield Mark.REMOVED.value
    elif Mark.ADDED in (mark, source.mark, target.mark):
        yield Mark.ADDED.value
    elif line.is_stream:
        yield "stream"
    elif source.kind in _FAINT:
        yield "faint"


def _box(box: Box, node: DrawnNode) -> str:
    round_by = 16 if node.kind in (NodeKind.INPUT, NodeKind.OUTPUT) else 9 if node.kind is NodeKind.SUM else 3
    rectangle = f'<rect {_rectangle(box.left, box.top, box.width, box.height)} rx="{round_by}"/>'
    words = f"n {node.kind.value}" + (f" {node.mark.value}" if node.mark is not Mark.PLAIN else "")
    title = text("\n".join(_hover(node)))
    lines = [line for line in node.label.split("\n") if line] or [node.key]
    fits = int((box.width - 8) / CHARACTER)
    step, first = 13, box.top + box.height / 2 + 4 - 6.5 * (min(len(lines), 2) - 1)
    labels = "".join(
        f'<text class="l{i + 1}" x="{number(box.x)}" y="{number(first + step * i)}" text-anchor="middle" '
        f'fill="#111" stroke="none">{text(short(line, fits))}</text>'
        for i, line in enumerate(lines[:2])
    )
    mark = _badge(node.mark, box.left + box.width, box.top) if node.mark in _BADGES else ""
    named = f'data-key="{text(node.key)}" data-in="{text(node.group)}"'
    return f'<g class="{words}" {named} tabindex="-1"><title>{title}</title>{rectangle}{labels}{mark}</g>'


def _hover(node: DrawnNode) -> list[str]:
    lines = list(node.detail) or [node.key, *node.label.split("\n")]
    if node.group:
        lines.append(f"in {node.group}")
    return [*lines, *([_MEANINGS[node.mark]] if node.mark in _MEANINGS else [])]


def _badge(mark: Mark, x: float, y: float) -> str:
    return (
        f'<circle cx="{number(x)}" cy="{number(y)}" r="7"/><text class="badge" x="{number(x)}" y="{number(y + 4)}" '
        f'text-anchor="middle" stroke="none">{_BADGES[mark]}</text>'
    )


def _rectangle(x: float, y: float, width: float, height: float) -> str:
    return f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'


def _point(point: tuple[float, float]) -> str:
    return f"{number(point[0])} {number(point[1])}"
