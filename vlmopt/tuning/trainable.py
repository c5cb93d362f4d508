"""Which weights train: copies of their own, so that the program they came from stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from vlmopt.core.program import Program
from vlmopt.graph.modules import clone_graph, get_at, set_at

Wanted = Callable[[str], bool]  # `component/path` of a weight -> whether it trains


def trainable_copy(program: Program, wanted: Wanted) -> tuple[Program, dict[str, nn.Parameter]]:
    """The program with weights of its own where `wanted` says so, and these weights by `component/path`.

    All other tensors stay shared and take no gradient. Weights that are one tensor in two places stay one, under the
    name of the first, be it in two leaves (a tied embedding).
    """
    copies = _Copies()
    components = dict(program.components)
    trained: dict[str, nn.Parameter] = {}
    for name, component in program.components.items():
        graph = clone_graph(component.graph)
        for path in _weighted_paths(graph):
            found = get_at(graph, path)
            own = _own(found, f"{name}/{path}", wanted, copies)
            if own is not found:
                set_at(graph, path, own)
            for key, weight in _weights(own, f"{name}/{path}").items():
                if weight.requires_grad and all(weight is not other for other in trained.values()):
                    trained[key] = weight
        components[name] = replace(component, graph=graph)
    return program.with_components(components), trained


def frozen(program: Program) -> Program:
    """The program, none of whose weights takes a gradient any more."""
    for component in program.components.values():
        for weight in component.graph.parameters():
            weight.requires_grad_(False)
            weight.grad = None
        component.graph.train(False)
    return program


def _weighted_paths(graph: fx.GraphModule) -> list[str]:
    """Leaves that are called, and parameters that are read by themselves unless they lie within a leaf."""
    paths: dict[str, None] = {}
    for node in graph.graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            paths[target] = None
        elif node.op == "get_attr":
            owner = target.rpartition(".")[0]
            is_inside_leaf = owner and type(get_at(graph, owner)) is not nn.Module
            paths[owner if is_inside_leaf else target] = None
    return list(paths)


def _weights(found: nn.Module | torch.Tensor, key: str) -> dict[str, nn.Parameter]:
    if isinstance(found, nn.Module):
        return {f"{key}.{name}": weight for name, weight in found.named_parameters()}
    return {key: found} if isinstance(found, nn.Parameter) else {}


@dataclass(frozen=True)
class _Copies:
    """What was copied, by the identity of what it was made from."""

    leaves: dict[int, nn.Module | nn.Parameter] = field(default_factory=dict)
    weights: dict[int, nn.Parameter] = field(default_factory=dict)


def _own(found: nn.Module | torch.Tensor, key: str, wanted: Wanted, copies: _Copies) -> nn.Module | torch.Tensor:
    """The leaf or parameter as it is to be called: every place that shared the one shares the other.

    What trains is copied; what does not keeps its storage, and takes no gradient even where it did before.
    """
    weights = _weights(found, key)
    names = {name for name, weight in weights.items() if weight.is_floating_point() and wanted(name)}
    is_shared = any(id(weight) in copies.weights for weight in weights.values())
    if not names and not is_shared and not any(weight.requires_grad for weight in weights.values()):
        return found
    if id(found) not in copies.leaves:
        copies.leaves[id(found)] = _copied(found, key, names, copies.weights)
    return copies.leaves[id(found)]


def _copied(
    found: nn.Module | torch.Tensor, key: str, names: set[str], known: dict[int, nn.Parameter]
) -> nn.Module | nn.Parameter:
    def copied(name: str, weight: torch.Tensor) -> nn.Parameter:
        if id(weight) in known:
            return known[id(weight)]
        value = weight.detach()
        made = nn.Parameter(value.clone() if name in names else value, requires_grad=name in names)
        if name in names:
            known[id(weight)] = made
        return made

    if isinstance(found, torch.Tensor):
        return copied(key, found)
    memo = {id(weight): copied(f"{key}.{name}", weight) for name, weight in found.named_parameters()}
    return copy.deepcopy(found, memo)
