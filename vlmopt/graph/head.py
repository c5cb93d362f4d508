"""The head of a component: the last linear map, found by structure, and replaced or appended on a clone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx, nn

from vlmopt.core.program import Component, TensorSpec
from vlmopt.graph.build import insert_linear
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.modules import clone_graph, get_at, output_node, output_values, set_at


def find_head(component: Component) -> str | None:
    """Path of the Linear that makes the component's first output, if it ends in one that nothing else uses."""
    node = output_values(component.graph)[0]
    if node.op != "call_module" or not isinstance(get_at(component.graph, str(node.target)), nn.Linear):
        return None
    readers = [other for other in component.graph.graph.nodes if other.target == node.target]
    return str(node.target) if readers == [node] else None


def head_node(component: Component, path: str) -> fx.Node:
    """The call of the head.

    Raises:
        KeyError: the component has no such module.
    """
    for node in component.graph.graph.nodes:
        if node.op == "call_module" and node.target == path:
            found: fx.Node = node
            return found
    raise KeyError(path)


def head_features(component: Component, path: str | None) -> fx.Node:
    """The node whose value the head reads; without a head, the first output itself. Shape [B, d]."""
    if path is None:
        return output_values(component.graph)[0]
    operand = head_node(component, path).args[0]
    assert isinstance(operand, fx.Node)
    return operand


def head_module(component: Component, path: str) -> nn.Linear:
    leaf = get_at(component.graph, path)
    assert isinstance(leaf, nn.Linear)
    return leaf


def replace_head(component: Component, path: str, new_path: str, linear: nn.Linear, output_name: str) -> Component:
    """The component with the Linear at `path` replaced by another of the same input width, under a new path."""
    graph = clone_graph(component.graph)
    clone = replace(component, graph=graph)
    node = head_node(clone, path)
    if new_path == path:
        set_at(graph, path, linear)  # the containers are the clone's own, so the original keeps its module
        node.meta["val"] = node.meta["val"].new_empty((*node.meta["val"].shape[:-1], linear.out_features))
        return _finish(clone, None, node, linear, output_name)
    with graph.graph.inserting_before(node):
        return _finish(
            clone, node, insert_linear(graph, new_path, linear, head_features(clone, path)), linear, output_name
        )


def append_head(component: Component, path: str, linear: nn.Linear, output_name: str) -> Component:
    """The component with a Linear behind its first output."""
    graph = clone_graph(component.graph)
    clone = replace(component, graph=graph)
    value = output_values(graph)[0]
    output = output_node(graph)
    with graph.graph.inserting_before(output):
        call = insert_linear(graph, path, linear, value)
    output.args = ((call, *output_values(graph)[1:]),)
    return _finish(clone, None, call, linear, output_name)


def _finish(
    clone: Component, replaced: fx.Node | None, call: fx.Node, linear: nn.Linear, output_name: str
) -> Component:
    if replaced is not None:
        replaced.replace_all_uses_with(call)
    drop_dead_nodes(clone.graph)
    clone.graph.graph.lint()
    clone.graph.recompile()
    first = clone.outputs[0]
    spec = TensorSpec(output_name, (*first.shape[:-1], linear.out_features), first.dtype)
    return replace(clone, outputs=(spec, *clone.outputs[1:]))


def fitted_linear(weight: torch.Tensor, bias: torch.Tensor | None, *, like: torch.Tensor) -> nn.Linear:
    """A Linear with this weight [d_out, d_in] and bias [d_out], in the dtype and on the device of `like`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(like).contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(like).contiguous(), requires_grad=False)
    return linear.train(False)
