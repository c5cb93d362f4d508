"""The heads of an attention: its queries, keys and values with an axis of heads, found by structure.

Two forms are known: a call of `scaled_dot_product_attention`, and a product of queries and keys with a softmax behind
it (scales, masks and caps between them) whose weights a second product takes to the values.

Shapes: queries [B, H, N, d], keys and values [B, K, T, d]; H is a multiple of K (grouped queries).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from vlmopt.graph.branches import Branch, BranchKind

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
_HAND_ON = {aten.to.dtype, aten._to_copy.default, aten.dropout.default, aten.clone.default, aten.contiguous.default}
_RESHAPES = {aten.reshape.default, aten._unsafe_view.default, aten.view.default}


@dataclass(frozen=True)
class Heads:
    """One attention.

    `mixed` holds what the heads read together, [B, H, N, d]: the attention call, or the product of weights and values.
    `scores` is the product of queries and keys, None within an attention call. `keys` and `values` are as they are
    before they are repeated for the queries of a group; `queries` as they are before `query_factor`, which
    multiplies them.
    """

    mixed: fx.Node
    scores: fx.Node | None
    queries: fx.Node
    keys: fx.Node
    values: fx.Node
    query_factor: float

    @property
    def n_groups(self) -> int:
        """Queries that share a key."""
        return _size(self.queries, 1) // _size(self.keys, 1)

    @property
    def width(self) -> int:
        return _size(self.queries, 3)


def find_heads(branch: Branch) -> Heads | str:
    """The heads of a self-attention to whose scores something can be added, or why there are none."""
    if branch.kind is BranchKind.CROSS_ATTENTION:
        return "is a cross attention, whose keys come from elsewhere and have no token of the stream in front"
    found = find_attention(branch)
    if isinstance(found, str) or found.mixed.target is not SDPA:
        return found
    names = ("attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, found.mixed.args[3:], strict=False)) | dict(found.mixed.kwargs)
    if given.get("is_causal") or given.get("dropout_p"):
        return "its mask is made inside of the attention call, so that no score can be added to it"
    return found


def find_attention(branch: Branch) -> Heads | str:
    """The heads of an attention branch, cross attentions included, or why they are not recognised."""
    if branch.kind not in (BranchKind.ATTENTION, BranchKind.CROSS_ATTENTION):
        return f"is a branch of kind {branch.kind.value}, no attention"
    calls = [node for node in branch.region if node.target is SDPA or node.target in _SOFTMAX]
    if len(calls) != 1:
        return f"holds {len(calls)} attentions (windows, perhaps), so that no token is in front of all"
    found = _of_call(calls[0]) if calls[0].target is SDPA else _of_softmax(calls[0])
    return found if isinstance(found, str) else _checked(found)


def _of_call(call: fx.Node) -> Heads:
    queries, keys, values = _operands(call)[:3]
    own, factor = _unscaled(queries)
    return Heads(call, None, own, _unrepeated(keys), _unrepeated(values), factor)


def _of_softmax(softmax: fx.Node) -> Heads | str:
    scores, mixed = _product_above(softmax), _product_below(softmax)
    unknown = "its heads are not recognised: no product of queries and turned keys, and of weights and values"
    if scores is None or mixed is None:
        return unknown
    queries, turned = _operands(scores)
    if turned.target is not aten.transpose.int:
        return unknown
    own, factor = _unscaled(queries)
    keys, values = turned.all_input_nodes[0], _operands(mixed)[1]
    return Heads(mixed, scores, own, _unrepeated(keys), _unrepeated(values), factor)


def _operands(node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(operand for operand in node.args if isinstance(operand, fx.Node))


def _product_above(softmax: fx.Node) -> fx.Node | None:
    """The product that a softmax normalises, with nothing but operations on single numbers between."""
    pending, seen = [softmax.all_input_nodes[0]], set[fx.Node]()
    while pending and len(seen) < 12:
        node = pending.pop(0)
        seen.add(node)
        if node.target is aten.matmul.default:
            return node
        pending.extend(operand for operand in node.all_input_nodes[:1] if operand not in seen)
    return None


def _product_below(softmax: fx.Node) -> fx.Node | None:
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.matmul.default:
            return user if user.args[0] is node else None
        if user.target not in _HAND_ON:
            return None
        node = user
    return None


def _unscaled(queries: fx.Node) -> tuple[fx.Node, float]:
    """Queries before a constant factor, and the factor."""
    factor = queries.args[1] if queries.target is aten.mul.Tensor else None
    return (queries.all_input_nodes[0], factor) if isinstance(factor, float) else (queries, 1.0)


def _unrepeated(value: fx.Node) -> fx.Node:
    """Keys or values before they are repeated for the queries of a group."""
    steps = [value]
    while steps[-1].target in (*_RESHAPES, aten.clone.default, aten.expand.default) and len(steps) < 4:
        steps.append(steps[-1].all_input_nodes[0])
    before = steps[-1]
    is_repeat = before.target is aten.unsqueeze.default and before.args[1] == 2 and len(steps) > 2
    found = before.args[0] if is_repeat else value
    if value.target is aten.repeat_interleave.self_int and value.args[2] == 1:
        found = value.args[0]
    assert isinstance(found, fx.Node)
    return found


def _checked(found: Heads) -> Heads | str:
    """The heads; a reason where their shapes are not those of heads of one width."""
    nodes = (found.queries, found.keys, found.values)
    if any(node.meta["val"].dim() != 4 for node in nodes):
        return f"its heads have no axis of their own: its queries have {found.queries.meta['val'].dim()} axes, not 4"
    if any(not isinstance(node.meta["val"].shape[axis], int) for node in nodes for axis in (1, 3)):
        return "the number or the width of its heads is not fixed"
    n_heads, n_keys, widths = _size(found.queries, 1), _size(found.keys, 1), {_size(node, 3) for node in nodes}
    if len(widths) > 1:
        return f"its heads have different widths: {', '.join(map(str, sorted(widths)))}"
    if n_keys != _size(found.values, 1) or n_heads % n_keys:
        return f"{n_heads} heads of queries read {n_keys} of keys and {_size(found.values, 1)} of values"
    return found


def _size(node: fx.Node, axis: int) -> int:
    return int(node.meta["val"].shape[axis])
