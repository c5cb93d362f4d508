"""The residual stream of a component as a spine with its branches in order, coloured by what they are worth.

A column fits a phone. Further columns lie beside it where there is room and below it where there is none: the style
sheet moves them, since a picture has no lines to break.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby

from vlmopt.report.naming import kind_words
from vlmopt.report.pictures.branch_rows import BranchRow, Measure
from vlmopt.report.pictures.markup import asset, number, short, text
from vlmopt.report.pictures.scale import N_STEPS, colours_css, is_known, plain_colour
from vlmopt.report.quantities import plural

COLUMN, GAP = 284.0, 20.0
_ROW, _LAYER_GAP, _PAD = 24.0, 6.0, 22.0
_HEAD = 112.0
_SPINE, _BOX, _LABEL = 40.0, 52.0, 144.0
_NARROWEST, _WIDEST, _BOX_HEIGHT = 46.0, 86.0, 16.0
_MARGINS = 80.0  # of a page around a picture, at most
_BRANCHES_PER_COLUMN, _MOST_COLUMNS = 12, 3
_TIP_CHARACTERS = 44


def branch_svg(rows: Sequence[BranchRow], measure: Measure, *, ident: str, shows_evidence: bool = False) -> str:
    """The picture of one component, to be set into a page.

    Args:
        ident: unique in the page.
        shows_evidence: the style sheet shows what lies behind a branch on hover and focus. Otherwise it does so only
            where scripts are off, since the script of the page shows `data-evidence`.
    """
    picture = _Picture(rows, measure, ident)
    return picture.markup(f"<style>{branch_style()}\n{picture.rules(shows_evidence=shows_evidence)}</style>\n")


def branches_svg(title: str, parts: Sequence[tuple[str, Sequence[BranchRow]]], measure: Measure) -> str:
    """All components below each other in one file."""
    nested, y, width = [], 34.0, 0.0
    for i, (component, rows) in enumerate(parts):
        picture = _Picture(rows, measure, f"vo-{i}")
        nested.append(f'<text class="title" x="14" y="{number(y + 18)}">{text(component)}</text>\n')
        nested.append(picture.markup("", at=(14.0, y + 28)))
        y += picture.height(picture.n_columns) + 44
        width = max(width, picture.width(picture.n_columns))
    size = f'width="{number(max(width + 28, 9.5 * len(title) + 28))}" height="{number(y)}"'
    shown = "svg.vo .branch:hover .tip,svg.vo .branch:focus .tip{display:block}svg.vo{overflow:visible}"
    return (
        f'<svg class="vo alone" xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{branch_style()}\n{shown}</style>\n'
        f'<text class="title" x="14" y="24">{text(title)}</text>\n{"".join(nested)}</svg>\n'
    )


def branch_style() -> str:
    return f"{asset('branches.css')}\n{colours_css('svg.vo')}"


class _Picture:
    """One component: columns of layers, their places for every number of columns in a row, and the markup."""

    def __init__(self, rows: Sequence[BranchRow], measure: Measure, ident: str) -> None:
        self.rows, self.measure, self.ident = rows, measure, ident
        self.most_macs = max((row.macs for row in rows), default=0)
        self.columns = _columns([list(layer) for _, layer in groupby(rows, key=lambda row: row.layer)])
        self.n_columns = len(self.columns)

    def width(self, per_row: int) -> float:
        return per_row * COLUMN + (per_row - 1) * GAP

    def height(self, per_row: int) -> float:
        heights = [_column_height(column) for column in self.columns]
        rows = [max(heights[i : i + per_row]) for i in range(0, len(heights), per_row)]
        return _HEAD + sum(rows) + GAP * (len(rows) - 1)

    def place(self, column: int, per_row: int) -> tuple[float, float]:
        heights = [_column_height(one) for one in self.columns]
        above = [max(heights[i : i + per_row]) + GAP for i in range(0, column - column % per_row, per_row)]
        return (column % per_row) * (COLUMN + GAP), _HEAD + sum(above)

    def markup(self, style: str, *, at: tuple[float, float] | None = None) -> str:
        wide = self.n_columns
        spot = f' x="{number(at[0])}" y="{number(at[1])}"' if at else ""
        size = f'width="{number(self.width(wide))}" height="{number(self.height(wide))}"'
        columns = "\n".join(self._column(i) for i in range(wide))
        named = f'id="{text(self.ident)}" class="vo" xmlns="http://www.w3.org/2000/svg"'
        return (
            f'<svg {named}{spot} {size} role="group" aria-label="{text(self._summary())}">\n'
            f"{style}{self._head()}\n{columns}\n</svg>\n"
        )

    def rules(self, *, shows_evidence: bool) -> str:
        """Where the columns go when there is less room, and when the style sheet shows the evidence."""
        own = f"svg#{self.ident}"
        shown = f"{own} .branch:hover .tip,{own} .branch:focus .tip{{display:block}}"
        rules = [shown if shows_evidence else f"@media (scripting:none){{{shown}}}"]
        rules.append(f"{own}{{{self._size(self.n_columns)}}}")
        for per_row in range(self.n_columns - 1, 0, -1):
            moved = "".join(
                f"{own} .c{i}{{transform:translate({number(x)}px,{number(y)}px)}}"
                for i in range(self.n_columns)
                for x, y in (self.place(i, per_row),)
            )
            limit = number(self.width(per_row + 1) + _MARGINS)
            rules.append(f"@media (max-width:{limit}px){{{own}{{{self._size(per_row)}}}{moved}}}")
        return "\n".join(rules)

    def _size(self, per_row: int) -> str:
        width, height = number(self.width(per_row)), number(self.height(per_row))
        return f"width:{width}px;height:{height}px;max-width:none;overflow:visible"

    def _summary(self) -> str:
        n_cut = sum(row.is_kept is False for row in self.rows)
        decided = any(row.is_kept is not None for row in self.rows)
        return plural(len(self.rows), "branch", "branches") + (
            f": {len(self.rows) - n_cut} kept, {n_cut} cut" if decided else ""
        )

    def _head(self) -> str:
        """Counts, the scale with its numbers, and what the shapes mean."""
        parts = [f'<text x="0" y="12">{text(self._summary())}</text>']
        parts.append(f'<text class="sub" x="0" y="30">{text(short(self.measure.title, 52))}</text>')
        for i in range(N_STEPS):
            fill = f'class="box s{i}" fill="{plain_colour(f"s{i}")}"'
            parts.append(f'<rect {fill} x="{number(1 + 24 * i)}" y="37" width="24" height="10"/>')
        for i in (0, 3, 6, 9):
            value = self.measure.text(self.measure.scale.bound(i))
            spot = f'x="{number(1 + 24 * i)}" y="60" text-anchor="{"middle" if i else "start"}"'
            parts.append(f'<text class="sub" {spot}>{"" if i or not self._has_negative() else "≤ "}{value}</text>')
        return "".join([*parts, self._key(70)])

    def _has_negative(self) -> bool:
        return any(row.score is not None and row.score < 0 for row in self.rows)

    def _key(self, y: float) -> str:
        parts, x = [], 0.0
        if any(row.is_kept is False for row in self.rows):
            parts.append(f'<g class="cut">{_cut_box(1, y, _NARROWEST)}</g>')
            parts.append(f'<text class="sub" x="56" y="{number(y + 12)}">solid: kept</text>')
            x = 122.0
        parts.append(f'<text class="sub" x="{number(x)}" y="{number(y + 12)}">wider: more MACs</text>')
        if self.measure.is_score and not all(is_known(row.score) for row in self.rows):
            parts.append(f'<text class="sub" x="0" y="{number(y + 30)}">grey: importance not measured</text>')
        return "".join(parts)

    def _column(self, index: int) -> str:
        x, y = self.place(index, self.n_columns)
        height = _column_height(self.columns[index])
        parts = [_end("in" if index == 0 else "…", 12.0)]
        spine = (
            f'<path class="spine" stroke="#667" d="M{number(_SPINE)} {number(_PAD - 4)}V{number(height - _PAD + 2)}"/>'
        )
        top, drawn = _PAD, []
        for layer in self.columns[index]:
            tall = _ROW * len(layer)
            plate = f'x="0" y="{number(top)}" width="{number(COLUMN)}" height="{number(tall)}"'
            parts.append(f'<rect class="layer" fill="#eee" {plate} rx="5"/>')
            if layer[0].layer is not None:
                spot = f'x="8" y="{number(top + tall / 2 + 4)}"'
                parts.append(f'<text class="sub" {spot}>{layer[0].layer}</text>')
            drawn += [(row, top + _ROW * i) for i, row in enumerate(layer)]
            top += tall + _LAYER_GAP
        parts.append(spine)
        parts += [self._branch(row, place, y) for row, place in drawn]
        parts.append(_end("out" if index == self.n_columns - 1 else "…", height - 8))
        return f'<g class="c{index}" transform="translate({number(x)} {number(y)})">\n' + "\n".join(parts) + "\n</g>"

    def _branch(self, row: BranchRow, top: float, column_top: float) -> str:
        evidence = self.measure.evidence(row)
        middle, fate = top + _ROW / 2, {True: " kept", False: " cut", None: ""}[row.is_kept]
        said, kind = text("\n".join(evidence)), text(short(kind_words(row.kind), 16))
        return (
            f'<g class="branch{fate}" tabindex="0" role="img" aria-label="{said}" data-branch="{text(row.name)}" '
            f'data-evidence="{said}"><title>{said}</title>'
            f'<rect class="hit" fill="none" {_rectangle(2, top + 1, COLUMN - 4, _ROW - 2)} rx="4"/>'
            f'<path class="stub" stroke="#667" d="M{number(_SPINE)} {number(middle)}H{number(_BOX)}"/>'
            f"{self._box(row, middle)}"
            f'<text class="kind" x="{number(_LABEL)}" y="{number(middle + 4)}">{kind}</text>'
            f'<text class="value" x="{number(COLUMN - 6)}" y="{number(middle + 4)}" text-anchor="end">'
            f"{self.measure.text(self.measure.value(row))}</text>{_tip(evidence, top, column_top)}</g>"
        )

    def _box(self, row: BranchRow, middle: float) -> str:
        width = _NARROWEST + (_WIDEST - _NARROWEST) * (row.macs / self.most_macs if self.most_macs else 0)
        top = middle - _BOX_HEIGHT / 2
        if row.is_kept is False:
            return _cut_box(_BOX, top, width)
        step = self.measure.scale.step(self.measure.value(row))
        joint = f'<circle class="joint" cx="{number(_SPINE)}" cy="{number(middle)}" r="4"/>'
        fill = f'class="box {step}" fill="{plain_colour(step)}" stroke="#667"'
        return f'{joint}<rect {fill} {_rectangle(_BOX, top, width, _BOX_HEIGHT)} rx="3"/>'


def _columns(layers: Sequence[Sequence[BranchRow]]) -> list[list[Sequence[BranchRow]]]:
    """Layers in columns of about equal length; a layer is never torn apart."""
    n_branches = sum(len(layer) for layer in layers)
    n_columns = min(_MOST_COLUMNS, max(1, -(-n_branches // _BRANCHES_PER_COLUMN)))
    columns: list[list[Sequence[BranchRow]]] = [[] for _ in range(n_columns)]
    before = 0
    for layer in layers:
        columns[min(before * n_columns // max(n_branches, 1), n_columns - 1)].append(layer)
        before += len(layer)
    return [column for column in columns if column] or [[]]


def _column_height(column: Sequence[Sequence[BranchRow]]) -> float:
    return 2 * _PAD + sum(_ROW * len(layer) + _LAYER_GAP for layer in column)


def _cut_box(x: float, y: float, width: float) -> str:
    """Hollow, dashed, a cross and the word: not by colour alone."""
    shape = f'{_rectangle(x, y, width, _BOX_HEIGHT)} rx="3"'
    box = f'<rect class="box" fill="none" stroke="#b3231b" stroke-dasharray="4 3" {shape}/>'
    left, right, top, bottom = (number(value) for value in (x + 7, x + 15, y + 4, y + 12))
    cross = f'<path class="cross" stroke="#b3231b" d="M{left} {top}L{right} {bottom}M{left} {bottom}L{right} {top}"/>'
    return f'{box}{cross}<text class="word" x="{number(x + 21)}" y="{number(y + 12)}">cut</text>'


def _end(word: str, y: float) -> str:
    return f'<text class="sub" x="{number(_SPINE)}" y="{number(y)}" text-anchor="middle">{word}</text>'


def _tip(evidence: Sequence[str], top: float, column_top: float) -> str:
    """Above its row, since what is drawn later lies over it; not above the picture."""
    wrapped = (textwrap.wrap(line, _TIP_CHARACTERS, max_lines=4, placeholder=" …") for line in evidence)
    lines = [part for parts in wrapped for part in parts]
    height = 15.0 * len(lines) + 10
    y = max(top - height - 2, 2 - column_top)
    shown = "".join(
        f'<text x="8" y="{number(y + 16 + 15 * i)}" font-size="11">{text(line)}</text>' for i, line in enumerate(lines)
    )
    plate = f'fill="#fff" stroke="#333" {_rectangle(0, y, COLUMN, height)} rx="5"'
    return f'<g class="tip" display="none" aria-hidden="true"><rect {plate}/>{shown}</g>'


def _rectangle(x: float, y: float, width: float, height: float) -> str:
    return f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
