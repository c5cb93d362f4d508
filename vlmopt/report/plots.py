"""Small inline SVG plots. Places along x are shares of the width: a plot fits a phone and its letters do not shrink.

Colours come from CSS classes. Every text is escaped: `Markup.format` does it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

_LEFT, _RIGHT = 3.0, 97.0  # percent of the width between which values lie, so that marks and end ticks are not cut off
_TICK = Markup('<line x1="{x}%" x2="{x}%" y1="{top}" y2="{bottom}" class="grid"/>')
_TEXT = Markup('<text x="{x}%" y="{y}" text-anchor="{anchor}" class="{kind}">{text}</text>')
_RULE = Markup('<line x1="{left}%" x2="{right}%" y1="{y}" y2="{y}" class="{kind}"/>')
_JOINT = Markup('<line x1="{x1}%" y1="{y1}" x2="{x2}%" y2="{y2}" class="front"/>')
_TILE = Markup(
    '<rect x="{x}%" y="{y}" width="{width}%" height="{height}" class="after" fill-opacity="{shade}">'
    "<title>{title}</title></rect>"
)
_DOT = Markup('<circle cx="{x}%" cy="{y}" r="{r}" class="{kind}"><title>{title}</title></circle>')


@dataclass(frozen=True)
class Scale:
    """Maps values to percent of the width (or, for y, to pixels), with ticks at round numbers."""

    low: float
    high: float
    first: float = _LEFT
    last: float = _RIGHT

    @staticmethod
    def over(values: Iterable[float], *, first: float = _LEFT, last: float = _RIGHT) -> Scale:
        """A scale that holds all values, with a little air."""
        found = [value for value in values if math.isfinite(value)]
        low, high = min(found, default=0.0), max(found, default=1.0)
        air = 0.06 * (high - low) or max(abs(high) * 0.05, 1e-6)
        return Scale(low - air, high + air, first, last)

    def place(self, value: float) -> float:
        return round(self.first + (self.last - self.first) * (value - self.low) / (self.high - self.low), 3)

    def ticks(self, n: int = 4) -> list[float]:
        step = _round_step((self.high - self.low) / n)
        start = math.ceil(self.low / step)
        return [round(i * step, 12) for i in range(start, math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Whisker:
    """A value with its interval; `kind` is the CSS class of its colour."""

    label: str
    value: float
    low: float
    high: float
    text: str
    kind: str


@dataclass(frozen=True)
class Distribution:
    """Times in milliseconds with their quantiles; without samples, the quantiles alone are drawn."""

    label: str
    samples: Sequence[float]
    p10: float
    median: float
    p90: float
    kind: str

    @property
    def text(self) -> str:
        return f"{self.median:.3g} ms ({self.p10:.3g} to {self.p90:.3g})"


@dataclass(frozen=True)
class Line:
    """A vertical line, such as zero or what was allowed."""

    value: float
    label: str
    kind: str = "zero"


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot, with whiskers along y; `title` is shown on hover."""

    x: float
    y: float
    title: str
    kind: str
    low: float | None = None
    high: float | None = None
    label: str = ""


BEYOND = "beyond"  # the kind of a dot that lies above the axis: an arrow at its upper edge
_LABEL_LINE, _LABEL_LETTERS = 16.0, 14  # height in pixels, and how many letters fit half a phone
_MARK = {"rejected": 4, "chosen": 7}  # radius in pixels by class, else 5


def whisker_plot(rows: Sequence[Whisker], *, title: str, unit: str, lines: Sequence[Line] = ()) -> Markup:
    """Values with intervals on one axis, a row each, its words above it."""
    scale = Scale.over([v for row in rows for v in (row.value, row.low, row.high)] + [line.value for line in lines])
    top = 14 * len(lines)
    bottom = top + 44 * len(rows) + 10
    parts = [_axis(scale, top=top + 8, bottom=bottom, unit=unit), *_lines(scale, lines, bottom=bottom)]
    for i, row in enumerate(rows):
        y = top + 44 * i + 40
        parts.append(_TEXT.format(x=0, y=y - 15, anchor="start", kind="label", text=row.label))
        parts.append(_TEXT.format(x=100, y=y - 15, anchor="end", kind="value", text=row.text))
        left, right = scale.place(row.low), scale.place(row.high)
        parts.append(_RULE.format(left=left, right=right, y=y, kind=f"whisker {row.kind}"))
        for end in (left, right):
            cap = Markup('<line x1="{x}%" x2="{x}%" y1="{top}" y2="{bottom}" class="whisker {kind}"/>')
            parts.append(cap.format(x=end, top=y - 5, bottom=y + 5, kind=row.kind))
        spoken = f"{row.label}: {row.text}"
        parts.append(_DOT.format(x=scale.place(row.value), y=y, r=6, kind=f"dot {row.kind}", title=spoken))
    return _svg(parts, height=bottom + 24, title=title)


