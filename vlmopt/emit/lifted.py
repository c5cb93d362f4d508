"""A component as torch.export has it: ATen calls alone, with every weight an input.

A captured component is what exporting it again would give, but for its `torch.nn` leaves. Where those are the four
that raising makes, or quantized ones, and each call is one that ONNX has a translation for, a copy takes the place of a
second export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vlmopt.core.program import Component
from vlmopt.emit.onnx_quantized import quantized_call
from vlmopt.emit.onnx_translation import DIRECT
from vlmopt.graph.canonical import ASSERTIONS
from vlmopt.graph.modules import get_at, output_values, placeholders
from vlmopt.graph.quantized import BlockwiseEmbedding, BlockwiseLinear, HalfEmbedding, HalfLinear, Int8Linear

aten = torch.ops.aten

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # target and arguments
Weights = Mapping[str, fx.Node]  # own name in the leaf -> its placeholder


@dataclass(frozen=True)
class Lifted:
    """The graph, whose placeholders are the weights, by their paths, and then the inputs."""

    graph: fx.Graph
    weights: Mapping[str, fx.Node]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def lifted(component: Component) -> Lifted | None:
    """The component lifted; None where a leaf or a call is not known to be the same in ATen and ONNX."""
    source = component.graph
    used = dict.fromkeys(path for node in source.graph.nodes for path in _paths(source, node))  # the file's order
    named = dict([*source.named_parameters(remove_duplicate=False), *source.named_buffers(remove_duplicate=False)])
    if not used.keys() <= named.keys():
        return None
    graph = fx.Graph()
    weights = {path: graph.placeholder("w_" + path.replace(".", "_")) for path in used}
    mapping = {node: graph.node_copy(node) for node in placeholders(source)}
    inputs = tuple(mapping.values())
    for node in source.graph.nodes:
        if node.op in ("placeholder", "output") or node.target in ASSERTIONS:
            continue
        made = _copied(source, node, graph, mapping, weights)
        if made is None:
            return None
        mapping[node] = made
    outputs = tuple(mapping[node] for node in output_values(source))
    graph.output(outputs)
    return Lifted(graph, weights, inputs, outputs)


def weight_of(component: Component, path: str) -> Tensor:
    """The weight that lies at a path."""
    found = get_at(component.graph, path)
    assert isinstance(found, Tensor)
    return found


def _paths(source: fx.GraphModule, node: fx.Node) -> list[str]:
    """Paths of the tensors that the node holds."""
    if node.op == "get_attr":
        return [str(node.target)]
    if node.op != "call_module":
        return []
    leaf = get_at(source, str(node.target))
    if not isinstance(leaf, nn.Module):
        return []
    return [f"{node.target}.{name}" for name, _ in (*leaf.named_parameters(), *leaf.named_buffers())]


def _copied(
    source: fx.GraphModule, node: fx.Node, graph: fx.Graph, mapping: Mapping[fx.Node, fx.Node], weights: Weights
) -> fx.Node | None:
    if node.op == "get_attr":
        return weights[str(node.target)]
    if node.op == "call_function" and node.target in DIRECT:
        args = fx.node.map_arg(node.args, lambda n: mapping[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: mapping[n])
        return graph.create_node("call_function", node.target, args, kwargs, name=_name(node.target))
    leaf = get_at(source, str(node.target)) if node.op == "call_module" else None
    write = _LEAVES.get(type(leaf))
    if not isinstance(leaf, nn.Module) or write is None or leaf._forward_hooks or leaf._forward_pre_hooks:
        return None
    if len(node.args) != 1 or node.kwargs:
        return None
    prefix = f"{node.target}."
    own = {path.removeprefix(prefix): each for path, each in weights.items() if path.startswith(prefix)}
    written = write(leaf, mapping[node.args[0]], own)  # type: ignore[index]
    if written is None:
        return None
    return graph.create_node("call_function", *written, name=_name(written[0]))


def _name(target: Any) -> str:
    """What torch.export calls a node, so that the values of an ONNX file are found in a component exported again."""
    name = str(getattr(target, "overloadpacket", target).__name__)
    return name.strip("_") if name.startswith("__") else name


def _linear(leaf: Any, operand: fx.Node, own: Weights) -> Call | None:
    return aten.linear.default, (operand, own["weight"], *_bias(own))


def _layer_norm(leaf: Any, operand: fx.Node, own: Weights) -> Call | None:
    shape = list(leaf.normalized_shape)
    return aten.layer_norm.default, (operand, shape, own.get("weight"), own.get("bias"), leaf.eps)


def _conv2d(leaf: Any, operand: fx.Node, own: Weights) -> Call | None:
    if leaf.padding_mode != "zeros" or isinstance(leaf.padding, str):
        return None
    sizes = [list(sizes) for sizes in (leaf.stride, leaf.padding, leaf.dilation)]
    return aten.conv2d.default, (operand, own["weight"], own.get("bias"), *sizes, leaf.groups)


def _embedding(leaf: Any, operand: fx.Node, own: Weights) -> Call | None:
    return None if leaf.max_norm is not None else (aten.embedding.default, (own["weight"], operand))


def _bias(own: Weights) -> tuple[fx.Node, ...]:
    return (own["bias"],) if "bias" in own else ()


_LEAVES: Mapping[object, Callable[[Any, fx.Node, Weights], Call | None]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.Conv2d: _conv2d,
    nn.Embedding: _embedding,
    Int8Linear: quantized_call,
    BlockwiseLinear: quantized_call,
    BlockwiseEmbedding: quantized_call,
    HalfLinear: quantized_call,
    HalfEmbedding: quantized_call,
}
