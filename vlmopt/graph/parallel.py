"""Chains of linear maps beside a linear layer, which together are one layer: found by structure, folded by algebra.

Before: `y = L(x) + A(x) + ...`; after: `y = L'(x)`. `L` is a Linear, a Conv2d or an Embedding, each `A` reads the same
`x`, and all are linear maps of the same features of `x` (`linear_maps.py`). What adapter a chain came from, and whether
from any, makes no difference. Terms that are no such maps stay in the sum, beside `L'`.

Numbered rules:

1. The layer is a term of the sum, perhaps scaled; a chain is a term that reads what the layer reads and whose weights
   are smaller than the layer's, or that is a linear map or an adapter anyway.
2. A layer whose value, or one computed from it, is read beside the sum stays: that reader wants the old value.
3. A layer whose weight is read elsewhere stays: the old weight would have to be kept beside the new one.
4. A layer whose weight is no plain tensor of real numbers (a quantized one) stays: the sum would be rounded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from vlmopt.graph.branches import nodes_between
from vlmopt.graph.canonical import is_hand_on
from vlmopt.graph.constants import constant_nodes
from vlmopt.graph.costing import weights_of
from vlmopt.graph.linear_maps import CASTS, SELECTING, VIEWING, LinearMap, Maps, NotLinear, Values
from vlmopt.graph.linear_operations import maps_from
from vlmopt.graph.modules import get_at, is_adapter_call
from vlmopt.graph.quantized import QuantizedLeaf
from vlmopt.graph.text import operation_text

aten = torch.ops.aten

_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding, QuantizedLeaf)
_WEIGHT_AT = {  # calls that may be a layer without being a leaf, and where their weight stands
    aten.linear.default: 1, aten.matmul.default: 1, aten.mm.default: 1, aten.addmm.default: 2,
    aten.embedding.default: 0, aten.conv2d.default: 1,
    aten._weight_int8pack_mm.default: 1, aten._weight_int4pack_mm.default: 1,
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """A term of a sum and the addition or difference that reads it."""

    node: fx.Node
    holder: fx.Node
    is_subtracted: bool = False


@dataclass(frozen=True)
class ParallelFold:
    """A layer, its term in a sum, and the terms that it takes over. `map` is the layer and those terms together."""

    total: fx.Node
    layer: fx.Node
    own: Term
    chains: tuple[Term, ...]
    map: LinearMap

    @property
    def path(self) -> str:
        return str(self.layer.target)


@dataclass(frozen=True)
class Kept:
    """A chain beside a layer that stays, with the reason. `name` tells it from the others of its layer."""

    name: str
    reason: str


def find_parallel(module: fx.GraphModule) -> tuple[list[ParallelFold], list[Kept]]:
    """All chains beside layers, in graph order: those that fold, by layer, and those that stay."""
    found: list[ParallelFold] = []
    kept: list[Kept] = []
    constants = constant_nodes(module)
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for total in module.graph.nodes:
        if not is_sum(total) or total in constants or is_inner_sum(total):
            continue
        terms = _terms(total)
        taken: set[fx.Node] = set()
        for own in terms:
            layer = None if own.node in taken or own.is_subtracted else _layer_of(module, own.node, constants)
            if layer is None:
                continue
            finder = _Finder(module, order, constants, total, layer, own, [term for term in terms if term is not own])
            fold, left = finder.find()
            kept += left
            if fold is not None:
                found.append(fold)
                taken |= {term.node for term in fold.chains}
    return found, kept


def is_sum(node: fx.Node) -> bool:
    """A sum or difference of two values, each of weight one."""
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return False
    first, second = node.args
    return isinstance(first, fx.Node) and isinstance(second, fx.Node) and first is not second


def is_inner_sum(node: fx.Node) -> bool:
    """A sum whose terms are those of the one sum that reads it; what is subtracted counts as one term."""
    if not is_sum(node) or len(node.users) != 1:
        return False
    (user,) = node.users
    return is_sum(user) and not (user.target is aten.sub.Tensor and user.args[1] is node)


def _terms(total: fx.Node) -> list[Term]:
    """The terms of a sum, in the order in which they are written."""
    terms: list[Term] = []
    pending = [total]
    while pending:
        node = pending.pop(0)
        for i, operand in enumerate(node.args):
            assert isinstance(operand, fx.Node)
            if is_inner_sum(operand):
                pending.append(operand)
            else:
                terms.append(Term(operand, node, is_subtracted=i == 1 and node.target is aten.sub.Tensor))
    return terms


def collapsing(total: fx.Node, dropped: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The sums below `total`, itself included, that lose terms, and the operands that each is left with."""
    found: dict[fx.Node, list[fx.Node]] = {}

    def is_left(node: fx.Node) -> bool:
        if node in dropped:
            return False
        if node is not total and not is_inner_sum(node):
            return True
        left = [operand for operand in node.all_input_nodes if is_left(operand)]
        if len(left) < 2:
            found[node] = left
        return bool(left)

    is_left(total)
    return found


