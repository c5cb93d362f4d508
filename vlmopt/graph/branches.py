"""Finds the residual branches of a graph by structure: sums in which one term is computed from another.

A branch is `y = x + f(x)`: a sum one of whose terms (the stream `x`) reaches another term `f(x)`. Sums of more than two
terms are one sum, so parallel attention and FFN (`x + attn(n) + ffn(n)`) are two branches of it. Values computed before
the stream (masks, rotary tables, encoder states, past keys) are side inputs and belong to no region.

Rules:
1. A region without a weight is arithmetic (an approximated GELU, say), not a branch.
2. A sum whose region holds another sum with branches is a long skip around whole blocks, not a branch.
3. Post-norm: where the stream itself is a norm's output, the region does not begin with a norm and the sum is read by
   one norm alone, skipping takes that norm along, since a norm of a normed stream is not the identity.
4. Names only label what the structure found; a block is recognised by the number in its modules' common path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import fx, nn

from vlmopt.graph.modules import get_at

aten = torch.ops.aten

_ADDS = {aten.add.Tensor, aten.add_.Tensor}
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
_ATTENTION = aten.scaled_dot_product_attention.default
_SCORES = {aten.matmul.default, aten.bmm.default, aten.einsum.default}


class BranchKind(Enum):
    ATTENTION = "attention"
    CROSS_ATTENTION = "cross_attention"
    FFN = "ffn"
    OTHER = "other"


@dataclass(frozen=True)
class Branch:
    """One residual region.

    `term` is the value that it adds to the `stream`; `exit` is the node whose value changes when it is skipped (the sum,
    or the norm of the sum); `terms` are all terms of the sum, in order; `region` are the nodes that go with
    it: those that only this branch needs and, where nothing is left to add, the sum (and norm).
    """

    name: str
    kind: BranchKind
    layer: int
    layer_name: str
    stream: fx.Node
    term: fx.Node
    exit: fx.Node
    terms: tuple[fx.Node, ...]
    region: tuple[fx.Node, ...]
    is_post_norm: bool


def find_branches(module: fx.GraphModule) -> list[Branch]:
    """All branches of a canonical graph, in the order of the stream, named and grouped into layers."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    sums = [found for node in module.graph.nodes if (found := _residual_sum(node, order)) is not None]
    roots = {total for total, _, _, _ in sums}
    found: list[Branch] = []
    for total, stream, terms, dependent in sums:
        if any(_between(stream, term, order) & (roots - {total}) for term in dependent):
            continue  # rule 2
        for term in dependent:
            branch = _make_branch(module, order, total, stream, term, terms)
            if branch is not None:
                found.append(branch)
    found.sort(key=lambda branch: (order[branch.exit], order[branch.term]))
    return _in_layers(_unique_names(found))


Sum = tuple[fx.Node, fx.Node, tuple[fx.Node, ...], list[fx.Node]]


def _residual_sum(node: fx.Node, order: dict[fx.Node, int]) -> Sum | None:
    """(sum, stream, all terms, terms that depend on the stream), if `node` is the last addition of a residual sum."""
    if not _is_add(node) or _is_inner_add(node):
        return None
    terms = tuple(_terms(node))
    shape = _shape(node)
    streams = [term for term in terms if _shape(term) == shape]
    for stream in sorted(streams, key=order.__getitem__):
        dependent = [t for t in terms if t is not stream and _shape(t) == shape and _between(stream, t, order)]
        dependent = [t for t in dependent if any(_has_weight(n) for n in _between(stream, t, order))]  # rule 1
        if dependent:
            return node, stream, terms, dependent
    return None


def _is_add(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _ADDS or node.kwargs.get("alpha", 1) != 1:
        return False
    return len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)


