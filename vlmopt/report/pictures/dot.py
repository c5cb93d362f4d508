"""Drawings as text for Graphviz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vlmopt.core.drawing import Drawing, DrawnNode, Mark, NodeKind

_FILLS = {
    NodeKind.MODULE: "#e3eefc",
    NodeKind.GROUP: "#e3eefc",
    NodeKind.TENSOR: "#eceff3",
    NodeKind.SIZE: "#eceff3",
    NodeKind.SUM: "#fff3d6",
    NodeKind.INPUT: "#e6f3e9",
    NodeKind.OUTPUT: "#e6f3e9",
}
_STROKES = {
    Mark.ADDED: ("#17693a", "bold"),
    Mark.REMOVED: ("#b3231b", "dashed"),
    Mark.CHANGED: ("#7a3fb0", "bold"),
    Mark.REFUSED: ("#7f4f00", "dotted"),
    Mark.SITE: ("#0b6b8a", "bold"),
}


@dataclass
class _Module:
    """A module path with its own nodes and its parts."""

    nodes: list[DrawnNode] = field(default_factory=list)
    parts: dict[str, _Module] = field(default_factory=dict)


def drawing_dot(drawing: Drawing) -> str:
    """One directed graph, modules as clusters."""
    return drawings_dot(drawing.title, [drawing])


def drawings_dot(title: str, drawings: Sequence[Drawing]) -> str:
    """Several drawings as one directed graph; of more than one, each is a cluster."""
    lines = [f"digraph {quoted(title)} {{", '  graph [rankdir=TB, labelloc=t, fontname="monospace"]']
    notes = [drawing.note for drawing in drawings if drawing.note]
    lines.append(f"  label={quoted(chr(10).join([title, *notes]) if len(drawings) == 1 else title)}")
    lines.append('  node [shape=box, style="filled", fillcolor="#ffffff", fontname="monospace", fontsize=10]')
    lines.append('  edge [color="#555555", arrowsize=0.6]')
    for i, drawing in enumerate(drawings):
        prefix = f"{drawing.title}/" if len(drawings) > 1 else ""
        lines += _graph(drawing, prefix, number=i, is_one_of_several=len(drawings) > 1)
    return "\n".join([*lines, "}"]) + "\n"


def _graph(drawing: Drawing, prefix: str, *, number: int, is_one_of_several: bool) -> list[str]:
    root = _Module()
    for node in drawing.nodes:
        place = root
        for part in node.group.split(".") if node.group else []:
            place = place.parts.setdefault(part, _Module())
        place.nodes.append(node)
    body = _module(root, prefix, f"{number}", indent="  ")
    if is_one_of_several:
        label = drawing.title + (f"\n{drawing.note}" if drawing.note else "")
        body = [f"  subgraph {quoted(f'cluster_{number}')} {{", f"    label={quoted(label)}", *body, "  }"]
    return [*body, *(_edge(drawing, edge, prefix) for edge in drawing.edges)]


def _module(module: _Module, prefix: str, path: str, *, indent: str) -> list[str]:
    lines = [indent + _node(node, prefix) for node in module.nodes]
    for name, part in module.parts.items():
        lines.append(f"{indent}subgraph {quoted(f'cluster_{path}.{name}')} {{")
        lines.append(f'{indent}  label={quoted(name)}; color="#c3cbd6"')
        lines += _module(part, prefix, f"{path}.{name}", indent=f"{indent}  ")
        lines.append(f"{indent}}}")
    return lines


def _node(node: DrawnNode, prefix: str) -> str:
    attributes = {"label": node.label or node.key, "tooltip": "\n".join(node.detail) or node.key}
    if node.kind in _FILLS:
        attributes["fillcolor"] = _FILLS[node.kind]
    if node.mark in _STROKES:
        colour, stroke = _STROKES[node.mark]
        attributes |= {"color": colour, "style": f"filled,{stroke}", "class": node.mark.value, "penwidth": "2"}
        attributes["label"] += f"\n[{node.mark.value}]"
    return f"{quoted(prefix + node.key)} [{', '.join(f'{key}={quoted(text)}' for key, text in attributes.items())}]"


def _edge(drawing: Drawing, edge: tuple[str, str], prefix: str) -> str:
    colour, stroke = _STROKES.get(drawing.edge_marks.get(edge, Mark.PLAIN), ("", ""))
    attributes = f' [color="{colour}", style="{stroke}"]' if colour else ""
    return f"  {quoted(prefix + edge[0])} -> {quoted(prefix + edge[1])}{attributes}"


def quoted(text: str) -> str:
    """A quoted string of the language that shows the text as it is: entities, backslashes and line breaks too."""
    shown = "".join(character for character in text if character == "\n" or character.isprintable())
    escaped = shown.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
