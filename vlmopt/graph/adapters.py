"""Adapters as edits of a graph: small trainable maps `A(x)` of ordinary `torch.nn` leaves, added to a value.

Three forms, in rows (`x` [..., d], `W_dn` [d, r], `W_up` [r, d]):

1. bottleneck: `A(x) = relu(LN(x) W_dn + b_dn) W_up + b_up`, the "ParallelAdapter" of the released code of Dynamic
   Architecture Skipping (arXiv 2309.01479); the norm can be left out.
2. linear: `A(x) = x C B`, with biases if wanted, and neither norm nor activation: what lies directly in front of linear
   maps folds into them (arXiv 2403.15226, without its routing and its mean over the tokens).
3. routed: `A(x) = w0 B(x C) + w1 D(x C)`, linear for given weights `w = softmax(x[0] R / 10)` that the first token sets
   (the "RepAdapter" of LaVIN, arXiv 2305.15023). B and D [r, d] are grouped: the first half of the hidden values makes
   the first half of the output. Without its dropout.

What differs here: the up-projection begins at zero, so that an inserted adapter changes nothing until it is trained.
`Init.PAPER` begins as the released code does, with normal weights of deviation 0.02 in both projections.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, fx, nn

from vlmopt.core.cost import Cost
from vlmopt.core.program import Component, Dim, Program
from vlmopt.graph.adapter_places import AdapterPlace
from vlmopt.graph.branches import Branch
from vlmopt.graph.build import insert_call, insert_leaf
from vlmopt.graph.modules import ADAPTERS, get_at, has_path, is_adapter_call
from vlmopt.graph.sizes import counting_sizes, shape_of

aten = torch.ops.aten

PAPER_DEVIATION = 0.02
_TEMPERATURE = 10.0  # of a routed adapter


class AdapterKind(Enum):
    BOTTLENECK = "bottleneck"
    LINEAR = "linear"
    ROUTED = "routed"


class Init(Enum):
    ZERO = "zero"  # up-projection and biases zero: the program computes what it did
    PAPER = "paper"


@dataclass(frozen=True)
class AdapterForm:
    """What an adapter is made of.

    Args:
        has_norm: a norm of its own in front of the bottleneck; a linear adapter has none.
        has_bias: a linear adapter may do without biases; the others have them.
    """

    kind: AdapterKind
    rank: int
    init: Init = Init.ZERO
    has_norm: bool = True
    has_bias: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected at least 1")
        if self.kind is AdapterKind.ROUTED and self.rank % 2:
            raise ValueError(f"rank is {self.rank}; a routed adapter has two groups, so expected an even number")

    @classmethod
    def named(cls, kind: str, rank: int, *, init: str, has_norm: bool, has_bias: bool) -> AdapterForm:
        """The form by the words that options use; `eas` is the place of a linear adapter, not a form of its own."""
        form = AdapterKind.LINEAR if kind == "eas" else AdapterKind(kind)
        return cls(form, rank, Init(init), has_norm=has_norm, has_bias=has_bias)

    @property
    def is_normed(self) -> bool:
        return self.has_norm and self.kind is AdapterKind.BOTTLENECK

    @property
    def is_biased(self) -> bool:
        return self.has_bias or self.kind is not AdapterKind.LINEAR

    def unfit(self, value: fx.Node) -> str:
        """Why no adapter of this form can read the value; empty where it can."""
        shape = value.meta["val"].shape
        if self.kind is AdapterKind.ROUTED and (len(shape) < 3 or shape[-1] % 2):
            return f"a routed adapter reads tokens [B, N, D] of an even width, and this value has {len(shape)} axes"
        return ""

    def parameters(self, width: int) -> int:
        """`2 d r + r + d`, and `2 d` more for the norm; routed `2 d r + r + 2 d` and the router's `2 d + 2`."""
        if self.kind is AdapterKind.ROUTED:
            return 2 * width * self.rank + self.rank + 4 * width + 2
        biases = self.rank + width if self.is_biased else 0
        return 2 * width * self.rank + biases + (2 * width if self.is_normed else 0)


