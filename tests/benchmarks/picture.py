"""Draws what every method loses against what it saves, as one SVG a task."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 60, 40, 190, 50
_FONT = 'font-family="sans-serif" font-size="12"'
COLOURS = ("#0b5394", "#cc4125", "#38761d", "#7f6000", "#674ea7", "#555555", "#c27ba0", "#45818e", "#b45f06")


@dataclass(frozen=True)
class Curve:
    """Points (share of MACs saved, drop, low, high) in points of the metric."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


def curves_of(figures: Mapping[str, float], task: str) -> list[Curve]:
    """The curves of a task from the names that `towers.figures` gives."""
    marker = "_drop_points"
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for name in figures:
        if name.startswith(f"{task}_") and name.endswith(marker) and name.removesuffix(marker)[-2:].isdigit():
            stem = name.removesuffix(marker)
            method = stem.removeprefix(f"{task}_").rpartition("_")[0]
            row = [figures[f"{stem}_{key}"] for key in ("macs_saved", "drop_points", "low95", "high95")]
            found.setdefault(method, []).append((row[0], row[1], row[2], row[3]))
    return [Curve(name.replace("_", " "), sorted(points)) for name, points in found.items()]


def draw(curves: Sequence[Curve], *, title: str, highest: float = 15.0) -> str:
    """The picture; drops above `highest` points leave it through the top."""
    drops = [point[1] for curve in curves for point in curve.points]
    lowest = min(-2.0, *drops)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {_FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{html.escape(title)}</text>',
    ]

    def x(share: float) -> float:
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(drop: float) -> float:
        inside = min(max(drop, lowest), highest)
        return TOP + (highest - inside) / (highest - lowest) * (HEIGHT - TOP - BOTTOM)

    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(f'<text x="{x(share):.1f}" y="{HEIGHT - 28}" text-anchor="middle">{100 * share:.0f} %</text>')
    for drop in range(5 * int(lowest // 5), int(highest) + 1, 5):
        if drop >= lowest:
            parts += [
                f'<line x1="{LEFT}" x2="{x(1)}" y1="{y(drop):.1f}" y2="{y(drop):.1f}" stroke="#ddd"/>',
                f'<text x="{LEFT - 8}" y="{y(drop) + 4:.1f}" text-anchor="end">{drop}</text>',
            ]
    parts.append(f'<line x1="{LEFT}" x2="{x(1)}" y1="{y(1):.1f}" y2="{y(1):.1f}" stroke="#000" stroke-dasharray="4"/>')
    middle = (LEFT + x(1)) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">MACs saved</text>')
    parts.append(f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})">points lost</text>')
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(share):.1f},{y(drop):.1f}" for share, drop, _, _ in curve.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for share, drop, low, high in curve.points:
            ends = f'x1="{x(share):.1f}" x2="{x(share):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"'
            parts += [
                f'<line {ends} stroke="{colour}" opacity="0.5"/>',
                f'<circle cx="{x(share):.1f}" cy="{y(drop):.1f}" r="3" fill="{colour}"/>',
            ]
        place = f'x="{WIDTH - RIGHT + 14}" y="{TOP + 16 * number + 10}"'
        parts.append(f'<text {place} fill="{colour}">{html.escape(curve.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])
