"""Edits of regions: leaving a branch out of its sum, cloning a region, splicing a value in."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn

from vlmopt.core.program import PRESENT, Component
from vlmopt.graph.branches import Branch, nodes_between
from vlmopt.graph.marks import Mark, joined, marks_of, set_marks
from vlmopt.graph.modules import get_at, output_values

aten = torch.ops.aten


def skip_branch(module: fx.GraphModule, branch: Branch) -> list[fx.Node]:
    """Takes the branch's term out of its sum; returns the nodes that were made. Dead code is left to the caller.

    Before: `y = x + f(x)`; after: `y` is `x`. With other terms left, `y` is their sum. The value that takes the place
    of `y` is marked with the branch (`marks.py`).
    """
    marks = marks_of(branch.exit)
    kept = [term for term in branch.terms if term is not branch.term]
    made: list[fx.Node] = []
    value = kept[0]
    for term in kept[1:]:
        with module.graph.inserting_before(branch.exit):
            value = module.graph.call_function(aten.add.Tensor, (value, term))
        value.meta = copy.copy(branch.exit.meta)
        set_marks(value, ())
        made.append(value)
    mark = Mark(branch.name, branch.layer_name, branch.kind.value, is_beside=bool(made))
    set_marks(value, joined(marks_of(value), mark, marks))
    set_marks(branch.exit, ())
    branch.exit.replace_all_uses_with(value)
    return made


def clone_region(
    module: fx.GraphModule, region: Iterable[fx.Node], substitute: Mapping[fx.Node, fx.Node], *, before: fx.Node
) -> dict[fx.Node, fx.Node]:
    """Copies the region's nodes, which are in graph order, in front of `before`; leaf modules are shared.

    Args:
        substitute: what the copies read in place of a node outside the region.

    Returns:
        For every node of the region its copy.
    """
    copies: dict[fx.Node, fx.Node] = {}
    with module.graph.inserting_before(before):
        for node in region:
            made = module.graph.node_copy(node, lambda n: copies.get(n, substitute.get(n, n)))
            copies[node] = made
    return copies


def splice(node: fx.Node, value: fx.Node, *, readers: Iterable[fx.Node] | None = None) -> None:
    """Lets the readers of `node` (all of them by default) read `value`."""
    for reader in list(node.users) if readers is None else list(readers):
        if reader is not value:
            reader.replace_input_with(node, value)


def is_read_behind(component: Component, branch: Branch) -> bool:
    """Whether a value computed inside the branch (attention weights, say) reaches an output beside its sum, so that a
    skip would drop it or leave its computation behind.

    What parallel branches share (a norm) ends in their common sum and counts for none of them, and what the branch
    alone keeps for the next step goes with it (`skipping.py`).
    """
    module, kept = component.graph, kept_outputs(component, branch)
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    read = [node for i, node in enumerate(output_values(module)) if i not in kept]
    total = branch.exit.all_input_nodes[0] if branch.is_post_norm else branch.exit
    pending = list(nodes_between(branch.stream, branch.term, order))
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node is total or node in seen:
            continue
        if node in read:
            return True
        seen.add(node)
        pending.extend(node.users)
    return False


def kept_outputs(component: Component, branch: Branch) -> list[int]:
    """The places among the component's outputs of the keys and values that the branch keeps for the next step."""
    region = set(branch.region)
    pairs = enumerate(zip(output_values(component.graph), component.outputs, strict=True))
    return [place for place, (node, spec) in pairs if spec.name.startswith(PRESENT) and node in region]


def entry_linears(module: fx.GraphModule, branch: Branch) -> tuple[fx.Node, ...]:
    """The Linears that the branch begins with, those that no other of its Linears comes before, in graph order."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    entries: list[fx.Node] = []
    behind: set[fx.Node] = set()
    for node in nodes_between(branch.stream, branch.term, order):
        if any(operand in behind for operand in node.all_input_nodes):
            behind.add(node)
        elif is_linear_call(module, node):
            entries.append(node)
            behind.add(node)
    return tuple(entries)


def is_linear_call(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node calls an `nn.Linear`."""
    return node.op == "call_module" and type(get_at(module, str(node.target))) is nn.Linear
