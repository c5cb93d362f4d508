"""Canonical form: no dead nodes, no assertions, and no nodes that only hand on their input.

Assertions go first, since they look like readers and would keep branches alive.
"""

from __future__ import annotations

import torch
from torch import fx

from vlmopt.graph.marks import hand_marks_on
from vlmopt.graph.modules import drop_unused_modules

aten = torch.ops.aten

ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    torch._check,
}
# Operations that return their input's value whenever its dtype and layout already are what they ask for.
HAND_ON = {
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.dropout.default,
    aten.feature_dropout.default,
}


def canonicalize_graph(module: fx.GraphModule) -> int:
    """Brings the graph into canonical form in place; returns how many nodes went."""
    before = len(module.graph.nodes)
    for node in assertion_nodes(module):
        module.graph.erase_node(node)
    for node in hand_on_nodes(module):
        hand_marks_on(node, _operand(node))
        node.replace_all_uses_with(_operand(node))
        module.graph.erase_node(node)
    drop_dead_nodes(module)
    return before - len(module.graph.nodes)


def assertion_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """Assertions, in an order in which they can be erased."""
    return [node for node in reversed(module.graph.nodes) if node.op == "call_function" and node.target in ASSERTIONS]


def hand_on_nodes(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if is_hand_on(node)]


def dead_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """Nodes that no output depends on, except placeholders: the signature stays."""
    live: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        if node.op in ("output", "placeholder") or node in live or node.target in ASSERTIONS:
            live.add(node)
            live.update(node.all_input_nodes)
    return [node for node in module.graph.nodes if node not in live]


def drop_dead_nodes(module: fx.GraphModule) -> int:
    """Erases dead nodes and the modules and tensors that only they read; returns how many nodes went."""
    dead = dead_nodes(module)
    for node in reversed(dead):
        module.graph.erase_node(node)
    drop_unused_modules(module)
    module.recompile()
    return len(dead)


def is_hand_on(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in HAND_ON:
        return False
    if node.target in (aten.dropout.default, aten.feature_dropout.default):
        return node.args[2] is False
    value, source = node.meta.get("val"), _operand(node).meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(source, torch.Tensor):
        return False
    if any(writes(user) for reader in (node, _operand(node)) for user in reader.users):
        return False  # a copy that keeps an in-place write away from its source
    return _layout(value) == _layout(source)


def _layout(value: torch.Tensor) -> tuple[object, ...]:
    """What a copy may change and later views rely on; sizes as text, since as numbers they compare by the sample."""
    return value.dtype, value.device, [str(size) for size in value.shape], [str(step) for step in value.stride()]


def writes(node: fx.Node) -> bool:
    """Whether the node changes one of its operands in place."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand
