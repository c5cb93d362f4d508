"""Layers as regions with one entry and one exit, and their copies with shared weights.

A layer runs from the stream that its first branch reads to the sum (or its norm) that its last one ends in. A copy
reads another stream and the same weights, masks and positions. In a decoder with a cache it stands for the tokens of
this call alone: where the layer joins past keys to its own, the copy has its own, and of masks over past and present
tokens it reads the present ones.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import fx, nn

from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import PAST, Component, Dim
from vlmopt.graph.adapter_places import why_no_adapter
from vlmopt.graph.adapters import is_adapter
from vlmopt.graph.branches import Branch, find_branches, nodes_between
from vlmopt.graph.build import insert_call
from vlmopt.graph.canonical import writes
from vlmopt.graph.modules import get_at, placeholders
from vlmopt.graph.sizes import symbols_of

aten = torch.ops.aten

_ENDS = sys.maxsize  # of a slice: to the end


@dataclass(frozen=True)
class LayerRegion:
    """A layer: its name, the stream it reads, the value it ends in, and the nodes between, in graph order."""

    name: str
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    branches: tuple[Branch, ...]


def find_layer_regions(module: fx.GraphModule, without: Collection[fx.Node] = ()) -> list[LayerRegion]:
    """The layers of a canonical graph in the order of the stream.

    Args:
        without: branches that end in one of these are left out.
    """
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    left_out = set(without)
    own = (branch for branch in find_branches(module) if branch.exit not in left_out)
    found: list[LayerRegion] = []
    for _, group in groupby(own, key=lambda branch: branch.layer):
        branches = tuple(group)
        entry, last = branches[0].stream, branches[-1].exit
        nodes = tuple(nodes_between(entry, last, order))
        found.append(LayerRegion(branches[0].layer_name, entry, last, nodes, branches))
    return found


@dataclass(frozen=True)
class OwnPast:
    """What a decoder kept of the tokens before this call.

    `values` are its inputs, and what is made of them and of constants alone. `places` tells for every symbol of the
    number of past tokens the input and the axis that it is the size of: one number may have several symbols, and none
    where it is fixed (nothing is past in a joined program). `totals` are symbols of past and present tokens together.
    """

    values: frozenset[fx.Node]
    first: tuple[fx.Node, int]
    places: Mapping[str, tuple[fx.Node, int]]
    totals: frozenset[str]

    def symbols_in(self, size: object) -> list[str]:
        """The symbols of past tokens in a size."""
        return [symbol for symbol in _symbols(size) if symbol in self.places]

    def is_in(self, size: object) -> bool:
        return bool(self.symbols_in(size)) or not self.totals.isdisjoint(_symbols(size))

    def joined_to(self, node: fx.Node) -> fx.Node | None:
        """The value of this call that the node joins to past ones."""
        operands = node.args[0] if node.target is aten.cat.default else ()
        if not isinstance(operands, list | tuple) or len(operands) != 2 or operands[0] not in self.values:
            return None
        return operands[1] if isinstance(operands[1], fx.Node) and operands[1] not in self.values else None


def _symbols(size: object) -> list[str]:
    return symbols_of(size) if isinstance(size, torch.SymInt) else []


def own_past(component: Component, dims: Mapping[str, Dim]) -> OwnPast | None:
    """The keys and values of a component's own past tokens; None where it has no such inputs."""
    pairs = list(zip(component.inputs, placeholders(component.graph), strict=True))
    found = [(n, s.shape.index("past")) for s, n in pairs if s.name.startswith(PAST) and "past" in s.shape]
    if not found:
        return None
    places = {symbol: (node, axis) for node, axis in found for symbol in _symbols(node.meta["val"].shape[axis])}
    sums = {name for name, dim in dims.items() if "past" in dim.sum_of}
    totals = {
        symbol
        for spec, node in pairs
        for name, size in zip(spec.shape, node.meta["val"].shape, strict=True)
        if name in sums
        for symbol in _symbols(size)
    }
    values = {node for node, _ in found}
    for node in component.graph.graph.nodes:
        made_of = [one for one in node.all_input_nodes if one.op != "get_attr"]
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        if node.op == "call_function" and is_tensor and made_of and values.issuperset(made_of):
            values.add(node)
    return OwnPast(frozenset(values), found[0], places, frozenset(totals - places.keys()))


def n_past(component: Component, past: OwnPast, symbol: str = "") -> fx.Node:
    """A new node at the present insertion point: the number of past tokens, under this symbol."""
    return insert_call(component.graph, aten.sym_size.int, past.places.get(symbol, past.first))


def why_not_repeated(component: Component, layer: LayerRegion, dims: Mapping[str, Dim]) -> str:
    """Why no copy of the layer can be read in its place; empty where one can."""
    if all(map(is_adapter, layer.branches)):
        return "only an adapter is left of it"
    shapes = [[str(size) for size in node.meta["val"].shape] for node in (layer.entry, layer.exit)]
    if not layer.nodes or shapes[0] != shapes[1]:
        return "it does not end in what it begins with, so it cannot read its own output"
    if reason := why_no_adapter(layer.exit):
        return reason
    past = own_past(component, dims)
    for node in layer.nodes:
        reason = _side_effect(component.graph, node)
        if not reason and past is not None and past.values.intersection(node.all_input_nodes):
            reason = "reads past keys other than by joining its own to them" if past.joined_to(node) is None else ""
        if reason:
            return f"{node.name} {reason}"
    return ""


