"""Mixtures of linear maps whose weights look at the data, and what changes where constants stand for them.

A mixture is a softmax over experts, averaged over everything but the experts: Lily's router (arXiv 2407.09946), whoever
wrote it. With a constant mixture `S` in its place the layer and the maps beside it are one weight,

    W(S) = W_0 + sum_e S_e D_e,      affine in S

so the difference between a mixture that the data would give and the constant is `sum_e (S_e - C_e) D_e`. Two numbers
certify the exchange, both as Frobenius norms over that of `W(C)`: the root mean square over task data, from the
covariance of the mixture and the inner products of the `D_e`, and the largest that any input can give, which is that of
an expert alone since every mixture is a convex combination of those.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vlmopt.core.cost import Cost
from vlmopt.core.program import Component, Dim
from vlmopt.graph.adapters import site_name
from vlmopt.graph.canonical import drop_dead_nodes, is_hand_on
from vlmopt.graph.constants import constant_nodes
from vlmopt.graph.costing import nodes_cost, weights_of
from vlmopt.graph.linear_maps import CASTS, VIEWING
from vlmopt.graph.modules import ADAPTERS, clone_graph, free_path, get_at, is_adapter_call, set_at
from vlmopt.graph.parallel import ParallelFold, find_parallel
from vlmopt.graph.regions import is_linear_call

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default)

_ROUNDINGS = 16  # of a mixture's dtype: the deviation from an affine function that rounding explains, relative


@dataclass(frozen=True)
class Mixture:
    """`node` is the mean over all but the experts, of `n_experts` elements."""

    node: fx.Node
    n_experts: int


@dataclass(frozen=True)
class LayerMixture:
    """What weighs the experts beside a layer: a node that looks at the data, or shares [E] that were learned."""

    layer: str
    node: str | None
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """A constant in a mixture's place: of which layer, and by how much its weight may move (relative, Frobenius)."""

    layer: str
    rms: float
    largest: float


def find_mixtures(module: fx.GraphModule) -> list[Mixture]:
    """All mixtures that depend on an input, in graph order."""
    constants = constant_nodes(module)
    found: list[Mixture] = []
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is not aten.mean.dim or node in constants:
            continue
        softmax, n = _softmax_of(node), int(node.meta["val"].shape[-1])
        if softmax is not None and node.meta["val"].numel() == n and softmax.meta["val"].shape[-1] == n:
            found.append(Mixture(node, n))
    return found


def layer_mixtures(module: fx.GraphModule) -> list[LayerMixture]:
    """The mixtures that lie beside Linears, in graph order, whether they look at the data or not."""
    routed = {mixture.node for mixture in find_mixtures(module)}
    found: list[LayerMixture] = []
    for node in module.graph.nodes:
        shares = None if node in routed else _learned_shares(module, node)
        if node not in routed and shares is None:
            continue
        layer = _layer_beside(module, node)
        if layer is not None:
            found.append(LayerMixture(layer, node.name if shares is None else None, shares or ()))
    return found


def _learned_shares(module: fx.GraphModule, node: fx.Node) -> tuple[float, ...] | None:
    """The softmax of a stored vector of an adapter; None where the node is none."""
    stored = node.args[0] if node.target in _SOFTMAX else None
    if not isinstance(stored, fx.Node) or stored.op != "get_attr" or not str(stored.target).startswith(f"{ADAPTERS}."):
        return None
    scores = get_at(module, str(stored.target))
    if not isinstance(scores, Tensor) or scores.numel() != scores.shape[-1] or scores.is_meta:
        return None
    return tuple(scores.detach().double().flatten().softmax(-1).tolist())


def _layer_beside(module: fx.GraphModule, mixture: fx.Node) -> str | None:
    """The Linear that the maps which the mixture weighs are added to."""
    seen, pending = {mixture}, [mixture]
    while pending:
        node = pending.pop(0)
        for operand in node.all_input_nodes if node.target is aten.add.Tensor else ():
            if is_linear_call(module, operand) and not is_adapter_call(operand):
                return str(operand.target)
        behind = [user for user in node.users if user not in seen and not is_linear_call(module, user)]
        seen.update(behind)
        pending += behind
    return None


def _softmax_of(mean: fx.Node) -> fx.Node | None:
    """The softmax over the last axis that a mean over other axes is taken of."""
    (value, axes, *_), n_axes = mean.args, mean.args[0].meta["val"].dim()  # type: ignore[union-attr]
    if any(axis % n_axes == n_axes - 1 for axis in axes):  # type: ignore[union-attr]
        return None
    node = value
    while isinstance(node, fx.Node) and (node.target in VIEWING | CASTS or is_hand_on(node)):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in _SOFTMAX:
        return None
    return node if node.args[1] in (-1, node.meta["val"].dim() - 1) else None


