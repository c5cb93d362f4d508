"""Layer traversal (TroL, arXiv 2406.12246) as an edit of a graph: a layer reads its own output a second time.

`h1 = L(x)`, `h2 = L(h1)` with the same weights, masks and positions, for every token `w = 0.5 tanh(h1 u + b) + 0.5`,
and `y = h1 + w (h2 - h1)`. With more passes each reads what the gate before it made, and has a gate of its own.

What differs from the released code:

1. Every layer has a gate of its own; there all are one module.
2. A closed gate is `s w` with a number s that is learned and begins at zero: `y` is `h1` to the bit, and s has a
   gradient, where a saturated tanh has none. The paper's own beginning has no s.
3. The second pass may have low-rank adapters of its own, zero until trained (as in Relaxed Recursive Transformers,
   arXiv 2410.20672).
4. In a decoder with a cache the traversal counts where nothing is past, so for the prompt; the released code asks for
   more than one token. Keys and values of the first pass are kept, and those of the second are seen by the prompt
   alone. A joined program traverses the prompt and not the answer, as decoding does, where the paper trains on both.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, fx, nn

from vlmopt.core.cost import Cost
from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import Component, Dim, Program
from vlmopt.graph.adapters import site_name
from vlmopt.graph.assembled import DECODER
from vlmopt.graph.branches import nodes_between
from vlmopt.graph.build import insert_call
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.costing import component_cost
from vlmopt.graph.layer_regions import (
    LayerRegion,
    find_layer_regions,
    n_past,
    own_past,
    repeat_layer,
    why_not_repeated,
)
from vlmopt.graph.marks import hand_marks_on
from vlmopt.graph.modules import ADAPTERS, clone_graph, free_path, is_adapter_call, set_at
from vlmopt.graph.regions import is_linear_call

aten = torch.ops.aten

_GATE = re.compile(rf"^{ADAPTERS}\.(.+)\.traversal_(\d+)\.gate(?:_\d+)?$")


class Start(Enum):
    CLOSED = "closed"  # a learned scale of zero: the program computes what it did
    PAPER = "paper"


@dataclass(frozen=True)
class TraversalForm:
    """How a layer is traversed.

    Args:
        times: passes after the first.
        rank: of the low-rank adapters that each pass after the first has for itself; 0 for none.
        scale: of those adapters.
    """

    times: int = 1
    start: Start = Start.CLOSED
    has_bias: bool = True
    rank: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.times <= 3:
            raise ValueError(f"times is {self.times}; expected 1 to 3 passes after the first")
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}; expected 0 for no adapters, or more")
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale is {self.scale}; expected a finite number")


@dataclass(frozen=True)
class Traversal:
    """A traversal that lies in a graph: the layer it was made for, what the first pass gives, the value that takes its
    place, the gates' values w [.., 1] and what is behind each in order of the passes, and the choice between first pass
    and traversal where there is one.
    """

    site: str
    first: fx.Node
    result: fx.Node
    gates: tuple[fx.Node, ...]
    totals: tuple[fx.Node, ...]
    choice: fx.Node | None

    def nodes(self, order: Mapping[fx.Node, int]) -> tuple[fx.Node, ...]:
        """Everything between the first pass and the result."""
        return tuple(nodes_between(self.first, self.result, dict(order)))


def layers_to_traverse(component: Component) -> list[LayerRegion]:
    """The layers of the model, second passes apart."""
    return find_layer_regions(component.graph, traversed_nodes(component.graph))


def why_not_traversed(program: Program, component: Component, layer: LayerRegion) -> str:
    """Why the layer cannot be traversed; empty where it can."""
    if any(one.first is layer.exit for one in find_traversals(component.graph)):
        return "is traversed already"
    if program.generation is not None and component.name == DECODER and own_past(component, program.dims) is None:
        return "its decoder keeps no keys, so a step cannot tell the prompt from the answer"
    return why_not_repeated(component, layer, program.dims)


def traversal_saving(program: Program, component: Component, layer: LayerRegion, form: TraversalForm) -> Cost | str:
    """What a traversal saves, which is less than nothing, counted on a copy; or why there can be none."""
    trial = replace(component, graph=clone_graph(component.graph))
    own = next(one for one in layers_to_traverse(trial) if one.name == layer.name)
    try:
        insert_traversal(trial, own, form, program.dims)
    except VlmoptError as error:
        return f"{error.place} {error.found}"
    return component_cost(component, program.dims) - component_cost(trial, program.dims)


def insert_traversal(
    component: Component, layer: LayerRegion, form: TraversalForm, dims: Mapping[str, Dim], *, seed: int = 0
) -> fx.Node:
    """The value that all that read the layer's output read from now on."""
    return _Insertion(component, layer, form, dims, seed).insert()