def _layer_of(module: fx.GraphModule, term: fx.Node, constants: frozenset[fx.Node]) -> fx.Node | None:
    """The call of the layer that the term is, scaled or seen by some tokens or not; None where it is something else."""
    node = term
    while node.op == "call_function" and node.target not in _WEIGHT_AT:
        is_scale = node.target in (aten.mul.Tensor, aten.div.Tensor)
        if not (is_scale or node.target in VIEWING | CASTS | SELECTING or is_hand_on(node)):
            return None
        values = [operand for operand in node.args if isinstance(operand, fx.Node) and operand not in constants]
        if not values:
            return None
        node = values[0]
    if node in constants:
        return None
    if node.op == "call_module" and not is_adapter_call(node):
        leaf = get_at(module, str(node.target))
        return node if isinstance(leaf, _LAYERS) else None
    if node.op == "call_function" and node.target in _WEIGHT_AT:
        weight = node.args[_WEIGHT_AT[node.target]]
        return node if isinstance(weight, fx.Node) and weight in constants else None
    return None


@dataclass(frozen=True)
class _Finder:
    """Looks at one layer in one sum."""

    module: fx.GraphModule
    order: dict[fx.Node, int]
    constants: frozenset[fx.Node]
    total: fx.Node
    layer: fx.Node
    own: Term
    others: Sequence[Term]

    def find(self) -> tuple[ParallelFold | None, list[Kept]]:
        value = next((node for node in self.layer.all_input_nodes if node not in self.constants), None)
        if value is None or any(term.node is self.own.node for term in self.others):
            return None, []
        maps = maps_from(self.module, value, self.constants)
        size = sum(weight.numel() for weight in self._weights([self.layer]))
        kept: list[Kept] = []
        chains: list[Term] = []
        odd = self._why_no_layer()
        for term in self.others:
            region = [node for node in nodes_between(value, term.node, self.order) if node is not self.layer]
            weights = self._weights(region)
            if not weights or term.node in self.constants:
                continue
            reason = odd or self._why_no_chain(maps, term)
            if not reason:
                chains.append(term)
            elif not size or sum(weight.numel() for weight in weights) < size or any(map(is_adapter_call, region)):
                kept.append(Kept(self._name(region), reason))
        return self._judged(maps, chains, kept)

    def _judged(self, maps: Maps, chains: list[Term], kept: list[Kept]) -> tuple[ParallelFold | None, list[Kept]]:
        if not chains:
            return None, kept
        reason, whole = self._why_read(chains) or self._why_subtracted(chains), None
        try:
            whole = _together(maps, self.layer, self.own, chains)
        except NotLinear as error:
            reason = reason or str(error)
        if reason or whole is None:
            names = (self._name(list(nodes_between(maps.root, term.node, self.order))) for term in chains)
            return None, [*kept, *(Kept(name, reason) for name in names)]
        return ParallelFold(self.total, self.layer, self.own, tuple(chains), whole), kept

    def _why_no_layer(self) -> str:
        """Why the layer cannot take anything over; empty where it can."""
        weights = self._weights([self.layer])
        is_quantized = any(type(w.data) is not Tensor or not w.is_floating_point() for w in weights)
        if self.layer.op == "call_module" and not is_quantized:
            return ""
        if is_quantized or any(_is_integer(node) for node in self._above(self.layer)):
            return (
                "the weight of its base is quantized: the sum would be rounded to its grid again, which loses the "
                "update; fold first and quantize afterwards"
            )
        return "the weight of its base is computed in the graph, and lies in no torch.nn leaf that could take it over"

    def _above(self, node: fx.Node) -> set[fx.Node]:
        """The constants that the node is computed from."""
        found: set[fx.Node] = set()
        pending = [operand for operand in node.all_input_nodes if operand in self.constants]
        while pending:
            current = pending.pop()
            if current not in found:
                found.add(current)
                pending.extend(current.all_input_nodes)
        return found

    def _weights(self, nodes: Iterable[fx.Node]) -> list[Tensor]:
        """The weights that these nodes read, be it through constants computed from them."""
        every = [*nodes, *(node for own in list(nodes) for node in self._above(own))]
        found = {id(weight): weight for node in every for weight in weights_of(self.module, node)}
        return list(found.values())

    def _why_no_chain(self, maps: Maps, term: Term) -> str:
        if term.node.target is self.layer.target and term.node.op == "call_module":
            return "it is the layer itself, called again"
        try:
            own, chain = maps.of(self.own.node), maps.of(term.node)
        except NotLinear as error:
            return f"it is no linear map beside its base: {error}"
        return _why_unlike(own, chain)

    def _why_read(self, chains: Sequence[Term]) -> str:
        """Who else reads the layer's value, or one computed from it on the way to the sum; empty where nobody does."""
        holders = {term.holder for term in (self.own, *self.others)}
        inside = {self.layer}
        for term in (self.own, *chains):
            inside |= nodes_between(self.layer, term.node, self.order).keys()
        for node in sorted(inside, key=self.order.__getitem__):
            for user in node.users:
                if user not in inside | holders:
                    what = f"{user.name} ({operation_text(self.module, user)})"
                    if user.target in SELECTING:
                        return f"only some tokens see it: {what} chooses between the base's value with it and without"
                    return f"the value of its base is read by {what} as well, which wants it without the adapter"
        return ""

    def _why_subtracted(self, chains: Sequence[Term]) -> str:
        left = collapsing(self.total, {term.node for term in chains})
        is_odd = any(node.target is aten.sub.Tensor and rest == [node.args[1]] for node, rest in left.items())
        return "another value is subtracted from it alone" if is_odd else ""

    def _name(self, region: Sequence[fx.Node]) -> str:
        """The chain by its last weight; by its last value where it has none of its own."""
        last = next((node for node in reversed(region) if node.op == "call_module"), None)
        return str(last.target) if last is not None else region[-1].name


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or node.op != "get_attr":
        return False
    return not value.is_floating_point() or type(value.data).__name__ not in ("Tensor", "Parameter", "FakeTensor")