def tile_plot(values: Sequence[float], *, n_columns: int, title: str, labels: Sequence[str] = ()) -> Markup:
    """Shares as tiles in rows, the largest darkest; each says what it is, or its number."""
    height, width, most = 22, 100.0 / n_columns, max(values, default=0.0) or 1.0
    parts = [
        _TILE.format(
            x=round(i % n_columns * width, 3),
            y=i // n_columns * height,
            width=round(width, 3),
            height=height,
            shade=round(max(value, 0.0) / most, 3),
            title=f"{labels[i] if labels else i + 1}: {100 * value:.3g} %",
        )
        for i, value in enumerate(values)
    ]
    return _svg(parts, height=height * math.ceil(len(values) / n_columns), title=title)


def latency_plot(rows: Sequence[Distribution], *, title: str) -> Markup:
    """Distributions on one axis of milliseconds: a histogram, the range from 10 to 90 % and the median."""
    scale = Scale.over([v for row in rows for v in (*_trimmed(row.samples), row.p10, row.median, row.p90)])
    height, bottom = 76 * len(rows) + 40, 76 * len(rows) + 14
    parts = [_axis(scale, top=12, bottom=bottom, unit=" ms")]
    box = Markup('<rect x="{x}%" y="{y}" width="{w}%" height="6" rx="3" class="box {kind}"><title>{t}</title></rect>')
    for i, row in enumerate(rows):
        base, spoken = 76 * i + 70, f"{row.label}: {row.text}"
        parts.append(_TEXT.format(x=0, y=base - 42, anchor="start", kind="label", text=row.label))
        parts.append(_TEXT.format(x=100, y=base - 42, anchor="end", kind="value", text=row.text))
        parts += _histogram(scale, row.samples, base=base, kind=row.kind)
        left, right = scale.place(row.p10), scale.place(row.p90)
        parts.append(box.format(x=left, y=base + 2, w=round(max(right - left, 0.2), 3), kind=row.kind, t=spoken))
        parts.append(_DOT.format(x=scale.place(row.median), y=base + 5, r=5, kind=f"dot {row.kind}", title=spoken))
    return _svg(parts, height=height, title=title)


def scatter_plot(
    dots: Sequence[Dot],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_line: Line | None = None,
    x_unit: str = "",
    front: Sequence[tuple[float, float]] = (),
) -> Markup:
    """Points with whiskers along y, larger y at the top; the points of a front are joined by a line."""
    height = 300
    values = [v for dot in dots for v in (dot.y, dot.low, dot.high) if v is not None]
    x = Scale.over([dot.x for dot in dots], first=9.0, last=97.0)
    y = Scale.over([*values, *([y_line.value] if y_line else [])], first=height - 44.0, last=28.0)
    parts = [_TEXT.format(x=0, y=14, anchor="start", kind="label", text=f"↑ {y_label}")]
    parts.append(_TEXT.format(x=97, y=height - 6, anchor="end", kind="label", text=f"{x_label} →"))
    for tick in y.ticks():
        at = y.place(tick)
        parts.append(_RULE.format(left=9, right=97, y=at, kind="grid"))
        parts.append(_TEXT.format(x=8, y=at + 4, anchor="end", kind="tick", text=_number(tick)))
    for tick in x.ticks():
        at = x.place(tick)
        parts.append(_TICK.format(x=at, top=28, bottom=height - 44))
        parts.append(_TEXT.format(x=at, y=height - 28, anchor="middle", kind="tick", text=f"{_number(tick)}{x_unit}"))
    if y_line is not None:
        at = y.place(y_line.value)
        parts.append(_RULE.format(left=9, right=97, y=at, kind=y_line.kind))
        parts.append(_TEXT.format(x=97, y=at - 5, anchor="end", kind="tick", text=y_line.label))
    for (x1, y1), (x2, y2) in pairwise(front):
        parts.append(_JOINT.format(x1=x.place(x1), y1=y.place(y1), x2=x.place(x2), y2=y.place(y2)))
    for dot in dots:
        parts += _dot(dot, x, y)
    parts += _labels(dots, x, y, bottom=height - 48)
    return _svg(parts, height=height, title=title)


def _dot(dot: Dot, x: Scale, y: Scale) -> list[Markup]:
    at, parts = x.place(dot.x), []
    if dot.kind == BEYOND:
        arrow = Markup('<text x="{x}%" y="{y}" text-anchor="middle" class="label">↑<title>{title}</title></text>')
        return [arrow.format(x=at, y=y.place(dot.y) + 4, title=dot.title)]
    if dot.low is not None and dot.high is not None:
        bar = Markup('<line x1="{x}%" x2="{x}%" y1="{top}" y2="{bottom}" class="whisker {kind}"/>')
        parts.append(bar.format(x=at, top=y.place(dot.high), bottom=y.place(dot.low), kind=dot.kind))
    radius = _MARK.get(dot.kind, 5)
    parts.append(_DOT.format(x=at, y=y.place(dot.y), r=radius, kind=f"dot {dot.kind}", title=dot.title))
    return parts


