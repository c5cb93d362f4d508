"""The branches of a model as pictures: for the report, and for a model that is only looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmopt.report.naming import by_component
from vlmopt.report.pictures.branch_graph import branch_drawing
from vlmopt.report.pictures.branch_rows import LOSS, BranchRow, Measure
from vlmopt.report.pictures.branches import branch_svg, branches_svg
from vlmopt.report.pictures.dot import drawings_dot
from vlmopt.report.pictures.page import branches_page
from vlmopt.report.schema import BranchSection, Report

__all__ = ["BranchPicture", "BranchRow", "branch_file", "branch_pictures"]

_NOT_NAME = re.compile(r"[^A-Za-z0-9_-]")
Parts = Mapping[str, Sequence[BranchRow]]


@dataclass(frozen=True)
class BranchPicture:
    """The picture of one component, to be set into a page."""

    component: str
    svg: str


def branch_pictures(report: Report) -> list[BranchPicture]:
    """Every component that had branches, coloured by importance on one scale, cut branches marked."""
    parts = {name: [_row(branch) for branch in rows] for name, rows in by_component(report.branches).items()}
    return _pictures(parts, Measure.of(_all(parts)), shows_evidence=False)


def branch_file(title: str, parts: Parts, *, form: str, unit: str = "") -> str:
    """All components as the text of one file.

    Args:
        form: html, svg or dot.
        unit: what the scores of a profile measure, where the rows have scores.
    """
    measure = Measure.of(_all(parts), title=LOSS if unit in ("", "loss") else f"importance: {unit}")
    if form == "svg":
        return branches_svg(title, list(parts.items()), measure)
    if form == "dot":
        return drawings_dot(title, [branch_drawing(name, rows, measure) for name, rows in parts.items()])
    pictures = _pictures(parts, measure, shows_evidence=True)
    return branches_page(title, [(picture.component, picture.svg) for picture in pictures])


def _pictures(parts: Parts, measure: Measure, *, shows_evidence: bool) -> list[BranchPicture]:
    return [
        BranchPicture(name, branch_svg(rows, measure, ident=_ident(i, name), shows_evidence=shows_evidence))
        for i, (name, rows) in enumerate(parts.items())
    ]


def _ident(number: int, name: str) -> str:
    return f"vo-{number}-{_NOT_NAME.sub('', name)}"


def _all(parts: Parts) -> list[BranchRow]:
    return [row for rows in parts.values() for row in rows]


def _row(branch: BranchSection) -> BranchRow:
    fate = branch.reason if branch.kept else f"by step {branch.cut_by}" if branch.cut_by else ""
    if branch.certainty is not None:
        fate += f"{', ' if fate else ''}{branch.certainty}"
    cost = (branch.params, branch.macs)
    return BranchRow(branch.name, branch.kind, branch.layer, *cost, branch.score, branch.stderr, branch.kept, fate)
