"""Linear algebra on graphs: which calls are one linear map together, and the Linear that takes their place.

In rows, a chain of Linears computes `L(n) = n M + c`. Two things can be done with it:

1. *take over*: `z = n + L(n)`, read by Linears `z W + b` alone, is gone when each of them becomes
   `n (I + M) W + (c W + b)`. The bias goes through the weight once. (The released code of arXiv 2403.15226 sends it
   through the weight that holds `I + M` already.)
2. *merge*: consecutive Linears that nothing else reads become one, where that is not larger.

Nothing else can be: a map in front of a norm does not cross it unless it is a multiple of the identity, and `x + x M`
on the stream goes by the next norm in the residual. New weights are computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from vlmopt.core.cost import Cost
from vlmopt.core.program import Component, Dim, Program
from vlmopt.graph.adapters import Adapter
from vlmopt.graph.costing import nodes_cost, weights_of
from vlmopt.graph.head import fitted_linear
from vlmopt.graph.modules import get_at, set_at
from vlmopt.graph.regions import is_linear_call
from vlmopt.graph.text import operation_text

aten = torch.ops.aten

_ON_STREAM = (
    "it lies on the stream: the residual goes by the next norm, so no linear map behind that norm can take over x M"
)


@dataclass(frozen=True)
class Fold:
    """Linears that go, in graph order, and those that take them over.

    `total` is the sum `n + L(n)` in front of the readers; None where a chain is merged into its last member.
    """

    chain: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    total: fx.Node | None

    @property
    def value(self) -> fx.Node:
        """What the readers read afterwards."""
        (operand,) = self.chain[0].all_input_nodes
        return operand

    @property
    def gone(self) -> tuple[fx.Node, ...]:
        return self.chain if self.total is None else (*self.chain, self.total)


def find_fold(module: fx.GraphModule, adapter: Adapter) -> Fold | str:
    """How the adapter folds, or why it does not."""
    chain = _chain(module, adapter.calls[-1])
    if not set(adapter.calls) <= set(chain):
        odd = next((call for call in adapter.calls if not is_linear_call(module, call)), None)
        stop = odd if odd is not None else chain[0].all_input_nodes[0]
        return f"it is no linear map: a {operation_text(module, stop)} is part of it"
    taken_over = _take_over(module, chain)
    if isinstance(taken_over, Fold):
        return taken_over
    return _merge(module, chain) or taken_over


def _chain(module: fx.GraphModule, last: fx.Node) -> tuple[fx.Node, ...]:
    """The Linears that end in `last`, each read by the next one alone."""
    chain = [last]
    while is_linear_call(module, chain[0]):
        (operand,) = chain[0].all_input_nodes
        if not is_linear_call(module, operand) or len(operand.users) != 1:
            break
        chain.insert(0, operand)
    return tuple(chain)


def _take_over(module: fx.GraphModule, chain: tuple[fx.Node, ...]) -> Fold | str:
    (value,) = chain[0].all_input_nodes
    total = next(iter(chain[-1].users), None)
    if total is None or len(chain[-1].users) != 1 or total.target is not aten.add.Tensor:
        return "its value is not added to the value that it reads, and to nothing else"
    if not _is_sum_of(total, chain[-1], value):
        return _ON_STREAM
    readers = tuple(total.users)
    if any(reader.target is aten.add.Tensor for reader in readers):
        return _ON_STREAM
    odd = next((reader for reader in readers if not is_linear_call(module, reader)), None)
    if odd is None:
        return Fold(chain, readers, total)
    name = "an output" if odd.op == "output" else f"{odd.name} ({operation_text(module, odd)})"
    if "norm" in name:
        return f"{name} reads its sum, and no map but a multiple of the identity crosses a norm"
    return f"{name} reads its sum, and is no Linear that could take it over"


def _is_sum_of(node: fx.Node, term: fx.Node, other: fx.Node) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return False
    return node.args in ((term, other), (other, term))


def _merge(module: fx.GraphModule, chain: tuple[fx.Node, ...]) -> Fold | None:
    """The consecutive Linears of the chain, its only reader included, that save most as one; None where none save."""
    users = list(chain[-1].users)
    is_read_by_linear = len(users) == 1 and is_linear_call(module, users[0])
    whole = (*chain, users[0]) if is_read_by_linear else chain
    found: list[tuple[int, int, Fold]] = []
    for start in range(len(whole) - 1):
        for end in range(start + 2, len(whole) + 1):
            part = [linear_of(module, node) for node in whole[start:end]]
            has_bias = any(leaf.bias is not None for leaf in part)
            saved = sum(_size(leaf.in_features, leaf.out_features, has_bias=leaf.bias is not None) for leaf in part)
            saved -= _size(part[0].in_features, part[-1].out_features, has_bias=has_bias)
            if saved >= 0:
                found.append((saved, end - start, Fold(whole[start : end - 1], (whole[end - 1],), None)))
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def _size(d_in: int, d_out: int, *, has_bias: bool) -> int:
    return d_in * d_out + (d_out if has_bias else 0)


def linear_of(module: fx.GraphModule, node: fx.Node) -> nn.Linear:
    leaf = get_at(module, str(node.target))
    assert isinstance(leaf, nn.Linear)
    return leaf


def why_shared(program: Program, component: str, fold: Fold) -> str:
    """Which other node reads a weight of the fold, so that folding would keep both; empty where none does."""
    own = {*fold.chain, *fold.readers}
    module = program.components[component].graph
    weights = {id(tensor) for node in own for tensor in weights_of(module, node)}
    for part in program.components.values():
        for node in part.graph.graph.nodes:
            if node not in own and any(id(tensor) in weights for tensor in weights_of(part.graph, node)):
                return f"{node.name} reads one of its weights too, which would have to stay beside the new one"
    leaves = {str(node.target): id(linear_of(module, node).weight) for node in own}
    if len(set(leaves.values())) < len(leaves):
        return "two of its Linears share a weight, which would become two"
    return ""


def fold_saving(component: Component, fold: Fold, dims: Mapping[str, Dim]) -> Cost:
    """What is saved: the calls that go, less what the readers grow by."""
    module = component.graph
    before = nodes_cost(component, [*fold.gone, *fold.readers], dims)
    after, seen = Cost(), set[str]()
    has_bias = any(linear_of(module, node).bias is not None for node in fold.chain)
    for reader in fold.readers:
        leaf = linear_of(module, reader)
        d_in = linear_of(module, fold.chain[0]).in_features
        cost = nodes_cost(component, [reader], dims)
        n = 0
        if str(reader.target) not in seen:
            seen.add(str(reader.target))
            n = _size(d_in, leaf.out_features, has_bias=has_bias or leaf.bias is not None)
        macs = cost.macs // leaf.in_features * d_in
        after = after + Cost(n, n * leaf.weight.element_size(), macs, cost.activation_bytes)
    return before - after


def apply_fold(module: fx.GraphModule, fold: Fold) -> None:
    """Gives every reader a new Linear that does the work of the chain as well; dead code is left to the caller."""
    chain = [linear_of(module, node) for node in fold.chain]
    made: dict[str, nn.Linear] = {}
    for reader in fold.readers:
        path = str(reader.target)
        if path not in made:
            made[path] = folded_linear(chain, linear_of(module, reader), is_residual=fold.total is not None)
    for reader in fold.readers:
        reader.replace_input_with(fold.chain[-1] if fold.total is None else fold.total, fold.value)
        set_at(module, str(reader.target), made[str(reader.target)])


def folded_linear(chain: Sequence[nn.Linear], reader: nn.Linear, *, is_residual: bool) -> nn.Linear:
    """The Linear that computes what `reader` makes of the chain's value, or of `n + L(n)` where `is_residual`."""
    with torch.no_grad():
        weight, bias = _composed(chain)
        if is_residual:
            weight = weight + torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        last = reader.weight.double()
        shift = None if bias is None else last @ bias
        if reader.bias is not None:
            shift = reader.bias.double() if shift is None else shift + reader.bias.double()
        return fitted_linear(last @ weight, shift, like=reader.weight)


def _composed(chain: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight [d_out, d_in] and bias of the Linears one after another, in float64."""
    weight, bias = chain[0].weight.double(), None if chain[0].bias is None else chain[0].bias.double()
    for leaf in chain[1:]:
        own = leaf.weight.double()
        weight = own @ weight
        bias = None if bias is None else own @ bias
        if leaf.bias is not None:
            bias = leaf.bias.double() if bias is None else bias + leaf.bias.double()
    return weight, bias
