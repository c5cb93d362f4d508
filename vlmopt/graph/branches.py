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
5. An adapter beside or in the place of a branch is a branch of kind `other`, in the layer that it was made for; one
   inside a branch, be it beside the layer that the branch ends in, is a part of that branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import takewhile

import torch
from torch import fx, nn

from vlmopt.graph.modules import ADAPTERS, get_at, is_adapter_call
from vlmopt.graph.quantized import BlockwiseLinear, HalfLinear, Int8Linear

aten = torch.ops.aten

_ADDS = {aten.add.Tensor, aten.add_.Tensor}
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
_ATTENTION = aten.scaled_dot_product_attention.default
_SCORES = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
_WEIGHTED = {
    aten.linear.default, aten.matmul.default, aten.conv2d.default, aten.conv1d.default, aten.addmm.default,
    aten.bmm.default, aten.einsum.default,
}  # fmt: skip
_JOINS = {aten.cat.default, aten.repeat.default, aten.expand.default}


class BranchKind(Enum):
    ATTENTION = "attention"
    CROSS_ATTENTION = "cross_attention"
    FFN = "ffn"
    OTHER = "other"


@dataclass(frozen=True)
class Branch:
    """One residual region.

    `term` is the value that it adds to the `stream`; `exit` is the node whose value changes when it is skipped (the
    sum, or the norm of the sum); `terms` are all terms of the sum, in order; `region` are the nodes that go with it, in
    graph order: those that only this branch needs, one addition, and the norm of a post-norm branch.
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
    sums = [candidates for node in module.graph.nodes if (candidates := _residual_sums(node, order))]
    roots = {one.total for one, *_ in sums if not all(_is_adapter(inside) for inside in one.regions.values())}
    branches: list[Branch] = []
    for candidates in sums:
        for one in candidates:
            others = roots - {one.total}
            regions = {
                term: inside for term, inside in one.regions.items() if not others.intersection(inside)
            }  # rule 2
            branches.extend(_make_branch(module, order, one, term, inside) for term, inside in regions.items())
            if regions:
                break
    branches = _without_inner_adapters(branches)
    branches.sort(key=lambda branch: (order[branch.exit], order[branch.term]))
    return _with_unique_names(_in_layers(branches))


@dataclass(frozen=True)
class _Sum:
    """A residual sum: its last addition, all its additions, all terms, the stream, and what lies between the stream and
    each term that depends on it."""

    total: fx.Node
    additions: tuple[fx.Node, ...]
    terms: tuple[fx.Node, ...]
    stream: fx.Node
    regions: dict[fx.Node, dict[fx.Node, None]]


def _residual_sums(node: fx.Node, order: dict[fx.Node, int]) -> list[_Sum]:
    """The sum whose last addition `node` is, once for each term that can be its stream, the earliest first."""
    if not _is_add(node) or _is_inner_add(node):
        return []
    additions: list[fx.Node] = []
    terms = tuple(_terms(node, additions))
    full = [term for term in dict.fromkeys(terms) if _shape(term) == _shape(node)]
    found: list[_Sum] = []
    for stream in sorted(full, key=order.__getitem__):
        inside = {term: nodes_between(stream, term, order) for term in full if term is not stream}
        regions = {term: nodes for term, nodes in inside.items() if any(map(_has_weight, nodes))}  # rule 1
        if regions:
            found.append(_Sum(node, tuple(additions), terms, stream, regions))
    return found


def _is_add(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _ADDS or node.kwargs.get("alpha", 1) != 1:
        return False
    return len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)


def _is_inner_add(node: fx.Node) -> bool:
    """An addition that only another addition of the same shape reads is a part of that sum, unless it is a layer with
    an adapter beside it."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    return _is_add(user) and _shape(user) == _shape(node) and _source_of(node) is None


def _source_of(node: fx.Node) -> fx.Node | None:
    """What a layer with adapters beside it reads; None where the sum is no such layer."""
    for own, change in (node.args, node.args[::-1]):
        assert isinstance(own, fx.Node)
        assert isinstance(change, fx.Node)
        source: fx.Node | None = None
        if own.op == "call_module" and not is_adapter_call(own) and len(own.all_input_nodes) == 1:
            source = own.all_input_nodes[0]
        elif _is_add(own):
            source = _source_of(own)
        if source is not None and _is_beside(change, source):
            return source
    return None


def _is_beside(change: fx.Node, source: fx.Node) -> bool:
    """Whether modules of adapters make the value of this source, and stored tensors, alone."""
    seen, pending, makers = {source}, [change], 0
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" or (node.op == "call_module" and not is_adapter_call(node)):
            return False
        makers += is_adapter_call(node)
        pending += node.all_input_nodes
    return makers > 0