def _labels(dots: Sequence[Dot], x: Scale, y: Scale, *, bottom: float) -> Iterable[Markup]:
    """Names beside their points, moved down (at the lower end: up) where they would lie over another."""
    text = Markup('<text x="{x}%" y="{y}" dx="{dx}" text-anchor="{anchor}" class="label">{text}</text>')
    taken: list[float] = []
    for dot in sorted((dot for dot in dots if dot.label), key=lambda dot: y.place(dot.y)):
        at, line = x.place(dot.x), y.place(dot.y) + 4
        step = _LABEL_LINE if line + _LABEL_LINE * len(dots) < bottom else -_LABEL_LINE
        while any(abs(line - other) < _LABEL_LINE for other in taken):
            line += step
        taken.append(line)
        anchor, gap = ("start", 11) if at < 50 else ("end", -11)
        shown = dot.label if len(dot.label) <= _LABEL_LETTERS else f"…{dot.label[1 - _LABEL_LETTERS :]}"
        yield text.format(x=at, y=round(line, 1), dx=gap, anchor=anchor, text=shown)


def small_whisker(value: float, interval: tuple[float, float] | None, scale: Scale, *, title: str) -> Markup:
    """One drop with its interval in a table cell; the scale is shared by the rows."""
    parts = [_TICK.format(x=scale.place(0.0), top=0, bottom=20)]
    kind = "bad" if value > 0 else "good" if value < 0 else "plain"
    if interval is not None:
        parts.append(
            _RULE.format(left=scale.place(interval[0]), right=scale.place(interval[1]), y=10, kind=f"whisker {kind}")
        )
    parts.append(_DOT.format(x=scale.place(value), y=10, r=4, kind=f"dot {kind}", title=title))
    return _svg(parts, height=20, title=title)


def _svg(parts: Sequence[Markup], *, height: int, title: str) -> Markup:
    opening = Markup('<svg class="plot" role="img" aria-label="{title}" width="100%" height="{height}">')
    return opening.format(title=title, height=height) + Markup("").join(parts) + Markup("</svg>")


def _axis(scale: Scale, *, top: int, bottom: int, unit: str) -> Markup:
    parts = []
    for tick in scale.ticks():
        parts.append(_TICK.format(x=scale.place(tick), top=top, bottom=bottom))
        text = f"{_number(tick)}{unit}"
        parts.append(_TEXT.format(x=scale.place(tick), y=bottom + 16, anchor="middle", kind="tick", text=text))
    return Markup("").join(parts)


def _lines(scale: Scale, lines: Sequence[Line], *, bottom: int) -> Iterable[Markup]:
    """Vertical lines, each with its label in a row of its own, so that near ones do not overlap."""
    mark = Markup('<line x1="{x}%" x2="{x}%" y1="{top}" y2="{bottom}" class="{kind}"/>')
    for i, line in enumerate(lines):
        at, y = scale.place(line.value), 14 * i + 11
        yield mark.format(x=at, top=y + 4, bottom=bottom, kind=line.kind)
        anchor = "start" if at < 20 else "end" if at > 80 else "middle"
        yield _TEXT.format(x=at, y=y, anchor=anchor, kind="tick", text=line.label)


def _histogram(scale: Scale, values: Sequence[float], *, base: int, kind: str) -> list[Markup]:
    shown = _trimmed(values)
    if len(shown) < 2:
        return []
    n_bins = 48
    counts = [0] * n_bins
    for value in shown:
        counts[min(int(n_bins * (value - scale.low) / (scale.high - scale.low)), n_bins - 1)] += 1
    bar = Markup('<rect x="{x}%" y="{y}" width="{w}%" height="{h}" class="bar {kind}"/>')
    width, parts = (scale.last - scale.first) / n_bins, []
    for i, n in enumerate(counts):
        if n:
            tall = round(30 * n / max(counts), 2)
            at = round(scale.first + i * width, 3)
            parts.append(bar.format(x=at, y=base - tall, w=round(width * 0.92, 3), h=tall, kind=kind))
    return parts


def _trimmed(values: Sequence[float]) -> Sequence[float]:
    """Samples without the slowest two in a hundred, which would squeeze all others into a corner."""
    return sorted(values)[: math.ceil(0.98 * len(values))]


def _round_step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough))
    return next(size * step for step in (1, 2, 5, 10) if size * step >= rough * 0.999)


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")