def _side_effect(module: fx.GraphModule, node: fx.Node) -> str:
    """What makes a second call of the node differ from the first, or change what others see; empty if nothing."""
    if node.op == "call_module":
        leaf = get_at(module, str(node.target))
        assert isinstance(leaf, nn.Module)
        parts = list(leaf.modules())
        if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            return "has hooks, which may have side effects"
        kinds = nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm
        if any(part.training and isinstance(part, kinds) for part in parts):
            return "is in training mode: it draws random numbers, or changes its statistics"
        return ""
    if writes(node):
        return "writes a value in place"
    if isinstance(node.target, torch._ops.OpOverload):
        return "draws random numbers" if _is_random(node, node.target) else ""
    is_arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math")
    return (
        "" if is_arithmetic else f"calls {getattr(node.target, '__name__', node.target)}, which may have side effects"
    )


def _is_random(node: fx.Node, target: torch._ops.OpOverload) -> bool:
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = {argument.name: value for argument, value in zip(target._schema.arguments, node.args, strict=False)}
    given |= node.kwargs
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    switches = [(defaults | given).get(name) for name in ("train", "dropout_p") if name in {**defaults, **given}]
    return not any(value in (False, 0.0) for value in switches)


@dataclass
class _Copying:
    """Copies a layer node by node at the present insertion point."""

    component: Component
    past: OwnPast | None
    known: dict[fx.Node, object]
    sides: dict[fx.Node, object] = field(default_factory=dict)

    def copied(self, node: fx.Node) -> object:
        if self.past is not None and (own := self.past.joined_to(node)) is not None:
            return self._read(own)
        operands = {operand: self._read(operand) for operand in node.all_input_nodes}
        args = fx.node.map_arg(node.args, lambda n: operands[n])  # type: ignore[arg-type, return-value]
        kwargs = fx.node.map_arg(node.kwargs, lambda n: operands[n])  # type: ignore[arg-type, return-value]
        is_same = all(_value(old) == _value(new) for old, new in operands.items())
        if node.op == "call_function" and not is_same:
            return self._computed(node, args, kwargs)
        made = self.component.graph.graph.create_node(node.op, node.target, args, kwargs)
        made.meta["val"] = node.meta["val"] if is_same else self._through_leaf(node, made)
        return made

    def _computed(self, node: fx.Node, args: object, kwargs: object) -> fx.Node:
        """A call on values of other shapes than the original's.

        Raises:
            VlmoptError: it does not accept them.
        """
        try:
            return insert_call(self.component.graph, node.target, args, kwargs)  # type: ignore[arg-type]
        except Exception as error:
            found = "cannot be computed without the past tokens"
            raise VlmoptError(f"{self.component.name}/{node.name}", found) from error

    @staticmethod
    def _through_leaf(node: fx.Node, made: fx.Node) -> torch.Tensor:
        """The value of a leaf that keeps all axes but the last."""
        (operand,) = made.all_input_nodes
        found: torch.Tensor = operand.meta["val"].new_empty(
            (*operand.meta["val"].shape[:-1], node.meta["val"].shape[-1])
        )
        return found

    def _read(self, node: fx.Node) -> object:
        """What the copy reads in the place of a node."""
        if node in self.known:
            return self.known[node]
        if node not in self.sides:
            self.sides[node] = self._beside(node)
        return self.sides[node]

    def _beside(self, node: fx.Node) -> object:
        """What lies beside the layer, without the past tokens."""
        value, past = node.meta.get("val"), self.past
        if past is None or not isinstance(value, torch.Tensor | torch.SymInt):
            return node
        if isinstance(value, torch.SymInt):
            return self._less_past(node, value)
        found = node
        for axis, size in enumerate(value.shape):
            if past.is_in(size):
                (symbol, *_) = (*past.symbols_in(size), "")
                args = (found, axis, n_past(self.component, past, symbol), _ENDS)
                found = insert_call(self.component.graph, aten.slice.Tensor, args)
        return found

    def _less_past(self, node: fx.Node, size: torch.SymInt) -> fx.Node:
        """A number of tokens, past and present, less the past ones."""
        assert self.past is not None
        found = node
        if self.past.is_in(size):
            (symbol, *_) = (*self.past.symbols_in(size), "")
            count = n_past(self.component, self.past, symbol)
            found = insert_call(self.component.graph, operator.sub, (node, count))
        return found


def _value(node: object) -> tuple[object, ...]:
    """What decides whether a copy has its original's shape."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return tuple(str(size) for size in value.shape) if isinstance(value, torch.Tensor) else (str(value),)


def repeat_layer(
    component: Component, layer: LayerRegion, value: fx.Node, dims: Mapping[str, Dim]
) -> Mapping[fx.Node, fx.Node]:
    """Copies the layer at the present insertion point so that it reads `value`; its last node stands for the exit.

    Shapes: `value` has the shape of the layer's entry.

    Returns:
        For every node of the layer what stands for it in the copy.
    """
    copying = _Copying(component, own_past(component, dims), {layer.entry: value})
    for node in layer.nodes:
        copying.known[node] = copying.copied(node)
    return {node: made for node in layer.nodes if isinstance(made := copying.known[node], fx.Node)}