def _terms(node: fx.Node, additions: list[fx.Node]) -> Iterator[fx.Node]:
    """The terms of a sum from left to right; its additions are put into the list, inner ones first."""
    for operand in node.args:
        assert isinstance(operand, fx.Node)
        if _is_add(operand) and _is_inner_add(operand):
            yield from _terms(operand, additions)
        else:
            yield operand
    additions.append(node)


def _shape(node: fx.Node) -> tuple[str, ...] | None:
    value = node.meta.get("val")
    return tuple(str(dim) for dim in value.shape) if isinstance(value, torch.Tensor) else None


def nodes_between(start: fx.Node, end: fx.Node, order: dict[fx.Node, int]) -> dict[fx.Node, None]:
    """Nodes on paths from `start` (excluded) to `end` (included), in graph order; empty if there is none.

    Who reads the size of a value does not read the value.
    """
    first = order[start]
    above: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node in above or order[node] <= first:
            continue
        above.add(node)
        pending.extend(node.all_input_nodes)
    inside: dict[fx.Node, None] = {}
    for node in sorted(above, key=order.__getitem__):
        if node.target is not aten.sym_size.int and any(n is start or n in inside for n in node.all_input_nodes):
            inside[node] = None
    return inside if end in inside else {}


def _has_weight(node: fx.Node) -> bool:
    if node.op == "call_module":
        return True
    return node.target in _WEIGHTED and any(operand.op == "get_attr" for operand in node.all_input_nodes)


def _make_branch(
    module: fx.GraphModule, order: dict[fx.Node, int], one: _Sum, term: fx.Node, inside: dict[fx.Node, None]
) -> Branch:
    exit_node, is_post_norm = one.total, False
    if len(one.terms) == 2 and _is_post_norm(module, one.total, one.stream, inside):
        (exit_node,) = one.total.users
        is_post_norm = True
    # Without one term the sum has one addition less; which of them goes makes no difference, since all have one shape.
    gone = one.additions[list(one.regions).index(term)]
    region = _exclusive_region(term, set(one.additions), order) | {gone}
    if is_post_norm:
        region.add(exit_node)
    kind = _kind(module, inside, one.stream)
    ordered = tuple(sorted(region, key=order.__getitem__))
    name = _label(module, inside, kind)
    return Branch(name, kind, 0, "", one.stream, term, exit_node, one.terms, ordered, is_post_norm)


def _exclusive_region(term: fx.Node, additions: set[fx.Node], order: dict[fx.Node, int]) -> set[fx.Node]:
    """The nodes that die when the term leaves the sum: side inputs that nothing else reads included, and what is
    returned beside the first output (new keys and values).
    """
    region: set[fx.Node] = set()
    pending = [term]
    above: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in above:
            above.add(node)
            pending.extend(node.all_input_nodes)
    output = next(reversed(order))
    for node in sorted(above, key=order.__getitem__, reverse=True):
        readers = set(node.users) - region
        if node is not output.args[0][0]:  # type: ignore[index]
            readers.discard(output)
        if node.op != "placeholder" and (not readers or (node is term and readers <= additions)):
            region.add(node)
    return region