def _is_inner_add(node: fx.Node) -> bool:
    """An addition that only another addition of the same shape reads is a part of that sum."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    return _is_add(user) and _shape(user) == _shape(node)


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    for operand in node.args:
        assert isinstance(operand, fx.Node)
        if _is_add(operand) and _is_inner_add(operand):
            yield from _terms(operand)
        else:
            yield operand


def _shape(node: fx.Node) -> tuple[str, ...] | None:
    value = node.meta.get("val")
    return tuple(str(dim) for dim in value.shape) if isinstance(value, torch.Tensor) else None


def _between(start: fx.Node, end: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """Nodes on paths from `start` (excluded) to `end` (included); empty if there is none."""
    first = order[start]
    above: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node in above or order[node] <= first:
            continue
        above.add(node)
        pending.extend(node.all_input_nodes)
    inside: set[fx.Node] = set()
    for node in sorted(above, key=order.__getitem__):
        if any(operand is start or operand in inside for operand in node.all_input_nodes):
            inside.add(node)
    return inside if end in inside else set()


def _has_weight(node: fx.Node) -> bool:
    if node.op == "call_module":
        return True
    return any(operand.op == "get_attr" for operand in node.all_input_nodes) and node.target in (
        aten.linear.default, aten.matmul.default, aten.conv2d.default, aten.conv1d.default, aten.addmm.default,
    )  # fmt: skip


def _make_branch(
    module: fx.GraphModule,
    order: dict[fx.Node, int],
    total: fx.Node,
    stream: fx.Node,
    term: fx.Node,
    terms: tuple[fx.Node, ...],
) -> Branch | None:
    inside = _between(stream, term, order)
    exit_node, is_post_norm = total, False
    if _is_post_norm(module, total, stream, inside) and len(terms) == 2:
        (exit_node,) = total.users
        is_post_norm = True
    kind = _kind(module, inside, stream)
    region = exclusive_region(term, total, order)
    if len(terms) == 2:
        region = tuple(dict.fromkeys((*region, total, exit_node)))
    name = _label(module, inside, kind)
    return Branch(name, kind, 0, "", stream, term, exit_node, terms, region, is_post_norm)


def exclusive_region(term: fx.Node, total: fx.Node, order: dict[fx.Node, int]) -> tuple[fx.Node, ...]:
    """The nodes that die when the term leaves the sum, in graph order (side inputs that nothing else reads included)."""
    region: set[fx.Node] = set()
    pending = [term]
    above: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in above:
            above.add(node)
            pending.extend(node.all_input_nodes)
    for node in sorted(above, key=order.__getitem__, reverse=True):
        readers = set(node.users) - region
        if node.op != "placeholder" and (not readers or readers == {total} and node is term):
            region.add(node)
    return tuple(sorted(region, key=order.__getitem__))


def _is_norm(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(get_at(module, str(node.target)), nn.LayerNorm | nn.RMSNorm)
    return node.target in (aten.layer_norm.default, aten.rms_norm.default)


def _is_post_norm(module: fx.GraphModule, total: fx.Node, stream: fx.Node, inside: set[fx.Node]) -> bool:
    readers = list(total.users)
    if len(readers) != 1 or not _is_norm(module, readers[0]):
        return False
    begins_with_norm = any(_is_norm(module, node) for node in stream.users if node in inside)
    return _is_norm(module, stream) and not begins_with_norm  # rule 3


def _kind(module: fx.GraphModule, inside: set[fx.Node], stream: fx.Node) -> BranchKind:
    for node in inside:
        if node.target is _ATTENTION:
            is_self = _reaches(node.args[1], inside, stream)
            return BranchKind.ATTENTION if is_self else BranchKind.CROSS_ATTENTION
        if node.target in _SOFTMAX and (scores := _score_product(node, inside)) is not None:
            is_self = all(_reaches(operand, inside, stream) for operand in scores.args[:2])
            return BranchKind.ATTENTION if is_self else BranchKind.CROSS_ATTENTION
    leaves = [get_at(module, str(node.target)) for node in inside if node.op == "call_module"]
    has_linear = any(isinstance(leaf, nn.Linear) for leaf in leaves)
    has_linear |= any(node.target is aten.linear.default for node in inside)
    return BranchKind.FFN if has_linear else BranchKind.OTHER


def _score_product(node: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
    """The product of queries and keys that a softmax normalises."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        current = pending.pop(0)
        if current in seen or current not in inside:
            continue
        seen.add(current)
        if current.target in _SCORES:
            return current
        pending.extend(current.all_input_nodes)
    return None


def _reaches(operand: object, inside: set[fx.Node], stream: fx.Node) -> bool:
    return operand in inside or operand is stream


def _label(module: fx.GraphModule, inside: set[fx.Node], kind: BranchKind) -> str:
    """The common path of the region's weighted modules; a block's own path gets the kind behind it."""
    weighted = [str(n.target) for n in inside if n.op == "call_module" and not _is_norm(module, n)]
    if not weighted:
        attributes = {o for n in inside for o in n.all_input_nodes if o.op == "get_attr"}
        weighted = [str(attribute.target).rpartition(".")[0] for attribute in attributes]
    common = os.path.commonprefix([path.split(".") for path in weighted]) if weighted else []
    name = ".".join(common)
    if not name or common[-1].isdigit() or len(set(weighted)) == 1:
        name = f"{name}.{kind.value}" if name else kind.value
    return name


def _unique_names(branches: list[Branch]) -> list[Branch]:
    counts: dict[str, int] = {}
    named = []
    for branch in branches:
        counts[branch.name] = counts.get(branch.name, 0) + 1
        n = counts[branch.name]
        named.append(branch if n == 1 else replace(branch, name=f"{branch.name}.{n}"))
    return named


def _block_of(name: str) -> str:
    """Path up to the last number in it: the repeated block that a branch belongs to."""
    match = re.match(r"^(.*\.)?\d+(?=\.|$)", name)
    if match is None:
        return ""
    parts = name.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


def _in_layers(branches: list[Branch]) -> list[Branch]:
    """Groups consecutive branches of one block; without numbered paths a layer ends where a kind comes again."""
    grouped: list[Branch] = []
    layer, block, kinds = -1, "", set[BranchKind]()
    for branch in branches:
        own = _block_of(branch.name)
        if layer < 0 or own != block or (not own and branch.kind in kinds):
            layer, block, kinds = layer + 1, own, set()
        kinds.add(branch.kind)
        grouped.append(replace(branch, layer=layer, layer_name=own or f"layer {layer}"))
    return grouped
