"""Inserts new nodes that carry fresh shape metadata, as every later stage expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from vlmopt.graph.marks import hand_marks_on
from vlmopt.graph.modules import free_path, set_at


def insert_call(
    module: fx.GraphModule, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """A `call_function` node at the graph's present insertion point, its `val` computed from the operands'."""
    node = module.graph.call_function(target, args, kwargs or {})
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    options = fx.node.map_arg(kwargs or {}, lambda n: n.meta["val"])
    with torch.no_grad():
        node.meta["val"] = target(*values, **options)
    return node


def insert_leaf(module: fx.GraphModule, path: str, leaf: nn.Module, operand: fx.Node) -> fx.Node:
    """A call of a new leaf, a Linear or one that keeps shapes, placed at `path` or, where something lies there, beside
    it."""
    free = free_path(module, path)
    set_at(module, free, leaf)
    node = module.graph.call_module(free, (operand,))
    value = operand.meta["val"]
    width = leaf.out_features if isinstance(leaf, nn.Linear) else value.shape[-1]
    node.meta["val"] = value.new_empty((*value.shape[:-1], width))
    return node


def insert_linear(module: fx.GraphModule, path: str, linear: nn.Linear, operand: fx.Node) -> fx.Node:
    """A call of a new Linear, placed at `path` or, where something lies there, beside it."""
    return insert_leaf(module, path, linear, operand)


def replace_leaf(module: fx.GraphModule, call: fx.Node, leaf: nn.Module) -> fx.Node:
    """A call of another leaf of the same shape in the place of this one, under the same path; marks move on."""
    set_at(module, str(call.target), leaf)
    with module.graph.inserting_before(call):
        made = module.graph.call_module(str(call.target), call.args)
    made.meta = dict(call.meta)
    hand_marks_on(call, made)
    call.replace_all_uses_with(made)
    module.graph.erase_node(call)
    return made
