"""Reads of one token of a value, and what in front of them is computed for all tokens though one is read on.

`f(x)[:, i] = f(x[:, i])` for every f that treats each token by itself: Linears, norms of a token's channels, operations
on single numbers, and an attention in its queries. So behind the last attention of an encoder that reads its class
token, and in that attention but for keys and values, one token is enough. What is read whole by anything else stays,
and so does what looks across tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from vlmopt.graph.build import insert_call
from vlmopt.graph.heads import SDPA
from vlmopt.graph.marks import hand_marks_on
from vlmopt.graph.modules import get_at
from vlmopt.graph.narrowing import computed_value, rewrite_size
from vlmopt.graph.unit_axes import SPLITS, Layout, Mixed, Together, aten, axis_argument, n_axes, operands_of, size_at
from vlmopt.graph.unit_operations import layout_above

_READS = (aten.select.int, aten.slice.Tensor)
# Operations that state or guess the size of an axis in a way that cannot be rewritten.
_OPAQUE = {*SPLITS, aten.cat.default, aten.squeeze.default, aten.view_as.default, aten.expand_as.default}

Demand = Mapping[fx.Node, int]  # operands of a call and the axis of tokens in each


@dataclass(frozen=True)
class TokenRead:
    """`call` reads the token `index` of its operand; `narrowed` are the calls that it is enough to run for that token,
    in the order of the graph, with the axis of tokens in the value of each."""

    call: fx.Node
    index: int
    n_tokens: int
    narrowed: Mapping[fx.Node, int]


def find_token_reads(module: fx.GraphModule) -> tuple[list[TokenRead], dict[str, str]]:
    """Reads in front of which a weighted operation or an attention runs for tokens that nobody reads; and why others,
    by name, are no such reads."""
    found: list[TokenRead] = []
    reasons: dict[str, str] = {}
    for node in module.graph.nodes:
        read = _read_at(node)
        if read is None:
            continue
        (operand,) = node.all_input_nodes
        if len(operand.users) > 1:
            other = next(user for user in operand.users if user is not node)
            if node.target is aten.select.int:
                reasons[node.name] = f"{other.name} reads the same tokens"
            continue
        axis, index, n_tokens = read
        narrowed = _narrowed(module, node, axis)
        if any(one.op == "call_module" or one.target in (SDPA, aten.matmul.default) for one in narrowed):
            found.append(TokenRead(node, index, n_tokens, narrowed))
        elif node.target is aten.select.int:
            reasons[node.name] = f"{operand.name} in front of it looks across tokens"
    return found, reasons


def _read_at(node: fx.Node) -> tuple[int, int, int] | None:
    """Axis and place of one of several tokens that a call reads, and how many there are; None where it reads no one."""
    if node.op != "call_function" or node.target not in _READS:
        return None
    (operand, *_) = node.args
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    if not isinstance(operand, fx.Node) or not isinstance(value, Tensor) or value.dim() < 3:
        return None
    axis = axis_argument(node, 1, 0, value.dim())
    size = size_at(operand, axis)
    if axis == 0 or not isinstance(size, int) or size < 2 or len(node.all_input_nodes) > 1:
        return None
    first, *rest = node.args[2:] or (0,)
    if not isinstance(first, int):
        return None
    if node.target is aten.slice.Tensor and size_at(node, axis) != 1:
        return None
    if node.target is aten.slice.Tensor and (not rest or rest[1:] not in ([], [1])):
        return None
    return axis, first % size, size


def _narrowed(module: fx.GraphModule, call: fx.Node, axis: int) -> dict[fx.Node, int]:
    """The calls that may run for one token: all that read them do, and each treats every token by itself."""
    (operand,) = call.all_input_nodes
    demanded: dict[fx.Node, dict[fx.Node, int]] = {operand: {call: axis}}
    found: dict[fx.Node, int] = {}
    for node in reversed(module.graph.nodes):
        own = demanded.get(node, {})
        axes = set(own.values())
        if own.keys() != node.users.keys() or len(axes) != 1:
            continue
        (place,) = axes
        above = _above(module, node, place)
        if above is not None:
            found[node] = place
            for one, at in above.items():
                demanded.setdefault(one, {})[node] = at
    return dict(reversed(found.items()))


def _above(module: fx.GraphModule, node: fx.Node, axis: int) -> Demand | None:
    """What of its operands a call needs for one token along an axis of its value; None where it needs more of them."""
    if node.op == "call_module":
        leaf, last = get_at(module, str(node.target)), n_axes(node) - 1
        n_mixed = len(leaf.normalized_shape) if isinstance(leaf, nn.LayerNorm) else 1
        is_apart = isinstance(leaf, nn.Linear | nn.LayerNorm) and axis <= last - n_mixed
        return dict.fromkeys(node.all_input_nodes, axis) if is_apart else None
    if node.op != "call_function" or node.target in _OPAQUE or not isinstance(node.target, OpOverload):
        return None
    if node.target is SDPA:
        return _above_attention(node, axis)
    if not isinstance(node.meta["val"], Tensor):
        return None
    layout = Layout(axis, torch.arange(int(size_at(node, axis))))
    try:
        above = {operand: layout_above(node, operand, layout) for operand in operands_of(node)}
    except (Mixed, Together):
        return None
    kept = {operand: one for operand, one in above.items() if one is not None}
    is_product_with_itself = node.target is aten.matmul.default and node.args[0] is node.args[1]
    if is_product_with_itself or any(not torch.equal(one.units, layout.units) for one in kept.values()):
        return None
    return {operand: one.axis for operand, one in kept.items()} or None


def _above_attention(node: fx.Node, axis: int) -> Demand | None:
    """The query of the token, and its row of a mask; keys and values are needed whole."""
    queries, keys, values, *rest = node.args
    named = ("attn_mask", "dropout_p", "is_causal")
    given = dict(zip(named, rest, strict=False)) | dict(node.kwargs)
    mask = given.get("attn_mask")
    is_plain = not given.get("is_causal") and not given.get("dropout_p") and not given.get("enable_gqa")
    if axis != n_axes(node) - 2 or not is_plain or queries in (keys, values, mask):
        return None
    assert isinstance(queries, fx.Node)
    if not isinstance(mask, fx.Node) or n_axes(mask) < 2 or size_at(mask, n_axes(mask) - 2) == 1:
        return {queries: axis}
    return {queries: axis, mask: n_axes(mask) - 2}


def read_early(module: fx.GraphModule, read: TokenRead) -> None:
    """Takes the token out in front of the calls that it is enough for, in place."""
    taken: dict[tuple[fx.Node, int], fx.Node] = {}
    demands = {node: _above(module, node, axis) or {} for node, axis in read.narrowed.items()}
    for node, axis in read.narrowed.items():
        for operand, at in demands[node].items():
            if operand in read.narrowed:
                continue
            if (operand, at) not in taken:
                with module.graph.inserting_before(node):
                    args = (operand, at, read.index, read.index + 1)
                    taken[operand, at] = insert_call(module, aten.slice.Tensor, args)
            node.replace_input_with(operand, taken[operand, at])
        _narrow(node, axis)
    if read.call.target is aten.select.int:
        read.call.update_arg(2, 0)
        return
    (operand,) = read.call.all_input_nodes
    hand_marks_on(read.call, operand)
    read.call.replace_all_uses_with(operand)
    module.graph.erase_node(read.call)


def _narrow(node: fx.Node, axis: int) -> None:
    """The value of a call whose operands hold one token, the sizes that it states rewritten."""
    if node.op == "call_module":
        value, (operand,) = node.meta["val"], node.all_input_nodes
        node.meta["val"] = value.new_empty((*operand.meta["val"].shape[:-1], value.shape[-1]))
    else:
        rewrite_size(node, axis, 1)
        node.meta["val"] = computed_value(node)
