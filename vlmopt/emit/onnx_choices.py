"""Choices between two values become branches, so that a runtime computes only the one that is taken.

Before: `y = Where(c, f(x), x)` with one condition for the whole value; after: `y = If(c) {f(x)} else {x}`. In a
traversed decoder `f` is the second pass, which the step of an answer must not pay for. Weights stay where they are: a
branch reads them from the graph around it.
"""

from __future__ import annotations

import onnx_ir as ir

_COSTLY = {"MatMul", "Gemm", "Conv"}  # what is worth a branch


def branch_choices(model: ir.Model) -> int:
    """Edits the model in place, which computes the same; returns how many choices became branches."""
    made = 0
    for node in list(model.graph):
        if node.op_type == "Where" and node.graph is model.graph and _is_whole(node):
            made += _branch(model.graph, node)
    return made


def _is_whole(node: ir.Node) -> bool:
    """One condition for all of two values of one shape."""
    condition, one, other = node.inputs
    if condition is None or one is None or other is None or condition.shape is None or one.shape is None:
        return False
    return condition.shape.rank() == 0 and other.shape is not None and _sizes(one.shape) == _sizes(other.shape)


def _sizes(shape: ir.Shape) -> list[str]:
    return [str(size) for size in shape]


def _branch(graph: ir.Graph, choice: ir.Node) -> int:
    condition, *values = choice.inputs
    order = {node: place for place, node in enumerate(graph)}
    parts = [sorted(_only_for(value, choice, graph), key=order.__getitem__) for value in values]
    if not any(node.op_type in _COSTLY for part in parts for node in part):
        return 0
    (result,) = choice.outputs
    branches = []
    for word, value, part in zip(("then", "else"), values, parts, strict=True):
        assert value is not None
        graph.remove(part)
        branches.append(_subgraph(f"{result.name}_{word}", value, part))
    attributes = [ir.AttrGraph(f"{word}_branch", made) for word, made in zip(("then", "else"), branches, strict=True)]
    lazy = ir.Node("", "If", [condition], attributes, num_outputs=1, name=f"{choice.name}_if")
    (output,) = lazy.outputs
    output.type, output.shape, name = result.type, result.shape, result.name
    graph.insert_before(choice, lazy)
    ir.convenience.replace_all_uses_with(result, output, replace_graph_outputs=True)
    graph.remove(choice, safe=True)
    result.name, output.name = None, name
    return 1


def _only_for(value: ir.Value | None, choice: ir.Node, graph: ir.Graph) -> set[ir.Node]:
    """The nodes of the graph that are computed for this side of the choice and for nothing else."""
    found: set[ir.Node] = set()
    producer = None if value is None else value.producer()
    if producer is None:
        return found
    is_side = {id(value)}
    pending = [producer]
    while pending:
        node = pending.pop()
        if node in found or node.graph is not graph:
            continue
        readers = [(reader, output) for output in node.outputs for reader, _ in output.uses()]
        is_for_choice = all(
            reader in found or (reader is choice and id(output) in is_side and _n_uses(output, choice) == 1)
            for reader, output in readers
        )
        if is_for_choice and not any(output.is_graph_output() for output in node.outputs):
            found.add(node)
            pending.extend(operand.producer() for operand in node.inputs if operand is not None and operand.producer())  # type: ignore[misc]
    return found


def _n_uses(value: ir.Value, reader: ir.Node) -> int:
    return sum(user is reader for user, _ in value.uses())


def _subgraph(name: str, value: ir.Value, nodes: list[ir.Node]) -> ir.Graph:
    if nodes:
        return ir.Graph([], [value], nodes=nodes, name=name)
    handed = ir.Node("", "Identity", [value], num_outputs=1, name=f"{name}_value")
    (output,) = handed.outputs
    output.name, output.type, output.shape = name, value.type, value.shape
    return ir.Graph([], [output], nodes=[handed], name=name)
