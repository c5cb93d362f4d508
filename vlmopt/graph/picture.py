"""Components as drawings: one box a node, and what an edit added, removed and changed."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from vlmopt.core.drawing import Drawing, DrawnNode, Mark, NodeKind
from vlmopt.core.program import Component, Dim
from vlmopt.graph.branches import Branch, find_branches
from vlmopt.graph.costing import VIEWS, node_macs, weights_of
from vlmopt.graph.sizes import Sizes, counting_sizes, tensor_of
from vlmopt.graph.text import component_text

_LONGEST_DETAIL = 300  # characters; constants may be whole lists
_SECOND_CALL = re.compile(r"@\d+$")  # torch marks the second call of a module so
_NAMELESS = "_empty_nn_module_stack"
_READ = re.compile(r"%\d+")
Edge = tuple[str, str]


def node_drawing(
    component: Component,
    dims: Mapping[str, Dim],
    *,
    marks: Mapping[str, Mark] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Drawing:
    """One box for every node of the component's graph.

    Args:
        marks: by name of node.
        notes: by name of node, a line to be shown with it.
    """
    facts = _Facts.of(component, dims)
    drawn = tuple(
        replace(node, mark=(marks or {}).get(node.key, Mark.PLAIN), detail=(*node.detail, *_note(notes, node.key)))
        for node in map(facts.drawn, component.graph.graph.nodes)
    )
    return Drawing(component.name, drawn, tuple(_edges(component)), note=_n_operations(component))


def difference_drawing(
    before: Component, after: Component, dims: Mapping[str, Dim], *, refused: Mapping[str, str] | None = None
) -> Drawing:
    """Both graphs in one picture, nodes matched by name: what is new, what is gone, what changed.

    Args:
        refused: by name of node, why a pass left it alone.
    """
    old, new = node_drawing(before, dims), node_drawing(after, dims)
    old_nodes, new_nodes = ({node.key: node for node in drawing.nodes} for drawing in (old, new))
    merged: dict[str, DrawnNode] = {}
    for key, node in {**old_nodes, **new_nodes}.items():
        marked = _compared(old_nodes.get(key), new_nodes.get(key), node)
        reason = (refused or {}).get(key)
        if reason is not None:
            mark = Mark.REFUSED if marked.mark is Mark.PLAIN else marked.mark
            marked = replace(marked, mark=mark, detail=(*marked.detail, f"refused: {reason}"))
        merged[key] = marked
    kept_edges, gone_edges = dict.fromkeys(new.edges), [edge for edge in old.edges if edge not in set(new.edges)]
    order, edges = _joint_order([*old_nodes, *new_nodes], kept_edges, gone_edges)
    edge_marks = {edge: Mark.REMOVED for edge in edges if edge not in kept_edges}
    edge_marks |= {edge: Mark.ADDED for edge in kept_edges if edge not in set(old.edges)}
    counts = [f"{n} {mark.value}" for mark in Mark if (n := sum(node.mark is mark for node in merged.values()))]
    note = ", ".join(text for text in counts if not text.endswith(f" {Mark.PLAIN.value}")) or "unchanged"
    return Drawing(after.name, tuple(merged[key] for key in order), edges, note, edge_marks)


def _compared(old: DrawnNode | None, new: DrawnNode | None, node: DrawnNode) -> DrawnNode:
    if old is None:
        return replace(node, mark=Mark.ADDED)
    if new is None:
        return replace(node, mark=Mark.REMOVED)
    if (old.label, old.detail) == (new.label, new.detail):
        return node
    lost = [f"before: {line}" for line in old.detail if line not in new.detail]
    return replace(node, mark=Mark.CHANGED, detail=(*node.detail, *lost))


def _joint_order(
    keys: Iterable[str], kept: Mapping[Edge, None], gone: Iterable[Edge]
) -> tuple[list[str], tuple[Edge, ...]]:
    """An order that runs along the edges of both graphs, and those edges; where the two contradict each other, the
    later graph decides and the edges of the earlier one that run against it are left out."""
    ranks = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    edges = [*kept, *gone]
    order = _sorted(ranks, edges)
    if len(order) < len(ranks):
        first = {key: i for i, key in enumerate(_sorted(ranks, kept))}
        edges = [*kept, *(edge for edge in edges if edge not in kept and first[edge[0]] < first[edge[1]])]
        order = list(first)
    return order, tuple(edges)


def _sorted(ranks: Mapping[str, int], edges: Iterable[Edge]) -> list[str]:
    """Topological order, by rank where it is free; shorter than the ranks where the edges run in a circle."""
    readers: dict[str, list[str]] = {key: [] for key in ranks}
    n_open = dict.fromkeys(ranks, 0)
    for source, target in edges:
        readers[source].append(target)
        n_open[target] += 1
    ready = [(rank, key) for key, rank in ranks.items() if not n_open[key]]
    heapq.heapify(ready)
    order: list[str] = []
    while ready:
        _, key = heapq.heappop(ready)
        order.append(key)
        for reader in readers[key]:
            n_open[reader] -= 1
            if not n_open[reader]:
                heapq.heappush(ready, (ranks[reader], reader))
    return order


@dataclass(frozen=True)
class _Facts:
    """What is known of a component's nodes before they are drawn."""

    component: Component
    sizes: Sizes
    lines: Mapping[fx.Node, str]  # the canonical text, which knows the names of dimensions
    groups: Mapping[fx.Node, str]
    streams: Mapping[fx.Node, fx.Node]  # a sum with branches -> the stream it continues

    @classmethod
    def of(cls, component: Component, dims: Mapping[str, Dim]) -> _Facts:
        nodes = list(component.graph.graph.nodes)
        lines = dict(zip(nodes, component_text(component).splitlines()[1:], strict=True))
        streams = {_sum_of(branch): branch.stream for branch in find_branches(component.graph)}
        return cls(component, counting_sizes(component, dims), lines, _groups(component.graph), streams)

    def drawn(self, node: fx.Node) -> DrawnNode:
        if node.op == "output":
            names = ", ".join(spec.name for spec in self.component.outputs)
            return DrawnNode(
                node.name, f"output\n{_short(names, 32)}", kind=NodeKind.OUTPUT, detail=(f"output {names}",)
            )
        kind, _, call = self.lines[node].partition(": ")[2].partition(" = ")
        stream = self.streams.get(node)
        return DrawnNode(
            node.name,
            f"{_label(node, call)}\n{kind}",
            group=self.groups[node],
            detail=tuple(_short(line, _LONGEST_DETAIL) for line in self._detail(node, kind, call)),
            kind=self._kind(node),
            follows="" if stream is None or stream not in node.all_input_nodes else stream.name,
        )

    def _detail(self, node: fx.Node, kind: str, call: str) -> list[str]:
        lines = [node.name, _READ.sub("·", call), kind]
        parameters = sum(tensor.numel() for tensor in weights_of(self.component.graph, node))
        macs = node_macs(self.component.graph, node, self.sizes)
        lines += [f"{parameters:,} parameters"] if parameters else []
        lines += [f"{macs:,} MACs for one sample"] if macs else []
        if "made_by" in node.meta:
            step, name = node.meta["made_by"]
            lines.append(f"made by step {step} {name}")
        return lines

    def _kind(self, node: fx.Node) -> NodeKind:
        if node in self.streams:
            return NodeKind.SUM
        if node.op == "placeholder":
            return NodeKind.INPUT
        if node.op == "get_attr":
            return NodeKind.TENSOR
        if node.op == "call_module":
            return NodeKind.MODULE
        if tensor_of(node) is None:
            return NodeKind.SIZE
        return NodeKind.VIEW if node.target in VIEWS else NodeKind.OPERATION