@dataclass(frozen=True)
class _Insertion:
    component: Component
    layer: LayerRegion
    form: TraversalForm
    dims: Mapping[str, Dim]
    seed: int

    @property
    def module(self) -> fx.GraphModule:
        return self.component.graph

    def insert(self) -> fx.Node:
        first = self.layer.exit
        readers = list(first.users)
        past = own_past(self.component, self.dims)
        with self.module.graph.inserting_before(first.next):
            value = first
            for number in range(1, self.form.times + 1):
                value = self._passed(value, number)
            if past is not None:
                count = n_past(self.component, past)
                with _fake_mode(first):
                    held = insert_call(self.module, aten.scalar_tensor.default, (count,), {"dtype": torch.int64})
                nothing_past = insert_call(self.module, aten.eq.Scalar, (held, 0))
                value = insert_call(self.module, aten.where.self, (nothing_past, value, first))
        for reader in readers:
            reader.replace_input_with(first, value)
        hand_marks_on(first, value)  # what was skipped behind this layer lies behind its traversal
        return value

    def _passed(self, value: fx.Node, number: int) -> fx.Node:
        """`h + w (L(h) - h)`."""
        site = f"{ADAPTERS}.{site_name(self.layer.name)}.traversal_{number}"
        copies = repeat_layer(self.component, self.layer, value, self.dims)
        if self.form.rank:
            self._adapt(copies, site)
        weight = self._gate(value, site)
        again = copies[self.layer.exit]
        change = insert_call(self.module, aten.sub.Tensor, (again, value))
        change = insert_call(self.module, aten.mul.Tensor, (weight, change))
        return insert_call(self.module, aten.add.Tensor, (value, change))

    def _gate(self, value: fx.Node, site: str) -> fx.Node:
        width = int(value.meta["val"].shape[-1])
        score = self._linear(f"{site}.gate", value, 1, has_bias=self.form.has_bias, bound=1.0 / math.sqrt(width))
        weight = insert_call(self.module, aten.tanh.default, (score,))
        weight = insert_call(self.module, aten.mul.Tensor, (weight, 0.5))
        weight = insert_call(self.module, aten.add.Tensor, (weight, 0.5))
        if self.form.start is Start.PAPER:
            return weight
        like = value.meta["val"]
        path = free_path(self.module, f"{site}.scale")
        set_at(self.module, path, nn.Parameter(torch.zeros(1).to(dtype=like.dtype, device=like.device)))
        scale = self.module.graph.create_node("get_attr", path)
        scale.meta["val"] = like.new_empty((1,))
        return insert_call(self.module, aten.mul.Tensor, (weight, scale))

    def _adapt(self, copies: Mapping[fx.Node, fx.Node], site: str) -> None:
        """Low-rank adapters of the copy alone, beside its Linears."""
        made = dict.fromkeys(copies.values())
        calls = [node for node in made if is_linear_call(self.module, node) and not is_adapter_call(node)]
        for call in calls:
            readers, (operand,) = list(call.users), call.all_input_nodes
            path, width = f"{site}.low_rank.{site_name(str(call.target))}", int(call.meta["val"].shape[-1])
            with self.module.graph.inserting_before(call.next):
                bound = 1.0 / math.sqrt(int(operand.meta["val"].shape[-1]))
                hidden = self._linear(f"{path}.down", operand, self.form.rank, has_bias=False, bound=bound)
                change = self._linear(f"{path}.up", hidden, width, has_bias=False, bound=0.0)
                change = insert_call(self.module, aten.mul.Tensor, (change, self.form.scale))
                total = insert_call(self.module, aten.add.Tensor, (call, change))
            for reader in readers:
                reader.replace_input_with(call, total)

    def _linear(self, path: str, operand: fx.Node, width: int, *, has_bias: bool, bound: float) -> fx.Node:
        """A call of a new Linear, its weights uniform within the bound as torch draws them."""
        like: Tensor = operand.meta["val"]
        free, d_in = free_path(self.module, path), int(like.shape[-1])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {free}".encode()))
        leaf = nn.Linear(d_in, width, bias=has_bias, device="meta")
        for name, parameter in list(leaf.named_parameters()):
            drawn = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
            setattr(leaf, name, nn.Parameter(drawn.to(dtype=like.dtype, device=like.device)))
        set_at(self.module, free, leaf.train(False))
        node = self.module.graph.call_module(free, (operand,))
        node.meta["val"] = like.new_empty((*like.shape[:-1], width))
        return node


