"""Finds and folds what a graph computes from constants alone."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vlmopt.graph.modules import free_path, set_at
from vlmopt.graph.replay import run_node

_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal")


def constant_frontier(module: fx.GraphModule) -> list[fx.Node]:
    """Nodes that depend on no input and are read by a node that does (or returned): each can become one stored tensor."""
    constant: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" or (_is_pure(node) and all(operand in constant for operand in node.all_input_nodes)):
            constant.add(node)
    frontier = []
    for node in module.graph.nodes:
        if node not in constant or node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if any(user not in constant for user in node.users):
            frontier.append(node)
    return frontier


def _is_pure(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_module"):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return False
    return not any(word in str(node.target) for word in _RANDOM) if node.op == "call_function" else True


def evaluate_constant(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a node that depends on no input."""
    values: dict[fx.Node, object] = {}
    needed: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in needed:
            needed.add(current)
            pending.extend(current.all_input_nodes)
    with torch.no_grad():
        for current in module.graph.nodes:
            if current in needed:
                values[current] = run_node(module, current, values, {})
    result = values[node]
    assert isinstance(result, Tensor)
    return result.clone(memory_format=torch.contiguous_format)


def store_constant(module: fx.GraphModule, node: fx.Node, value: Tensor, path: str) -> fx.Node:
    """Replaces `node` by a stored tensor; returns the node that reads it. Dead code is left to the caller."""
    free = free_path(module, path)
    set_at(module, free, value)
    with module.graph.inserting_before(node):
        made = module.graph.create_node("get_attr", free)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    return made


def constant_region(node: fx.Node) -> list[fx.Node]:
    """The nodes that die when `node`, which depends on no input, is stored."""
    region: set[fx.Node] = set()
    pending, above = [node], set[fx.Node]()
    while pending:
        current = pending.pop()
        if current not in above:
            above.add(current)
            pending.extend(current.all_input_nodes)
    for current in reversed(node.graph.nodes):
        if current in above and (current is node or set(current.users) <= region):
            region.add(current)
    return [current for current in node.graph.nodes if current in region]
