"""Phantom dimensions that lie in a graph: found by their modules, and taken out again without a trace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from vlmopt.core.program import PAST, PRESENT, Component, Program
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.heads import SDPA
from vlmopt.graph.modules import ADAPTERS, clone_graph, output_node, output_values, placeholders
from vlmopt.graph.phantom import PLAIN

aten = torch.ops.aten


@dataclass(frozen=True)
class Phantom:
    """A phantom dimension that lies in a graph: where its modules are, the value of its attention without it (o1), and
    the value that takes its place (out)."""

    path: str
    plain: fx.Node
    out: fx.Node


def find_phantoms(module: fx.GraphModule) -> list[Phantom]:
    """The phantom dimensions of a graph, in its order."""
    found: list[Phantom] = []
    for node in module.graph.nodes:
        path, _, leaf = str(node.target).rpartition(".")
        if node.op != "call_module" or leaf != PLAIN or not path.startswith(f"{ADAPTERS}."):
            continue
        plain = node.args[0]
        assert isinstance(plain, fx.Node)
        changes = [user for user in _readers_of_share(node) if user.target is aten.mul.Tensor]
        found.append(Phantom(path, plain, next(iter(changes[0].users))))
    return found


def _readers_of_share(weigh: fx.Node) -> Iterable[fx.Node]:
    (difference,) = weigh.users
    (share,) = difference.users
    return share.users


def phantom_of(module: fx.GraphModule, path: str) -> Phantom | None:
    """The phantom dimension whose modules lie at the path."""
    return next((one for one in find_phantoms(module) if one.path == path), None)


def drop_phantom(component: Component, phantom: Phantom) -> Component:
    """The component without it, its graph edited in place, and without the entry that it had in the cache."""
    module = component.graph
    phantom.out.replace_all_uses_with(phantom.plain)
    if phantom.plain.target is SDPA:
        _restore_mask(phantom.plain)
    else:
        _restore_scores(phantom, module)
    return without_entry(component, entry_of(component, phantom))


def without_entry(component: Component, gone: str | None) -> Component:
    """The component without what is dead, and without the entry of the cache that this output is; None for no entry."""
    module = component.graph
    if gone is not None:
        output, values = output_node(module), output_values(module)
        output.args = (tuple(v for v, spec in zip(values, component.outputs, strict=True) if spec.name != gone),)
    drop_dead_nodes(module)
    if gone is None:
        return component
    taken = gone.replace(PRESENT, PAST, 1)
    for node in placeholders(module):
        if node.target == taken:
            module.graph.erase_node(node)
    module.recompile()
    inputs = tuple(spec for spec in component.inputs if spec.name != taken)
    return replace(component, inputs=inputs, outputs=tuple(s for s in component.outputs if s.name != gone))


def without_phantoms(program: Program) -> Program:
    """A copy of the program without phantom dimensions; graphs that have none are shared."""
    components = dict(program.components)
    for name, component in program.components.items():
        for phantom in find_phantoms(component.graph):
            if components[name] is component:
                components[name] = replace(component, graph=clone_graph(component.graph))
            inner = phantom_of(components[name].graph, phantom.path)
            assert inner is not None
            components[name] = drop_phantom(components[name], inner)
    return program.with_components(components)


def _restore_mask(call: fx.Node) -> None:
    queries, keys, values, scores = call.args
    assert isinstance(scores, fx.Node)
    is_own = scores.target in (aten.matmul.default, aten.mul.Tensor)
    call.args = (queries, keys, values) if is_own else (queries, keys, values, scores.args[0])


def _restore_scores(phantom: Phantom, module: fx.GraphModule) -> None:
    """Takes the sum of scores away that the phantom's own ones are a term of."""
    (weigh,) = (n for n in module.graph.nodes if n.op == "call_module" and n.target == f"{phantom.path}.query.out")
    pending = list(weigh.users)
    while pending:
        node = pending.pop(0)
        if node.target is aten.add.Tensor:
            own = node.args[0]
            assert isinstance(own, fx.Node)
            node.replace_all_uses_with(own)
            return
        pending.extend(node.users)


def entry_of(component: Component, phantom: Phantom) -> str | None:
    """The name of the output with the queries of token 0; None without a cache, or with constants."""
    module = component.graph
    first = first_value(module, phantom, "query")
    names = dict(zip(output_values(module), (spec.name for spec in component.outputs), strict=True))
    return None if first is None else names.get(first)


def first_value(module: fx.GraphModule, phantom: Phantom, part: str) -> fx.Node | None:
    """What the phantom dimension takes of token 0 for its `query`, `key` or `value`, [B, H, 1, d]; None where what is
    made of it is a constant.
    """
    target = f"{phantom.path}.{part}.key"
    call = next((node for node in module.graph.nodes if node.op == "call_module" and node.target == target), None)
    if call is None:
        return None
    (turned,) = call.all_input_nodes
    first: fx.Node = turned.all_input_nodes[0]
    return first