def _sum_of(branch: Branch) -> fx.Node:
    """Where the branch joins the stream: its exit, or in front of it where that is the norm of the sum."""
    near = (branch.exit, *branch.exit.all_input_nodes)
    return next((node for node in near if branch.stream in node.all_input_nodes), branch.exit)


def _label(node: fx.Node, call: str) -> str:
    """`linear fc1`, `add`, `input pixel_values`."""
    words = call.partition(" (")[0].split()
    operation = words[0].split(".")[0].strip("_") if node.op == "call_function" else words[0]
    operation = {"scaled_dot_product_attention": "attention"}.get(operation, operation)
    own = words[-1].rsplit(".", 1)[-1] if len(words) > 1 else ""
    return _short(f"{operation} {own}".strip(), 32)


def _edges(component: Component) -> Iterable[Edge]:
    for node in component.graph.graph.nodes:
        for operand in node.all_input_nodes:
            yield operand.name, node.name


def _groups(module: fx.GraphModule) -> dict[fx.Node, str]:
    """The module path that every node belongs to; a node without one belongs where it is read."""
    prefix = _prefix(module)
    groups: dict[fx.Node, str | None] = {}
    for node in module.graph.nodes:
        path = _module_path(node)
        if node.op in ("call_module", "get_attr"):
            groups[node] = str(node.target).rpartition(".")[0]
        elif node.op in ("placeholder", "output"):
            groups[node] = ""
        else:
            groups[node] = None if path is None else f"{path}.".removeprefix(prefix).removesuffix(".")
    for node in reversed(module.graph.nodes):
        if groups[node] is None:
            near = [group for user in (*node.users, *node.all_input_nodes) if (group := groups[user]) is not None]
            groups[node] = near[0] if near else ""
    return {node: group or "" for node, group in groups.items()}


def _prefix(module: fx.GraphModule) -> str:
    """What the capture put in front of the model's own paths, with its dot: leaves are called by their own paths."""
    for node in module.graph.nodes:
        path = _module_path(node) or ""
        if node.op == "call_module" and path.endswith(f".{node.target}"):
            return path.removesuffix(str(node.target))
    return ""


def _module_path(node: fx.Node) -> str | None:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = _SECOND_CALL.sub("", str(stack[-1][0])) if stack else _NAMELESS
    return None if path.startswith(_NAMELESS) else path


def _note(notes: Mapping[str, str] | None, key: str) -> tuple[str, ...]:
    return (notes[key],) if notes and key in notes else ()


def _n_operations(component: Component) -> str:
    n = sum(node.op in ("call_module", "call_function") for node in component.graph.graph.nodes)
    return f"{n} operations"


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
