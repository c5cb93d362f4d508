"""Low-rank adapters beside Linears, as edits of a graph. In rows: `y = x W + b + s u(x)`, `u` zero until it is trained.

1. LoRA (arXiv 2106.09685): `u = x A B`, A [d_in, r], B [r, d_out], `s = alpha / r`; rsLoRA (arXiv 2312.03732): the same
   with `s = alpha / sqrt(r)`.
2. Lily (arXiv 2407.09946): `u = x A_g (sum_e S_e B_e)`. A is shared by `stride` consecutive layers, the experts B by
   all layers of a family. `S` is a softmax: of numbers that each layer learns (`static`), or of what a router makes of
   `x A_g` (`routed`), averaged over batch and tokens after the softmax as the released code does; the paper's formula
   sums before it.
3. RaSA (arXiv 2503.12576): `u = x A B + x P diag(d) Q`. Each layer gives k of its ranks to P and Q, which all layers of
   a family share, and learns d of its own. As many parameters as LoRA, and the d. Its init of d is not known here: one.

A family are the Linears of one shape whose paths differ by numbers alone. All but routed Lily fold exactly.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, fx, nn

from vlmopt.graph.adapters import site_name
from vlmopt.graph.branches import find_branches
from vlmopt.graph.build import insert_call
from vlmopt.graph.modules import ADAPTERS, get_at, has_path, is_adapter_call, set_at
from vlmopt.graph.regions import is_linear_call

aten = torch.ops.aten

_OWN = "low_rank"


class LowRankKind(Enum):
    LORA = "lora"
    RSLORA = "rslora"
    LILY = "lily"
    RASA = "rasa"


@dataclass(frozen=True)
class LowRankForm:
    """What a low-rank adapter is made of.

    Args:
        scale: the factor s, whatever the kind makes of alpha.
        stride: layers that share A in Lily.
        n_experts: of Lily.
        is_routed: Lily's mixture looks at the data.
        shared_rank: ranks that each layer gives away in RaSA.
    """

    kind: LowRankKind
    rank: int
    scale: float
    stride: int = 1
    n_experts: int = 2
    is_routed: bool = False
    shared_rank: int = 1

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("stride", self.stride), ("experts", self.n_experts)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale is {self.scale}; expected a finite number")
        if self.kind is LowRankKind.RASA and not 0 < self.shared_rank < self.rank:
            raise ValueError(f"shared_rank is {self.shared_rank}; expected 1 to {self.rank - 1}, less than the rank")

    @classmethod
    def named(
        cls, kind: str, rank: int, alpha: float, *, stride: int, n_experts: int, is_routed: bool, shared_rank: int
    ) -> LowRankForm:
        """The form by the words that options use: alpha is over the rank, its root (rsLoRA), or nothing (Lily)."""
        divisor = {"rslora": math.sqrt(max(rank, 1)), "lily": 1.0}.get(kind, max(rank, 1))
        return cls(LowRankKind(kind), rank, alpha / divisor, stride, n_experts, is_routed, shared_rank)


@dataclass(frozen=True)
class Target:
    """A Linear that may get an adapter: its only call, its family, and its number among the layers of the family."""

    call: fx.Node
    family: str
    number: int
    n_layers: int

    @classmethod
    def named(cls, module: fx.GraphModule, names: Sequence[str]) -> Target | None:
        """What `names` of a target says, in another copy of its graph; None where its Linear is gone."""
        path, family, number, n_layers = names
        calls = (node for node in module.graph.nodes if node.target == path and is_linear_call(module, node))
        call = next(calls, None)
        return None if call is None else cls(call, family, int(number), int(n_layers))

    @property
    def names(self) -> tuple[str, ...]:
        return self.path, self.family, str(self.number), str(self.n_layers)

    @property
    def path(self) -> str:
        return str(self.call.target)

    @property
    def own(self) -> str:
        """Where the parts lie that belong to this layer alone."""
        return f"{ADAPTERS}.{site_name(self.path)}.{_OWN}"


def find_targets(module: fx.GraphModule, is_wanted: Callable[[str], bool]) -> list[Target]:
    """The wanted Linears of the graph, adapted ones among them, in its order; one that is called twice comes twice."""
    calls = [node for node in module.graph.nodes if is_linear_call(module, node) and not is_adapter_call(node)]
    families: dict[str, list[fx.Node]] = {}
    names: dict[fx.Node, str] = {}
    for call in calls:
        if is_wanted(str(call.target)):
            names[call] = _family(module, call)
            families.setdefault(names[call], []).append(call)
    return [Target(call, name, families[name].index(call), len(families[name])) for call, name in names.items()]


def _family(module: fx.GraphModule, call: fx.Node) -> str:
    leaf = get_at(module, str(call.target))
    assert isinstance(leaf, nn.Linear)
    words = re.sub(r"\.\d+(?=\.|$)", "", f".{call.target}")[1:] or "layers"
    return f"{site_name(words).replace('.', '_')}_{leaf.in_features}_{leaf.out_features}"


def is_adapted(module: fx.GraphModule, target: Target) -> bool:
    return has_path(module, target.own)


def branch_kinds(module: fx.GraphModule) -> dict[str, str]:
    """The kind of the branch that each module lies in."""
    kinds: dict[str, str] = {}
    for branch in find_branches(module):
        kinds |= {str(node.target): branch.kind.value for node in branch.region if node.op == "call_module"}
    return kinds


def insert_low_rank(module: fx.GraphModule, target: Target, form: LowRankForm, *, seed: int = 0) -> fx.Node:
    """The sum of the layer and its adapter, which all that read the layer read from now on."""
    return _Insertion(module, target, form, seed).insert()


@dataclass(frozen=True)
class _Insertion:
    module: fx.GraphModule
    target: Target
    form: LowRankForm
    seed: int

    def insert(self) -> fx.Node:
        call = self.target.call
        readers = list(call.users)
        with self.module.graph.inserting_before(call.next):
            change = insert_call(self.module, aten.mul.Tensor, (self._change(), self.form.scale))
            total = insert_call(self.module, aten.add.Tensor, (call, change))
        for reader in readers:
            reader.replace_input_with(call, total)
        return total

    def _change(self) -> fx.Node:
        (value,) = self.target.call.all_input_nodes
        own, form = self.target.own, self.form
        if form.kind is LowRankKind.LILY:
            return self._lily(value)
        rank = form.rank - (form.shared_rank if form.kind is LowRankKind.RASA else 0)
        made = self._linear(f"{own}.up", self._linear(f"{own}.down", value, rank), self._width, is_zero=True)
        if form.kind is not LowRankKind.RASA:
            return made
        pool, n_pool = f"{ADAPTERS}.{self.target.family}", self.target.n_layers * form.shared_rank
        hidden = self._linear(f"{pool}.pool_down", value, n_pool)
        hidden = insert_call(
            self.module, aten.mul.Tensor, (hidden, self._tensor(f"{own}.share", self._filled((n_pool,), 1.0)))
        )
        shared = self._linear(f"{pool}.pool_up", hidden, self._width, is_zero=True)
        return insert_call(self.module, aten.add.Tensor, (made, shared))

    def _lily(self, value: fx.Node) -> fx.Node:
        own, form, pool = self.target.own, self.form, f"{ADAPTERS}.{self.target.family}"
        hidden = self._linear(f"{pool}.down_{self.target.number // form.stride}", value, form.rank)
        if form.is_routed:
            scores = self._linear(f"{own}.route", hidden, form.n_experts)
            shares = insert_call(self.module, aten.softmax.int, (scores, -1))
            axes = list(range(shares.meta["val"].dim() - 1))
            shares = insert_call(self.module, aten.mean.dim, (shares, axes))
            shares = insert_call(self.module, aten.unsqueeze.default, (shares, 0))
        else:
            # Apart from the start: experts that begin at zero with equal shares get equal gradients, and stay equal.
            shares = self._tensor(f"{own}.mixture", self._weight(f"{own}.mixture", (1, form.n_experts), 1.0))
            shares = insert_call(self.module, aten.softmax.int, (shares, -1))
        experts = self._tensor(f"{pool}.experts", self._filled((form.n_experts, self._width * form.rank), 0.0))
        weight = insert_call(self.module, aten.matmul.default, (shares, experts))
        weight = insert_call(self.module, aten.view.default, (weight, [self._width, form.rank]))
        return insert_call(self.module, aten.linear.default, (hidden, weight))

    @property
    def _width(self) -> int:
        return int(self.target.call.meta["val"].shape[-1])

    def _linear(self, path: str, operand: fx.Node, width: int, *, is_zero: bool = False) -> fx.Node:
        """A call of the Linear at the path, which is made where none lies there yet."""
        value = operand.meta["val"]
        if not has_path(self.module, path):
            d_in = int(value.shape[-1])
            leaf = nn.Linear(d_in, width, bias=False, device="meta")
            leaf.weight = self._weight(path, (width, d_in), 0.0 if is_zero else 1.0 / math.sqrt(d_in))
            set_at(self.module, path, leaf.train(False))
        node = self.module.graph.call_module(path, (operand,))
        node.meta["val"] = value.new_empty((*value.shape[:-1], width))
        return node

    def _tensor(self, path: str, start: nn.Parameter) -> fx.Node:
        """The parameter at the path; where none lies there yet, it is this one."""
        if not has_path(self.module, path):
            set_at(self.module, path, start)
        node = self.module.graph.create_node("get_attr", path)
        node.meta["val"] = self.target.call.meta["val"].new_empty(tuple(start.shape))
        return node

    def _filled(self, shape: Sequence[int], value: float) -> nn.Parameter:
        like = self.target.call.meta["val"]
        return nn.Parameter(torch.full(tuple(shape), value).to(dtype=like.dtype, device=like.device))

    def _weight(self, path: str, shape: tuple[int, int], bound: float) -> nn.Parameter:
        """Uniform within the bound: what torch draws for a Linear, and all kinds for A."""
        like: Tensor = self.target.call.meta["val"]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {path}".encode()))
        drawn = (torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound
        return nn.Parameter(drawn.to(dtype=like.dtype, device=like.device))
