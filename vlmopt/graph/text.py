"""Canonical text form of a graph: one line a node, numbered in order, without memory addresses, equal in every run."""

from __future__ import annotations

import torch
from torch import fx

from vlmopt.core.program import Component
from vlmopt.graph.modules import get_at
from vlmopt.graph.sizes import size_text, symbols_of


def component_text(component: Component) -> str:
    """The component's graph as text; equal graphs give equal text.

    A line reads `%7: float32[batch, 17, 64] = linear vision.layers.0.mlp.fc1 (%6)`.
    """
    names = _dim_names(component)
    lines = [f"component {component.name}"]
    numbers: dict[fx.Node, str] = {}
    for node in component.graph.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0], numbers)}")
            continue
        numbers[node] = f"%{len(numbers)}"
        lines.append(f"{numbers[node]}: {_type(node, names)} = {_call(component.graph, node, numbers)}")
    return "\n".join(lines) + "\n"


def _dim_names(component: Component) -> dict[str, str]:
    """Symbols of the export, which differ from run to run, by the names of the dimensions they stand for."""
    names: dict[str, str] = {}
    nodes = [node for node in component.graph.graph.nodes if node.op == "placeholder"]
    for spec, node in zip(component.inputs, nodes, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for wanted, actual in zip(spec.shape, value.shape, strict=True):
                if isinstance(wanted, str):
                    names.update({symbol: names.get(symbol, wanted) for symbol in symbols_of(actual)})
    return names


def _type(node: fx.Node, names: dict[str, str]) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        shape = ", ".join(size_text(dim, names) for dim in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    return type(value).__name__ if value is not None else "?"


def _call(module: fx.GraphModule, node: fx.Node, numbers: dict[fx.Node, str]) -> str:
    operands = [_argument(arg, numbers) for arg in node.args]
    operands += [f"{key}={_argument(value, numbers)}" for key, value in sorted(node.kwargs.items())]
    joined = f"({', '.join(operands)})"
    operation = operation_text(module, node)
    if node.op in ("placeholder", "get_attr"):
        return f"{operation} {node.target}"
    if node.op == "call_module":
        return f"{operation} {node.target} {joined}"
    return f"{operation} {joined}"


def operation_text(module: fx.GraphModule, node: fx.Node) -> str:
    """What a node of the graph does, in a word: `linear`, `mul.Tensor`, `input`, `tensor`."""
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return "tensor"
    if node.op == "call_module":
        return type(get_at(module, str(node.target))).__name__.lower()
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removeprefix("aten.").removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _argument(value: object, numbers: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_argument(item, numbers) for item in value) + "]"
    return str(value)
