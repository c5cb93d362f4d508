"""What must be cut together where a width is cut: the hidden channels of an FFN, the heads of an attention.

A group begins at the value that the Linears at the end read (its consumers), and takes in all values that hold the same
units, up to the Linears that make them (its producers), tensors that differ from unit to unit, and entries of a
decoder's cache. Whatever mixes units in between is a reason to leave them alone.

Source: the dependency graph of Torch-Pruning (Fang et al. 2023, arXiv 2301.12900). What differs: units are told apart
position by position, so grouped queries, fused projections and views with constants need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from vlmopt.core.program import PAST, PRESENT, Component, Program
from vlmopt.graph.branches import Branch, BranchKind
from vlmopt.graph.costing import weights_of
from vlmopt.graph.heads import find_attention
from vlmopt.graph.modules import get_at, is_adapter_call, output_values, placeholders
from vlmopt.graph.regions import is_linear_call
from vlmopt.graph.unit_axes import (
    FREE,
    SPLITS,
    Layout,
    Mixed,
    Together,
    aligned,
    aligned_up,
    axis_argument,
    n_axes,
    readers_of,
    refuse_normed,
)
from vlmopt.graph.unit_operations import passed_on

aten = torch.ops.aten

_ONE_HEAD = "it has one head"


@dataclass(frozen=True, eq=False)
class Group:
    """All that is cut together.

    `layouts` tells of every value that holds the units where they lie; `producers` are the Linears whose rows are cut,
    `consumers` those whose columns are; `source` [..., D] is the one value that all consumers read.
    """

    n_units: int
    layouts: Mapping[fx.Node, Layout]
    producers: tuple[fx.Node, ...]
    consumers: tuple[fx.Node, ...]
    source: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes whose value or whose weights a cut changes, in no order."""
        split = {user for node in self.layouts for user in node.users if user.target in SPLITS}
        return (*self.layouts, *self.consumers, *split)

    @property
    def columns(self) -> Tensor:
        """The positions in the source of every unit, [U, positions of a unit]."""
        units = self.layouts[self.source].units
        order = units.argsort(stable=True)  # those of no unit come first
        return order[int((units == FREE).sum()) :].reshape(self.n_units, -1)

    @property
    def cache(self) -> tuple[fx.Node, ...]:
        """Inputs that are entries of a decoder's cache."""
        return tuple(node for node in self.layouts if node.op == "placeholder")


def find_hidden(program: Program, component: Component, branch: Branch) -> Group | str:
    """The hidden channels of an FFN in front of the Linear that it ends in, or why they cannot be cut."""
    if branch.kind is not BranchKind.FFN:
        return f"is a branch of kind {branch.kind.value}, no FFN"
    last = _last_linear(component.graph, branch)
    if last is None:
        return "no Linear is a part of it"
    (source,) = last.all_input_nodes
    width = source.meta["val"].shape[-1]
    return _found(program, component, branch, source, Layout(n_axes(source) - 1, torch.arange(width)))


def find_head_groups(program: Program, component: Component, branch: Branch) -> Group | str:
    """The heads of an attention, those whose queries read one of several keys as one unit, or why they cannot be cut.

    Where all queries read the only key there is, it stays, and they are units of their own.
    """
    heads = find_attention(branch)
    if isinstance(heads, str):
        return heads
    n_heads = int(heads.mixed.meta["val"].shape[1])
    if n_heads == 1:
        return _ONE_HEAD
    found = _found(program, component, branch, heads.mixed, Layout(1, torch.arange(n_heads)))
    if isinstance(found, str):
        return found
    several = [node for node in (heads.queries, heads.keys, heads.values) if node.meta["val"].shape[1] != 1]
    if any(node not in found.layouts or found.layouts[node].axis != 1 for node in several):
        return "its heads are not what its queries, keys and values are made of"
    return _ONE_HEAD if found.n_units == 1 else found


def _last_linear(module: fx.GraphModule, branch: Branch) -> fx.Node | None:
    """The Linear that the branch ends in, with nothing but scales, norms and adapters behind it."""
    linears = [node for node in branch.region if is_linear_call(module, node) and not is_adapter_call(node)]
    return linears[-1] if linears else None


def _found(program: Program, component: Component, branch: Branch, start: fx.Node, layout: Layout) -> Group | str:
    units, group = layout.units, None
    while group is None:
        search = _Search(component, {start: Layout(layout.axis, units)})
        try:
            search.spread(start)
            group = search.group(int(units.max()) + 1)
        except Together as found:
            units = _merged(units, found.sets)
        except Mixed as reason:
            return str(reason)
    leaves = (node for node in (*group.layouts, *group.consumers) if node.op == "call_module")
    outside = next((node for node in leaves if node not in branch.region), None)
    if outside is not None:
        return f"its units lie in {outside.name} too, which is no part of it alone"
    return why_shared(program, component, group) or group


