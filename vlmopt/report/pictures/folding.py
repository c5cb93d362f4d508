"""A drawing with every module as one box, for an overview of a large graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vlmopt.core.drawing import Drawing, DrawnNode, Mark, NodeKind
from vlmopt.report.pictures.framing import MAX_SHARE, members_of


def folded(drawing: Drawing) -> Drawing:
    """The largest modules as one box each, as far as the graph stays free of circles; the rest as it is.

    Numbers that a module computes for others (sizes) have no line in the overview.
    """
    unit = _units(drawing)
    sizes = {node.key for node in drawing.nodes if node.kind is NodeKind.SIZE and unit[node.key] != node.key}
    order = _order(drawing, unit) or [node.key for node in drawing.nodes]
    members: dict[str, list[DrawnNode]] = {key: [] for key in order}
    for node in drawing.nodes:
        members[unit[node.key]].append(node)
    edges: dict[tuple[str, str], list[Mark]] = {}
    for source, target in drawing.edges:
        joined = (unit[source], unit[target])
        if joined[0] != joined[1] and source not in sizes:
            edges.setdefault(joined, []).append(drawing.edge_marks.get((source, target), Mark.PLAIN))
    return replace(
        drawing,
        nodes=tuple(_folded_node(key, inside, unit) for key, inside in members.items()),
        edges=tuple(edges),
        edge_marks={edge: marks[0] for edge, marks in edges.items() if len(set(marks)) == 1},
    )


def _units(drawing: Drawing) -> dict[str, str]:
    """For every node the box that shows it: itself, or the module whose nodes are drawn as one."""
    unit = {node.key: node.key for node in drawing.nodes}
    members = members_of(drawing)
    done: list[str] = []
    for group in sorted(members, key=lambda group: (group.count("."), group)):
        is_inside = any(group.startswith(f"{outer}.") for outer in done)
        if is_inside or not 2 <= len(members[group]) <= MAX_SHARE * len(drawing.nodes) or _holds_layers(group, members):
            continue
        tried = dict(unit)
        tried.update((drawing.nodes[i].key, f"module {group}") for i in members[group])
        if _order(drawing, tried) is not None:
            unit = tried
            done.append(group)
    return unit


def _holds_layers(group: str, members: Mapping[str, Sequence[int]]) -> bool:
    """Whether its parts are numbered: a list of layers is not shown as one box."""
    return any(other.startswith(f"{group}.") and other.rpartition(".")[2].isdigit() for other in members)


def _order(drawing: Drawing, unit: Mapping[str, str]) -> list[str] | None:
    """The boxes in topological order, in the order of the drawing where it is free; None where they form a circle."""
    readers: dict[str, set[str]] = {unit[node.key]: set() for node in drawing.nodes}
    for source, target in drawing.edges:
        if unit[source] != unit[target]:
            readers[unit[source]].add(unit[target])
    n_open = Counter(target for targets in readers.values() for target in targets)
    ready = [key for key in reversed(readers) if not n_open[key]]
    rank = {key: i for i, key in enumerate(readers)}
    order = []
    while ready:
        key = ready.pop()
        order.append(key)
        for reader in sorted(readers[key], key=rank.__getitem__, reverse=True):
            n_open[reader] -= 1
            if not n_open[reader]:
                ready.append(reader)
    return order if len(order) == len(readers) else None


def _folded_node(key: str, inside: Sequence[DrawnNode], unit: Mapping[str, str]) -> DrawnNode:
    if len(inside) == 1 and inside[0].key == key:
        follows = unit.get(inside[0].follows, "")
        return replace(inside[0], follows=follows)
    group = key.removeprefix("module ")
    marks = Counter(node.mark for node in inside)
    counts = [f"{n} {mark.value}" for mark, n in marks.items() if mark is not Mark.PLAIN]
    said = ", ".join([f"{len(inside)} operations", *counts])
    mark = inside[0].mark if len(marks) == 1 else Mark.CHANGED
    parent, _, name = group.rpartition(".")
    shown = f"{parent.rpartition('.')[2]}.{name}" if name.isdigit() else name
    shape = next((line for line in inside[-1].label.split("\n")[1:]), "")
    label = f"{shown} ({len(inside)})\n{', '.join(counts) or shape}"
    follows = next((unit[node.follows] for node in inside if unit.get(node.follows, key) != key), "")
    return DrawnNode(
        key, label, parent, (group, said, *_kinds(inside), "double-click opens it"), mark, NodeKind.GROUP, follows
    )


def _kinds(inside: Iterable[DrawnNode]) -> list[str]:
    """What is in a module, by the first words of its boxes."""
    words = Counter(node.label.split()[0] for node in inside if node.label.strip())
    return [f"{n} {word}" for word, n in words.most_common(8)]