def replace_mixture(module: fx.GraphModule, mixture: Mixture, shares: Tensor) -> str:
    """Puts the constant [E] in the mixture's place and returns its path; what computed the mixture is left dead."""
    node = mixture.node
    path = free_path(module, f"{ADAPTERS}.{site_name(node.name)}.mixture")
    value = node.meta["val"]
    made = shares.reshape(value.shape).to(value.dtype)
    set_at(module, path, torch.nn.Parameter(made.contiguous(), requires_grad=False))
    with module.graph.inserting_before(node):
        constant = module.graph.create_node("get_attr", path)
    constant.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
    node.replace_all_uses_with(constant)
    return path


def exchanges(module: fx.GraphModule, moments: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Exchange | str]:
    """For every mixture with moments (mean [E], second moment [E, E]) its exchange by the mean, or why it has none."""
    mixtures = [mixture for mixture in find_mixtures(module) if mixture.node.name in moments]
    most = max((one.n_experts for one in mixtures), default=0)
    at_mean = _folds(module, mixtures, [moments[one.node.name][0] for one in mixtures])
    corners = [_folds(module, mixtures, [_alone(one, e) for one in mixtures]) for e in range(most)]
    found: dict[str, Exchange | str] = {}
    for mixture in mixtures:
        name = mixture.node.name
        own = [folds.get(name) for folds in (at_mean, *corners[: mixture.n_experts])]
        found[name] = _exchange(own, *moments[name], torch.finfo(mixture.node.meta["val"].dtype).eps)
    return found


def exchange_savings(component: Component, dims: Mapping[str, Dim], names: Collection[str]) -> dict[str, Cost]:
    """What a constant in the place of each named mixture saves, behind those in front of it."""
    module, gone = component.graph, set[fx.Node]()
    found: dict[str, Cost] = {}
    for mixture in find_mixtures(module):
        if mixture.node.name not in names:
            continue
        dying = _dying(mixture.node, gone)
        gone |= dying
        read = {id(weight) for node in set(module.graph.nodes) - gone for weight in weights_of(module, node)}
        value = mixture.node.meta["val"]
        constant = Cost(value.numel(), value.numel() * value.element_size())
        found[mixture.node.name] = nodes_cost(component, dying, dims, seen=read) - constant
    return found


def _dying(node: fx.Node, gone: Collection[fx.Node]) -> set[fx.Node]:
    """The node, and what nothing reads any more without it and those that are gone."""
    dying, pending = {node}, [node]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand.op != "placeholder" and all(user in dying or user in gone for user in operand.users):
                dying.add(operand)
                pending.append(operand)
    return dying


def _exchange(folds: Sequence[ParallelFold | None], mean: Tensor, second: Tensor, eps: float) -> Exchange | str:
    """From the folds at the mean mixture and with every expert alone."""
    if any(fold is None for fold in folds):
        return "it weighs no linear maps beside a layer"
    weight, *alone = (_matrix(fold) for fold in folds if fold is not None)
    moved = torch.stack([one - weight for one in alone]).flatten(1)
    size = weight.norm().clamp_min(torch.finfo(torch.float64).tiny)
    if (mean @ moved).norm() > _ROUNDINGS * eps * moved.norm():
        return "the weight it makes is no affine function of it"
    covariance = second - torch.outer(mean, mean)
    squared = max(0.0, float((covariance * (moved @ moved.T)).sum()))
    layer = next(fold.path for fold in folds if fold is not None)
    return Exchange(layer, math.sqrt(squared) / float(size), float(moved.norm(dim=1).max() / size))


def _matrix(fold: ParallelFold) -> Tensor:
    matrix, _ = fold.map.values()
    assert isinstance(matrix, Tensor)
    return matrix.detach().double()


def _alone(mixture: Mixture, expert: int) -> Tensor:
    shares = torch.zeros(mixture.n_experts)
    shares[min(expert, mixture.n_experts - 1)] = 1.0
    return shares


def _folds(module: fx.GraphModule, mixtures: Sequence[Mixture], shares: Sequence[Tensor]) -> dict[str, ParallelFold]:
    """With these constants in the mixtures' places: for every mixture the layer that takes its maps over."""
    clone = clone_graph(module)
    by_name = {one.node.name: one for one in find_mixtures(clone)}
    names = {
        replace_mixture(clone, by_name[one.node.name], value): one.node.name
        for one, value in zip(mixtures, shares, strict=True)
    }
    drop_dead_nodes(clone)
    found: dict[str, ParallelFold] = {}
    for fold in find_parallel(clone)[0]:
        for term in fold.chains:
            found |= {names[path]: fold for path in _stored_in(term.node, fold.layer) & names.keys()}
    return found


def _stored_in(term: fx.Node, layer: fx.Node) -> set[str]:
    """Paths of the stored tensors that a chain beside the layer is made of."""
    seen, pending, found = set(layer.all_input_nodes), [term], set[str]()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
            found |= {str(node.target)} if node.op == "get_attr" else set()
    return found