@dataclass(frozen=True)
class Adapter:
    """An adapter that lies in a graph: the site it was made for and its calls, in graph order."""

    site: str
    calls: tuple[fx.Node, ...]


def insert_adapter(
    module: fx.GraphModule, place: AdapterPlace, form: AdapterForm, *, site: str, seed: int = 0
) -> fx.Node:
    """The sum with the adapter, which the place's readers read from now on.

    Args:
        site: names the modules, `adapters.SITE.down` and so on.
        seed: of the weights; each site draws its own.
    """
    value, total = place.value, place.total
    readers = list(total.users) if place.readers is None else place.readers
    with module.graph.inserting_before(_behind(total)):
        change = _insert_map(module, value, form, site=site, seed=seed)
        result = insert_call(module, aten.add.Tensor, (total, change))
    for reader in readers:
        reader.replace_input_with(total, result)
    return result


def _behind(node: fx.Node) -> fx.Node:
    """The node in front of which something that reads `node` may be inserted; inputs stay in front of all else."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def _insert_map(module: fx.GraphModule, value: fx.Node, form: AdapterForm, *, site: str, seed: int) -> fx.Node:
    like = value.meta["val"]
    path = _free_site(module, site)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))
    width, rank = int(like.shape[-1]), form.rank
    operand = value
    if form.is_normed:
        norm = nn.LayerNorm(width, device="meta")
        operand = insert_leaf(module, f"{path}.norm", _filled(norm, torch.ones(width), torch.zeros(width), like), value)
    is_zero = form.init is Init.ZERO
    down = _linear(width, rank, form, generator, like, 1.0 / math.sqrt(width) if is_zero else PAPER_DEVIATION)
    if form.kind is AdapterKind.ROUTED:
        hidden = insert_leaf(module, f"{path}.down", down, operand)
        return _insert_routed(module, path, value, hidden, form, generator)
    up = _linear(rank, width, form, generator, like, 0.0 if is_zero else PAPER_DEVIATION)
    hidden = insert_leaf(module, f"{path}.down", down, operand)
    if form.kind is AdapterKind.BOTTLENECK:
        hidden = insert_call(module, aten.relu.default, (hidden,))
    return insert_leaf(module, f"{path}.up", up, hidden)


def _insert_routed(
    module: fx.GraphModule, path: str, value: fx.Node, hidden: fx.Node, form: AdapterForm, generator: torch.Generator
) -> fx.Node:
    """The two maps of the hidden values, weighed by what the first token says."""
    like = value.meta["val"]
    width, half = int(like.shape[-1]), int(like.shape[-1]) // 2
    first = insert_call(module, aten.select.int, (value, -2, 0))
    router = _linear(width, 2, form, generator, like, 1.0 / math.sqrt(width))
    scores = insert_leaf(module, f"{path}.route", router, first)
    scores = insert_call(module, aten.mul.Tensor, (scores, 1.0 / _TEMPERATURE))
    weights = insert_call(module, aten.unsqueeze.default, (insert_call(module, aten.softmax.int, (scores, -1)), -2))
    shares = [insert_call(module, aten.slice.Tensor, (weights, -1, i, i + 1)) for i in range(2)]
    deviation = 0.0 if form.init is Init.ZERO else PAPER_DEVIATION
    parts = []
    for i in range(2):
        start = i * form.rank // 2
        own = insert_call(module, aten.slice.Tensor, (hidden, -1, start, start + form.rank // 2))
        up = _linear(form.rank // 2, width, form, generator, like, deviation)
        made = insert_leaf(module, f"{path}.up_{i}", up, own)
        terms = []
        for j, share in enumerate(shares):
            side = insert_call(module, aten.slice.Tensor, (made, -1, j * half, (j + 1) * half))
            terms.append(insert_call(module, aten.mul.Tensor, (side, share)))
        parts.append(insert_call(module, aten.add.Tensor, (terms[0], terms[1])))
    return insert_call(module, aten.cat.default, (parts, -1))


def _linear(
    d_in: int, d_out: int, form: AdapterForm, generator: torch.Generator, like: Tensor, deviation: float
) -> nn.Module:
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float32) * deviation
    leaf = nn.Linear(d_in, d_out, bias=form.is_biased, device="meta")
    return _filled(leaf, weight, torch.zeros(d_out) if form.is_biased else None, like)


def _filled(leaf: nn.Linear | nn.LayerNorm, weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Module:
    """The leaf with trainable weights, in the dtype and on the device of `like`."""
    leaf.weight = nn.Parameter(weight.to(dtype=like.dtype, device=like.device))
    if bias is not None:
        leaf.bias = nn.Parameter(bias.to(dtype=like.dtype, device=like.device))
    return leaf.train(False)


def site_name(wanted: str) -> str:
    """A site's name as module paths can hold it."""
    return re.sub(r"[^\w.]", "_", wanted)


