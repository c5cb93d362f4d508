"""Entries of a decoder's cache numbered without gaps, as runtimes count them."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from vlmopt.core.program import PAST, PRESENT, Component, Program, TensorSpec
from vlmopt.graph.assembled import DECODER
from vlmopt.graph.modules import clone_graph, placeholders


def with_numbered_cache(program: Program) -> Program:
    """The program with the entries of its cache numbered from 0, and a note of the layer that each belongs to.

    Passes leave gaps where they cut an attention; a program without a cache is returned as it is.
    """
    if program.generation is None:
        return program
    decoder = program.components[DECODER]
    layers = tuple(dict.fromkeys(_layer(spec) for spec in decoder.outputs if spec.name.startswith(PRESENT)))
    generation = replace(program.generation, cache_layers=layers)
    numbers = {layer: number for number, layer in enumerate(layers)}
    components = {**program.components, DECODER: _renamed(decoder, numbers)}
    return replace(program.with_components(components), generation=generation)


def _renamed(component: Component, numbers: dict[int, int]) -> Component:
    if all(layer == number for layer, number in numbers.items()):
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


def _numbered(spec: TensorSpec, numbers: dict[int, int]) -> TensorSpec:
    for prefix in (PAST, PRESENT):
        if spec.name.startswith(prefix):
            side = spec.name.rpartition("_")[2]
            return replace(spec, name=f"{prefix}{numbers[_layer(spec)]}_{side}")
    return spec


def _layer(spec: TensorSpec) -> int:
    return int(spec.name.split("_")[-2])
