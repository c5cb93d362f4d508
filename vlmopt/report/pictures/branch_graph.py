"""Branches as a drawing, for Graphviz: the stream passes a sum for every branch, which lies beside it."""

from __future__ import annotations

from collections.abc import Sequence

from vlmopt.core.drawing import Drawing, DrawnNode, Mark, NodeKind
from vlmopt.report.naming import kind_words
from vlmopt.report.pictures.branch_rows import BranchRow, Measure


def branch_drawing(component: str, rows: Sequence[BranchRow], measure: Measure) -> Drawing:
    """Input, branches with their sums in order, output; boxes of a layer are a group."""
    nodes = [DrawnNode("stream in", "in", kind=NodeKind.INPUT)]
    edges: list[tuple[str, str]] = []
    for row in rows:
        before, total = nodes[-1].key, f"{row.name} +"
        label = f"{kind_words(row.kind)} {measure.text(measure.value(row))}\n{row.name}"
        mark = Mark.REMOVED if row.is_kept is False else Mark.PLAIN
        group = "" if row.layer is None else f"layer {row.layer}"
        detail = tuple(measure.evidence(row))
        nodes.append(DrawnNode(row.name, label, group, detail, mark, NodeKind.MODULE))
        nodes.append(DrawnNode(total, "+", group, kind=NodeKind.SUM, follows=before))
        edges += [(before, row.name), (before, total), (row.name, total)]
    edges.append((nodes[-1].key, "stream out"))
    nodes.append(DrawnNode("stream out", "out", kind=NodeKind.OUTPUT))
    return Drawing(component, tuple(nodes), tuple(edges), measure.title)