def _free_site(module: fx.GraphModule, site: str) -> str:
    """A path for the adapter's modules at which nothing lies, and which leads through no leaf module."""
    words = site_name(site)
    parts = f"{ADAPTERS}.{words}".split(".")
    above = (".".join(parts[:n]) for n in range(1, len(parts)))
    if any(has_path(module, path) and type(get_at(module, path)) is not nn.Module for path in above):
        words = words.replace(".", "_")
    path, count = f"{ADAPTERS}.{words}", 1
    while has_path(module, path):
        count += 1
        path = f"{ADAPTERS}.{words}_{count}"
    return path


def find_adapters(module: fx.GraphModule) -> list[Adapter]:
    """The adapters of a graph, in its order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if is_adapter_call(node):
            calls.setdefault(_site_of(node), []).append(node)
    return [Adapter(site, tuple(nodes)) for site, nodes in calls.items()]


def is_adapter(branch: Branch) -> bool:
    """Whether the branch is an adapter, and not a branch of the model that holds one."""
    calls = [node for node in branch.region if node.op == "call_module"]
    return bool(calls) and all(map(is_adapter_call, calls))


def _site_of(node: fx.Node) -> str:
    return str(node.target).removeprefix(f"{ADAPTERS}.").rpartition(".")[0]


def adapter_parameters(program: Program) -> dict[str, nn.Parameter]:
    """The parameters of all adapters, by `COMPONENT/PATH`; one that several leaves share comes once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, component in program.components.items():
        for path, parameter in component.graph.named_parameters():
            if path.startswith(f"{ADAPTERS}.") and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}/{path}"] = parameter
    return found


def adapter_cost(component: Component, value: fx.Node, form: AdapterForm, dims: Mapping[str, Dim]) -> Cost:
    """What an adapter of this form at this value costs, with the addition behind it."""
    shape = shape_of(value, counting_sizes(component, dims))
    assert shape is not None
    width, n_rows, item = shape[-1], math.prod(shape[:-1]), value.meta["val"].element_size()
    # Values written: the norm's, the hidden ones (before and after the activation), the map's, and the sum.
    n_hidden = 2 if form.kind is AdapterKind.BOTTLENECK else 1
    n_values = width * (3 if form.is_normed else 2) + form.rank * n_hidden
    parameters = form.parameters(width)
    if form.kind is not AdapterKind.ROUTED:
        return Cost(parameters, parameters * item, 2 * width * form.rank * n_rows, n_rows * n_values * item)
    # Both maps, both weighed, their sums, joined, and added; scores, scaled scores and weights of every sample.
    n_values, n_samples = form.rank + 7 * width, math.prod(shape[:-2])
    macs = 2 * width * form.rank * n_rows + 2 * width * n_samples
    return Cost(parameters, parameters * item, macs, (n_rows * n_values + 6 * n_samples) * item)
