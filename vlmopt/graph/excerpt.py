"""What an edit changed in a graph, and the part of a graph around some nodes as a component of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from vlmopt.core.program import Component, TensorSpec
from vlmopt.core.workload import Feed
from vlmopt.graph.modules import graph_module, placeholders
from vlmopt.graph.replay import run_node
from vlmopt.graph.sizes import size_text, symbols_of


@dataclass(frozen=True)
class Changes:
    """Names of nodes: gone, new, and those that stayed with other arguments."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    rewired: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.removed, *self.added, *self.rewired)


def changes_between(before: Component, after: Component) -> Changes:
    """What differs between two graphs, by the names of their nodes."""
    old, new = ({node.name: node for node in part.graph.graph.nodes} for part in (before, after))
    return Changes(
        tuple(name for name in old if name not in new),
        tuple(name for name in new if name not in old),
        tuple(name for name in new if name in old and _words(old[name]) != _words(new[name])),
    )


def _words(node: fx.Node) -> tuple[str, ...]:
    return (node.op, str(node.target), str(node.args), str(node.kwargs))  # nodes print as their names


def seeds(before: Component, after: Component) -> set[str]:
    """Nodes of `before` that an edit touched, or that the new nodes read."""
    changes = changes_between(before, after)
    known = {node.name for node in before.graph.graph.nodes if node.op != "output"}
    found = {*changes.removed, *changes.rewired}
    touched = {*changes.added, *changes.rewired}
    for part in (before, after):
        for node in part.graph.graph.nodes:
            if node.name in touched:
                found.update(operand.name for operand in node.all_input_nodes)
    return found & known


def grown(component: Component, names: Iterable[str], n_hops: int) -> set[str]:
    """The nodes with their neighbours, so many hops away, and all that lies between them."""
    region = set(names)
    nodes = [node for node in component.graph.graph.nodes if node.op != "output"]
    for _ in range(n_hops):
        around = [node for node in nodes if node.name in region]
        region.update(n.name for node in around for n in (*node.all_input_nodes, *node.users) if n.op != "output")
    behind: set[str] = set()
    for node in nodes:
        if node.name in region or any(operand.name in behind for operand in node.all_input_nodes):
            behind.add(node.name)
    before: set[str] = set()
    for node in reversed(nodes):
        if node.name in region or any(user.name in before for user in node.users):
            before.add(node.name)
    return behind & before


def excerpt(component: Component, names: Iterable[str]) -> Component | None:
    """These nodes as a component; values from outside become its inputs under their nodes' names.

    A value whose shape has no name (a product of dimensions, say) cannot be an input, so what makes it is taken in.
    None where nothing would be left to return.
    """
    known = _dim_names(component)
    region = _closed(component, set(names), known)
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs: list[TensorSpec] = []
    for node in component.graph.graph.nodes:
        is_inside = node.name in region and node.op != "placeholder"
        if node.op != "output" and not is_inside and any(user.name in region for user in node.users):
            made = graph.placeholder(node.name)
            made.meta = copy.copy(node.meta)
            mapping[node] = made
            inputs.append(_spec(node, node.name, known))
    for node in component.graph.graph.nodes:
        if node.name in region and node not in mapping and node.op not in ("placeholder", "output"):
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    returned = [node for node in mapping if mapping[node].op != "placeholder" and _is_returned(node, region)]
    if not returned or not inputs:
        return None
    graph.output(tuple(mapping[node] for node in returned))
    module = graph_module(component.graph, graph)
    return Component(component.name, module, tuple(inputs), tuple(_spec(node, node.name, known) for node in returned))


def input_values(component: Component, feed: Feed, names: Iterable[str]) -> Feed:
    """The values that these nodes have on one batch."""
    wanted, values = set(names), dict[fx.Node, object]()
    with torch.no_grad():
        for node in component.graph.graph.nodes:
            if node.op != "output":
                values[node] = run_node(component.graph, node, values, feed)
    found = {node.name: value for node, value in values.items() if node.name in wanted}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _closed(component: Component, region: set[str], known: Mapping[str, str]) -> set[str]:
    """The region with whatever cannot be its input or output: stored tensors, sizes, tuples and nameless shapes."""
    nodes = list(component.graph.graph.nodes)
    n_before = -1
    while n_before != len(region):
        n_before = len(region)
        for node in reversed(nodes):
            if node.op in ("placeholder", "output") or node.name in region:
                continue
            if any(user.name in region for user in node.users) and not _can_be_named(node, known):
                region.add(node.name)
        for node in nodes:
            reads_tuple = any(n.name in region and _is_tuple(n) for n in node.all_input_nodes)
            if reads_tuple and node.op != "output":
                region.add(node.name)
    return region


def _can_be_named(node: fx.Node, known: Mapping[str, str]) -> bool:
    value = node.meta.get("val")
    if node.op == "get_attr" or not isinstance(value, torch.Tensor):
        return False
    sizes: list[object] = list(value.shape)  # torch types them as plain numbers
    return all(isinstance(size, int) or str(size) in known for size in sizes)


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), list | tuple)


def _is_returned(node: fx.Node, region: set[str]) -> bool:
    is_read = any(user.op == "output" or user.name not in region for user in node.users)
    return is_read and node.op != "get_attr" and isinstance(node.meta.get("val"), torch.Tensor)


def _spec(node: fx.Node, name: str, known: Mapping[str, str]) -> TensorSpec:
    value = node.meta["val"]
    shape = tuple(size if isinstance(size, int) else size_text(size, known) for size in value.shape)
    return TensorSpec(name, shape, str(value.dtype).removeprefix("torch."))


def _dim_names(component: Component) -> dict[str, str]:
    """Symbols by the names of the dimensions that they stand for."""
    names: dict[str, str] = {}
    for spec, node in zip(component.inputs, placeholders(component.graph), strict=True):
        for wanted, actual in zip(spec.shape, node.meta["val"].shape, strict=True):
            if isinstance(wanted, str):
                names.update({symbol: names.get(symbol, wanted) for symbol in symbols_of(actual)})
    return names


def side_by_side(component: Component, nodes: Iterable[fx.Node], values: Feed) -> Component:
    """These nodes as a component in which none reads another: what they read of the graph are its inputs, of the shapes
    that these values have, under the names of the nodes that make them."""
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    own = list(nodes)
    read = list(dict.fromkeys(operand for node in own for operand in node.all_input_nodes))
    for operand in read:
        mapping[operand] = graph.placeholder(operand.name)
        mapping[operand].meta["val"] = values[operand.name]
    made = [graph.node_copy(node, lambda n: mapping[n]) for node in own]
    graph.output(tuple(made))
    inputs = tuple(_fixed(operand.name, values[operand.name]) for operand in read)
    module = graph_module(component.graph, graph)
    feed = {spec.name: values[spec.name] for spec in inputs}
    with torch.no_grad():
        found = module(*feed.values())
    outputs = tuple(_fixed(node.name, value) for node, value in zip(made, found, strict=True))
    return Component(component.name, module, inputs, outputs)


def _fixed(name: str, value: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