def _fake_mode(node: fx.Node) -> torch._subclasses.FakeTensorMode:
    """The mode that the node's fake value lives in: a size is no constant there."""
    mode: torch._subclasses.FakeTensorMode = node.meta["val"].fake_mode
    return mode


def find_traversals(module: fx.GraphModule) -> list[Traversal]:
    """The traversals of a graph, in its order."""
    passes: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        found = _GATE.match(str(node.target)) if node.op == "call_module" else None
        if found is not None:
            passes.setdefault(found[1], []).append(node)
    return [one for site, calls in passes.items() if (one := _traversal(site, calls)) is not None]


def _traversal(site: str, calls: list[fx.Node]) -> Traversal | None:
    """The traversal around the gates' scores; None where an edit has changed its form."""
    gates: list[fx.Node] = []
    totals: list[fx.Node] = []
    for call in calls:
        weight = _weight_of(call)
        total = None if weight is None else _sum_behind(weight)
        if weight is None or total is None:
            return None
        gates.append(weight)
        totals.append(total)
    first, total = calls[0].all_input_nodes[0], totals[-1]
    choices = [n for n in total.users if n.target is aten.where.self and n.args[1] is total and n.args[2] is first]
    choice = choices[0] if choices else None
    return Traversal(site, first, total if choice is None else choice, tuple(gates), tuple(totals), choice)


def _weight_of(score: fx.Node) -> fx.Node | None:
    """What the change `L(h) - h` is multiplied with, made of a gate's score."""
    node = score
    while len(node.users) == 1:
        (reader,) = node.users
        if reader.target is aten.mul.Tensor and any(n.target is aten.sub.Tensor for n in reader.all_input_nodes):
            return node
        node = reader
    return None


def _sum_behind(weight: fx.Node) -> fx.Node | None:
    """`h + w (L(h) - h)` behind `w`."""
    node = weight
    for target in (aten.mul.Tensor, aten.add.Tensor):
        readers = list(node.users)
        if len(readers) != 1 or readers[0].target is not target:
            return None
        node = readers[0]
    return node


def traversed_nodes(module: fx.GraphModule) -> frozenset[fx.Node]:
    """The nodes of all second passes with their gates."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    return frozenset(node for one in find_traversals(module) for node in one.nodes(order))


def drop_traversal(module: fx.GraphModule, traversal: Traversal, *, n_kept: int = 0) -> None:
    """Drops the passes behind the first `n_kept` after the first one; what only they needed goes.

    With none kept, all that read the result read the first pass.
    """
    if n_kept >= len(traversal.gates):
        return
    last = traversal.totals[n_kept - 1] if n_kept else traversal.first
    if n_kept and traversal.choice is not None:
        traversal.choice.replace_input_with(traversal.totals[-1], last)
    else:
        hand_marks_on(traversal.result, last)
        traversal.result.replace_all_uses_with(last)
    drop_dead_nodes(module)
