"""Takes branches out of a program, and with an attention the entry that it had in the cache of keys and values."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import fx

from vlmopt.core.program import PAST, PRESENT, Component, Dim, Program, TensorSpec
from vlmopt.graph.assembled import DECODER
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.modules import output_node, output_values, placeholders
from vlmopt.graph.regions import kept_outputs, skip_branch
from vlmopt.graph.shapes import compute_shapes
from vlmopt.graph.sizes import symbols_of

aten = torch.ops.aten


def skip(program: Program, component: str, branches: Collection[str]) -> None:
    """Takes these branches out of a component, in place, with everything that only they needed.

    What a skipped attention kept for the next step (`present_N_*`) is no output any more, and what it kept of the last
    one (`past_key_values_N_*`) no input; other entries keep their numbers.
    """
    for name in branches:  # found anew each time, since skipping one branch changes the sum of the next
        part = program.components[component]
        for branch in find_branches(part.graph):
            if branch.name == name:
                kept = kept_outputs(part, branch)
                skip_branch(part.graph, branch)
                part = _without_outputs(part, kept)
        drop_dead_nodes(part.graph)
        program.components[component] = _without_unread_cache(part, program.dims)
    _drop_unread_cross(program)


def _drop_unread_cross(program: Program) -> None:
    """Drops what is made for cross attentions that are gone; a component keeps what nobody reads if it gives nothing
    else."""
    generation = program.generation
    if generation is None or generation.cross_source not in program.components:
        return
    source = program.components[generation.cross_source]
    read = {spec.name.replace(PAST, PRESENT, 1) for spec in program.components[DECODER].inputs}
    gone = [place for place, spec in enumerate(source.outputs) if spec.is_cross and spec.name not in read]
    if gone and len(gone) == len(source.outputs):
        gone = gone[2:]
    if gone:
        made = _without_outputs(source, gone)
        drop_dead_nodes(made.graph)
        program.components[source.name] = made


def _without_outputs(component: Component, places: Collection[int]) -> Component:
    if not places:
        return component
    values = output_values(component.graph)
    output_node(component.graph).args = (tuple(v for i, v in enumerate(values) if i not in places),)
    return replace(component, outputs=tuple(s for i, s in enumerate(component.outputs) if i not in places))


def _without_unread_cache(component: Component, dims: Mapping[str, Dim]) -> Component:
    """The component without past keys and values of which at most the size is read."""
    nodes = dict(zip(component.inputs, placeholders(component.graph), strict=True))
    present = {spec.name.replace(PRESENT, PAST, 1) for spec in component.outputs}
    gone = {s: n for s, n in nodes.items() if s.name.startswith(PAST) and s.name not in present and _is_measured(n)}
    if not gone:
        return component
    kept = {spec: node for spec, node in nodes.items() if spec not in gone}
    for spec, node in gone.items():
        for reader in list(node.users):
            axis = int(reader.args[1])  # type: ignore[arg-type]
            with component.graph.graph.inserting_before(reader):
                size = _size_elsewhere(component.graph.graph, spec.shape[axis], kept, dims)
            size.meta["val"] = reader.meta["val"]
            reader.replace_all_uses_with(size)
            component.graph.graph.erase_node(reader)
        component.graph.graph.erase_node(node)
    component.graph.recompile()
    made = replace(component, inputs=tuple(kept))
    if _symbols(gone) - _symbols(kept):
        compute_shapes(made, dims)
    return made


def _is_measured(node: fx.Node) -> bool:
    """Whether of the value at most sizes are read."""
    return all(user.target is aten.sym_size.int for user in node.users)


def _size_elsewhere(
    graph: fx.Graph, size: int | str, inputs: Mapping[TensorSpec, fx.Node], dims: Mapping[str, Dim]
) -> fx.Node:
    """A dimension as another input shows it, or as what is left of a sum."""
    for spec, node in inputs.items():
        if size in spec.shape:
            return _size(graph, node, spec.shape.index(size))
    total = next(name for name, dim in dims.items() if size in dim.sum_of)
    found = _size_elsewhere(graph, total, inputs, dims)
    for other in dims[total].sum_of:
        if other != size:
            taken = _size_elsewhere(graph, other, inputs, dims)
            difference = graph.call_function(operator.sub, (found, taken))
            difference.meta["val"] = found.meta["val"] - taken.meta["val"]
            found = difference
    return found


def _size(graph: fx.Graph, node: fx.Node, axis: int) -> fx.Node:
    made = graph.call_function(aten.sym_size.int, (node, axis))
    made.meta["val"] = node.meta["val"].shape[axis]
    return made


def _symbols(nodes: Mapping[TensorSpec, fx.Node]) -> set[str]:
    values: Iterable[torch.Tensor] = (node.meta["val"] for node in nodes.values())
    return {symbol for value in values for size in value.shape for symbol in symbols_of(size)}