def _why_unlike(own: LinearMap, chain: LinearMap) -> str:
    if chain.features is None:
        return "it is the value itself, and goes by the weights"
    if own.features != chain.features:
        return "it is a map of another axis, kernel size, stride or padding than its base"
    if own.axes != chain.axes or own.width != chain.width:
        return "it gives another shape than its base"
    if own.groups > 1 and chain.groups != own.groups:
        return "its base is a grouped convolution, and it mixes the groups"
    return ""


def _together(maps: Maps, layer: fx.Node, own: Term, chains: Sequence[Term]) -> LinearMap:
    """The layer's term and the chains as one map, which the layer itself can be."""
    base, terms = maps.of(own.node), [(maps.of(term.node), -1.0 if term.is_subtracted else 1.0) for term in chains]
    plain = maps.of(layer)
    if (plain.axes, plain.channel) != (base.axes, base.channel) or _sizes(layer) != _sizes(own.node):
        raise NotLinear("its base is reshaped before the sum")
    if any(_sizes(term.node) != _sizes(own.node) or _sizes(term.holder) != _sizes(own.node) for term in chains):
        raise NotLinear("it gives another shape than its base")
    has_shift = any(part.has_shift for part in (base, *(part for part, _ in terms)))

    def values() -> Values:
        matrix, shift = base.values()
        for part, sign in terms:
            more, moved = part.values()
            matrix = matrix + sign * more
            if moved is not None:
                shift = sign * moved if shift is None else shift + sign * moved
        return matrix, shift

    return replace(base, has_shift=has_shift, values=values)


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]
