"""How far every branch of an edited graph is off when it reads what it reads in the original."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from vlmopt.core.program import Component
from vlmopt.core.workload import Feed
from vlmopt.graph.branches import find_branches
from vlmopt.graph.replay import run_node


def branch_errors(component: Component, edited: Component, feeds: Sequence[tuple[Feed, Feed]]) -> dict[str, float]:
    """Mean square error of every branch's term, relative to the term's own mean square, by the branch's name.

    The edited graph's stream is put back to the original's in front of every branch, so that each answers for itself
    alone. Branches that the edited graph has no more are left out.

    Args:
        edited: the same component behind edits that leave its branches in their places.
        feeds: batches of its inputs, each as both read it: the cache of an edited decoder may have fewer heads.
    """
    wanted, found = (
        {branch.name: (branch.stream, branch.term) for branch in find_branches(one.graph)}
        for one in (component, edited)
    )
    missed, sizes = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
    for feed, edited_feed in feeds:
        nodes = {node for pair in wanted.values() for node in pair}
        values = _values(component.graph, feed, nodes, {})
        given = {found[name][0]: values[stream] for name, (stream, _) in wanted.items() if name in found}
        terms = _values(edited.graph, edited_feed, {term for _, term in found.values()}, given)
        for name in found.keys() & wanted.keys():
            own, other = values[wanted[name][1]], terms[found[name][1]]
            if own.shape == other.shape:
                missed[name] += float((other.double() - own.double()).square().sum())
                sizes[name] += float(own.double().square().sum())
    return {name: missed[name] / sizes[name] for name in found.keys() & wanted.keys() if sizes[name] > 0}


def _values(
    graph: fx.GraphModule, feed: Feed, wanted: set[fx.Node], given: dict[fx.Node, Tensor]
) -> dict[fx.Node, Tensor]:
    """The tensors of the wanted nodes, where those given take the place of what is computed."""
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    last = {operand: node for node in nodes for operand in node.all_input_nodes}
    values: dict[fx.Node, object] = {}
    kept: dict[fx.Node, Tensor] = {}
    with torch.no_grad():
        for node in nodes:
            values[node] = given[node] if node in given else run_node(graph, node, values, feed)
            value = values[node]
            if node in wanted and isinstance(value, Tensor):
                kept[node] = value
            for operand in node.all_input_nodes:
                if last[operand] is node:
                    values.pop(operand, None)
    return kept
