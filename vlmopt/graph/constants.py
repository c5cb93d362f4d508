"""Finds and folds what a graph computes from constants alone."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vlmopt.graph.canonical import writes
from vlmopt.graph.modules import free_path, set_at
from vlmopt.graph.replay import run_node

aten = torch.ops.aten

_UNDEFINED = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::empty_permuted"}


def constant_frontier(module: fx.GraphModule) -> list[fx.Node]:
    """Nodes that depend on no input and are read by one that does (or returned): each can become one stored tensor."""
    constant = constant_nodes(module)
    frontier = []
    for node in module.graph.nodes:
        if node not in constant or node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if any(user not in constant for user in node.users):
            frontier.append(node)
    return frontier


def constant_nodes(module: fx.GraphModule) -> frozenset[fx.Node]:
    """Nodes that depend on no input, stored tensors among them."""
    constant: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" or (_is_pure(node) and all(operand in constant for operand in node.all_input_nodes)):
            constant.add(node)
    return frozenset(constant)


def _is_pure(node: fx.Node) -> bool:
    """Whether the node gives the same value in every call, and does nothing else."""
    if node.op == "call_module":
        return True
    if node.op != "call_function" or writes(node):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return not _is_random(node, node.target) and node.target._schema.name not in _UNDEFINED


def _is_random(node: fx.Node, operation: torch._ops.OpOverload) -> bool:
    """Whether a random number enters; operations that can drop out, but are told not to, are not random."""
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return False
    given = dict(zip((argument.name for argument in operation._schema.arguments), node.args, strict=False))
    given |= node.kwargs
    if "train" in given:
        return given["train"] is not False
    return bool(operation is not aten.scaled_dot_product_attention.default or given.get("dropout_p", 0.0) != 0.0)


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
