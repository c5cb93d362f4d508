"""Two versions of a component that begin alike: what both compute is computed once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from vlmopt.core.program import Component
from vlmopt.core.workload import Feed
from vlmopt.graph.modules import get_at
from vlmopt.graph.replay import Replay


def same_values(first: fx.GraphModule, second: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """For every node of the second graph that computes what one of the first does, that one.

    Modules and tensors are the same where they are the same object, as they are in a graph and its clones.
    """
    known = {_value(first, node, {n: n for n in node.all_input_nodes}): node for node in first.graph.nodes}
    same: dict[fx.Node, fx.Node] = {}
    for node in second.graph.nodes:
        if node.op != "output" and all(operand in same for operand in node.all_input_nodes):
            twin = known.get(_value(second, node, same))
            if twin is not None:
                same[node] = twin
    return same


def _value(module: fx.GraphModule, node: fx.Node, names: dict[fx.Node, fx.Node]) -> tuple[object, ...]:
    """What the node computes: its operation, and its arguments with `names` for its operands."""
    target: object = node.target
    if node.op in ("call_module", "get_attr"):
        target = id(get_at(module, str(node.target)))
    args, kwargs = (fx.node.map_arg(part, lambda n: names[n]) for part in (node.args, node.kwargs))
    return node.op, target, repr(args), repr(kwargs)


def run_both(
    first: Component, second: Component, feeds: Iterable[Feed], targets: tuple[fx.Node, fx.Node]
) -> tuple[Tensor, Tensor]:
    """The value of the target of either version over all batches, concatenated on the CPU, [n, ...]."""
    one, other = Replay(first, [], targets[0]), Replay(second, [], targets[1])
    computed = set(one.needed())
    same = {node: twin for node, twin in same_values(first.graph, second.graph).items() if twin in computed}
    read = {operand for node in other.needed(same) for operand in node.all_input_nodes} | {targets[1]}
    start = {node: same[node] for node in read if node in same}
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for feed in feeds:
        value, values = one.run_keeping(feed, set(start.values()))
        found[0].append(value)
        found[1].append(other.run_from(feed, {node: values[twin] for node, twin in start.items()}))
    return torch.cat(found[0]), torch.cat(found[1])