def _is_norm(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(get_at(module, str(node.target)), nn.LayerNorm | nn.RMSNorm)
    return node.target in (aten.layer_norm.default, aten.rms_norm.default)


def _is_normed(module: fx.GraphModule, node: fx.Node) -> bool:
    """A norm's output, repeated or joined with others perhaps (the tokens of image and text), or with an adapter."""
    if _is_add(node) and any(_is_adapter([operand]) for operand in node.all_input_nodes):
        return any(_is_normed(module, operand) for operand in node.all_input_nodes)
    if node.target in _JOINS:
        return all(_is_normed(module, part) for part in node.all_input_nodes if _shape(part) is not None)
    return _is_norm(module, node)


def _is_post_norm(module: fx.GraphModule, total: fx.Node, stream: fx.Node, inside: dict[fx.Node, None]) -> bool:
    readers = list(total.users)
    if len(readers) != 1 or not _is_norm(module, readers[0]) or _is_adapter(inside):
        return False
    begins_with_norm = any(_is_norm(module, node) for node in stream.users if node in inside)
    return _is_normed(module, stream) and not begins_with_norm  # rule 3


def _kind(module: fx.GraphModule, inside: dict[fx.Node, None], stream: fx.Node) -> BranchKind:
    for node in inside:
        if node.target is _ATTENTION:
            is_self = _reaches(node.args[1], inside, stream)
            return BranchKind.ATTENTION if is_self else BranchKind.CROSS_ATTENTION
        if node.target in _SOFTMAX and (scores := _score_product(node, inside)) is not None:
            is_self = all(_reaches(operand, inside, stream) for operand in scores.all_input_nodes[-2:])
            return BranchKind.ATTENTION if is_self else BranchKind.CROSS_ATTENTION
    if _is_adapter(inside):
        return BranchKind.OTHER  # rule 5
    leaves = [get_at(module, str(node.target)) for node in inside if node.op == "call_module"]
    has_linear = any(isinstance(leaf, nn.Linear | Int8Linear | BlockwiseLinear | HalfLinear) for leaf in leaves)
    has_linear |= any(node.target is aten.linear.default for node in inside)
    return BranchKind.FFN if has_linear else BranchKind.OTHER


def _without_inner_adapters(branches: list[Branch]) -> list[Branch]:
    """The branches less the adapters that are a part of another one (rule 5)."""
    holders = [(branch.exit, set(branch.region)) for branch in branches if not _is_adapter(branch.region)]
    return [
        branch
        for branch in branches
        if not _is_adapter(branch.region)
        or not any(branch.exit is not end and branch.exit in region for end, region in holders)
    ]


def _is_adapter(nodes: Iterable[fx.Node]) -> bool:
    calls = [str(node.target) for node in nodes if node.op == "call_module"]
    return bool(calls) and all(path.startswith(f"{ADAPTERS}.") for path in calls)


def _score_product(node: fx.Node, inside: dict[fx.Node, None]) -> fx.Node | None:
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


def _reaches(operand: object, inside: dict[fx.Node, None], stream: fx.Node) -> bool:
    return operand in inside or operand is stream


def _label(module: fx.GraphModule, inside: dict[fx.Node, None], kind: BranchKind) -> str:
    """The common path of the region's weighted modules; a block's own path gets the kind behind it."""
    paths = [str(n.target).split(".") for n in inside if n.op == "call_module" and not _is_norm(module, n)]
    paths = [path for path in paths if path[0] != ADAPTERS] or paths  # one inside a branch does not name it
    if not paths:
        attributes = [operand for n in inside for operand in n.all_input_nodes if operand.op == "get_attr"]
        paths = [str(attribute.target).split(".")[:-1] for attribute in attributes]
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    is_one_module = all(path == common for path in paths)
    if is_one_module and common and common[-1].isdigit() and any(part.isdigit() for part in common[:-1]):
        common = common[:-1]  # a place in a Sequential, not the number of a block
    if not common or common[-1].isdigit() or is_one_module:
        common = [*common, kind.value]
    return ".".join(common)


def _block_of(name: str) -> str:
    """Path up to the last number in it: the repeated block that a branch belongs to (rule 5: or is an adapter of)."""
    parts = name.removeprefix(f"{ADAPTERS}.").split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ""


def _in_layers(branches: list[Branch]) -> list[Branch]:
    """Groups consecutive branches of one block; a layer ends where a name (without a number: a kind) comes again."""
    grouped: list[Branch] = []
    layer, block, seen = -1, "", set[object]()
    for branch in branches:
        own = _block_of(branch.name)
        mark: object = branch.name if own else branch.kind
        if layer < 0 or own != block or mark in seen:
            layer, block, seen = layer + 1, own, set()
        seen.add(mark)
        grouped.append(replace(branch, layer=layer, layer_name=own or f"layer {layer}"))
    return grouped


def _with_unique_names(branches: list[Branch]) -> list[Branch]:
    """A block that runs twice (shared weights) gives its branches and its layer the names `NAME.2` the second time."""
    names, layers = dict[str, int](), dict[str, int]()
    layer_names: dict[int, str] = {}
    named: list[Branch] = []
    for branch in branches:
        if branch.layer not in layer_names:
            layer_names[branch.layer] = _counted(branch.layer_name, layers)
        named.append(replace(branch, name=_counted(branch.name, names), layer_name=layer_names[branch.layer]))
    return named


def _counted(name: str, taken: dict[str, int]) -> str:
    """The name, with a number behind it where it was given out before."""
    free = name
    while free in taken:
        taken[name] += 1
        free = f"{name}.{taken[name]}"
    taken[free] = 1
    return free


def by_component(names: Iterable[str]) -> dict[str, frozenset[str]]:
    """Names `component/branch` as names of branches by component."""
    found: dict[str, set[str]] = {}
    for name in names:
        component, _, branch = name.partition("/")
        found.setdefault(component, set()).add(branch)
    return {component: frozenset(branches) for component, branches in found.items()}