def _merged(units: Tensor, sets: Tensor) -> Tensor:
    """The units, those of a set as one, numbered anew."""
    name = list(range(int(units.max()) + 1))
    for row in sets.tolist():
        own = {name[unit] for unit in row if unit != FREE}
        name = [min(own) if one in own else one for one in name]
    made: Tensor = torch.unique(torch.tensor(name)[units], return_inverse=True)[1]
    return made


class _Search:
    """Spreads a layout from value to value until nothing more is learnt."""

    def __init__(self, component: Component, layouts: dict[fx.Node, Layout]) -> None:
        self._module, self._layouts = component.graph, layouts
        self._kept = {
            node: spec.name
            for node, spec in zip(output_values(component.graph), component.outputs, strict=True)
            if spec.name.startswith(PRESENT)
        }
        self._past = {
            node: spec.name
            for node, spec in zip(placeholders(component.graph), component.inputs, strict=True)
            if spec.name.startswith(PAST)
        }
        self._producers: dict[fx.Node, None] = {}
        self._consumers: dict[fx.Node, None] = {}

    def spread(self, start: fx.Node) -> None:
        pending = [start]
        while pending:
            value = pending.pop()
            for call in (value, *readers_of(value)):
                for node, layout in self._learnt(call, value).items():
                    known = self._layouts.get(node)
                    joined = layout if known is None else known.joined(layout)
                    is_new = known is None or not torch.equal(joined.units, known.units)
                    if is_new and bool((joined.units != FREE).any()):
                        self._layouts[node] = joined
                        pending.append(node)

    def _learnt(self, call: fx.Node, at: fx.Node) -> dict[fx.Node, Layout]:
        """The layouts of what the call reads and of its value, as far as they hold the units of `at`."""
        layout = self._layouts[at]
        if call.op == "call_function":
            if call.target is aten.sym_size.int:
                _refuse_measured(call, layout)
                return {}
            return passed_on(call, at, layout)
        if call.op == "call_module":
            return self._through_leaf(call, at, layout)
        if call.op == "placeholder" and call not in self._past:
            raise Mixed(f"{call.name} is an input")
        if call.op == "output" and at not in self._kept:
            raise Mixed(f"{at.name} is an output")
        return {}

    def _through_leaf(self, call: fx.Node, at: fx.Node, layout: Layout) -> dict[fx.Node, Layout]:
        leaf = get_at(self._module, str(call.target))
        (operand,) = call.all_input_nodes
        if isinstance(leaf, nn.Linear) and layout.axis == n_axes(at) - 1:
            if type(leaf) is not nn.Linear:
                raise Mixed(f"{call.name} is a {type(leaf).__name__}")
            (self._producers if at is call else self._consumers)[call] = None
            return {}
        if isinstance(leaf, nn.LayerNorm | nn.RMSNorm):
            refuse_normed(call, aligned(call, at, layout), len(leaf.normalized_shape))
        elif not isinstance(leaf, nn.Linear):
            raise Mixed(f"a {type(leaf).__name__.lower()} is part of it")
        above = aligned_up(call, operand, layout)
        return {call: layout} | ({} if above is None else {operand: above})

    def group(self, n_units: int) -> Group:
        """What was found.

        Raises:
            Mixed: it is no group that can be cut.
        """
        if not self._producers or not self._consumers:
            raise Mixed("no Linear makes its units" if self._consumers else "no Linear reads its units")
        sources = {operand for node in self._consumers for operand in node.all_input_nodes}
        if len(sources) > 1:
            raise Mixed(f"its units are read at several places: {', '.join(sorted(node.name for node in sources))}")
        (source,) = sources
        units = self._layouts[source].units
        counts = torch.bincount(units[units != FREE], minlength=n_units)
        if bool((counts != counts[0]).any()) or not bool(counts[0]):
            raise Mixed("its units differ in width")
        past = sorted(self._past[node] for node in self._layouts if node in self._past)
        kept = sorted(self._kept[node].replace(PRESENT, PAST, 1) for node in self._layouts if node in self._kept)
        if past != kept:
            raise Mixed("its entries in the cache are filled by another component")
        return Group(n_units, self._layouts, tuple(self._producers), tuple(self._consumers), source)


def _refuse_measured(call: fx.Node, layout: Layout) -> None:
    if axis_argument(call, 1, 0, n_axes(call.all_input_nodes[0])) == layout.axis:
        raise Mixed(f"{call.name} reads how many there are")


def why_shared(program: Program, component: Component, group: Group) -> str:
    """Which other call reads a weight that would be cut, and needs all of it; empty where none does."""
    own = (*group.producers, *group.consumers, *(node for node in group.layouts if node.op == "get_attr"))
    weights: dict[int, fx.Node] = {}
    for node in own:
        for tensor in weights_of(component.graph, node):
            if weights.setdefault(id(tensor), node) is not node:
                return f"{node.name} and {weights[id(tensor)].name} share a weight"
    for part in program.components.values():
        for node in part.graph.graph.nodes:
            if node not in own and any(id(tensor) in weights for tensor in weights_of(part.graph, node)):
                return f"{node.name} reads one of its weights too, and needs all of it"
    return ""
