"""Entries of a decoder's cache numbered without gaps, as runtimes count them."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from vlmopt.core.program import PAST, PRESENT, Component, Program, TensorSpec
from vlmopt.graph.assembled import DECODER
from vlmopt.graph.modules import clone_graph, placeholders

_Numbers = dict[tuple[bool, int], int]  # whether it is attended to across, and its layer -> its number


def with_numbered_cache(program: Program) -> Program:
    """The program with the entries of its cache numbered from 0, and a note of the layer that each belongs to.

    Passes leave gaps where they cut an attention; a program without a cache is returned as it is.
    """
    if program.generation is None:
        return program
    generation, components = program.generation, dict(program.components)
    own = _layers(components[DECODER], is_cross=False)
    source = generation.cross_source
    across = () if source is None else _layers(components[source], is_cross=True)
    numbers = {(False, layer): number for number, layer in enumerate(own)}
    numbers |= {(True, layer): number for number, layer in enumerate(across)}
    for name in (DECODER,) if source is None else (DECODER, source):
        components[name] = _renamed(components[name], numbers)
    noted = replace(generation, cache_layers=own, cross_layers=across)
    return replace(program.with_components(components), generation=noted)


def _layers(component: Component, *, is_cross: bool) -> tuple[int, ...]:
    """The layers of the entries that a component returns, in order."""
    found = (s.cache_layer for s in component.outputs if s.name.startswith(PRESENT) and s.is_cross is is_cross)
    return tuple(dict.fromkeys(layer for layer in found if layer is not None))


def _renamed(component: Component, numbers: _Numbers) -> Component:
    if all(layer == number for (_, layer), number in numbers.items()):
        return component
    graph = clone_graph(component.graph)
    inputs, outputs = (tuple(_numbered(s, numbers) for s in side) for side in (component.inputs, component.outputs))
    for node, spec in zip(placeholders(graph), inputs, strict=True):
        _rename(graph, node, spec.name)
    graph.recompile()
    return replace(component, graph=graph, inputs=inputs, outputs=outputs)


def _rename(graph: fx.GraphModule, node: fx.Node, name: str) -> None:
    if node.target != name:
        node.target = name
        node.name = graph.graph._graph_namespace.create_name(name, node)


def _numbered(spec: TensorSpec, numbers: _Numbers) -> TensorSpec:
    layer = spec.cache_layer
    if layer is None:
        return spec
    prefix = PAST if spec.name.startswith(PAST) else PRESENT
    rest = spec.name.removeprefix(f"{prefix}{layer}")
    return replace(spec, name=f"{prefix}{numbers[spec.is_cross, layer]}{rest}")
