"""Counts parameters, multiply-accumulates (attention included) and activation bytes of a component or of some nodes.

Units: MACs and bytes of one sample (batch 1) at the typical size of every other dimension. Additions, norms and
activation functions count no MACs, as is usual in the field.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn

from vlmopt.core.cost import Cost
from vlmopt.core.program import PRESENT, Component, Dim, Program
from vlmopt.graph.modules import get_at, output_values
from vlmopt.graph.quantized import BlockwiseLinear, HalfLinear, Int8Linear, QuantizedLeaf
from vlmopt.graph.sizes import Sizes, bytes_of, counting_sizes, shape_of

aten = torch.ops.aten

VIEWS = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.slice.Tensor, aten.flatten.using_ints,
    aten.unflatten.int, aten.t.default, aten.alias.default, aten.chunk.default, aten.split.Tensor, aten.unbind.int,
    aten.split_with_sizes.default, aten.expand_as.default, aten.view_as.default, aten.narrow.default,
    aten.squeeze.default, aten.squeeze.dims, aten.diagonal.default, aten.detach.default, operator.getitem,
}  # fmt: skip

_CONVOLUTIONS = {
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
    aten.conv3d.padding, aten.convolution.default,
}  # fmt: skip
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.linear.default}


def component_cost(component: Component, dims: Mapping[str, Dim]) -> Cost:
    """Cost of the whole component."""
    return nodes_cost(component, list(component.graph.graph.nodes), dims)


def program_cost(program: Program) -> Cost:
    """Cost of all components; a tensor that several share counts once."""
    total, seen = Cost(), set[int]()
    for component in program.components.values():
        cost = nodes_cost(component, list(component.graph.graph.nodes), program.dims, seen=seen)
        total = total + cost
    return total


def nodes_cost(
    component: Component, nodes: Iterable[fx.Node], dims: Mapping[str, Dim], *, seen: set[int] | None = None
) -> Cost:
    """Cost of these nodes; `seen` holds the identities of tensors counted before, and is added to."""
    sizes = counting_sizes(component, dims)
    counted = set() if seen is None else seen
    parameters = parameter_bytes = macs = activations = kept = 0
    kept_bytes = _kept_bytes(component)
    for node in nodes:
        kept += kept_bytes.get(node, 0)
        for tensor in weights_of(component.graph, node):
            if id(tensor) not in counted:
                counted.add(id(tensor))
                parameters += _count(component.graph, node, tensor)
                parameter_bytes += tensor.numel() * tensor.element_size()
        macs += node_macs(component.graph, node, sizes)
        if node.op in ("call_module", "call_function") and node.target not in VIEWS:
            activations += bytes_of(node, sizes)
    return Cost(parameters, parameter_bytes, macs, activations, kept)


def _kept_bytes(component: Component) -> dict[fx.Node, int]:
    """Bytes of one token in every value that the component returns for the next step."""
    found: dict[fx.Node, int] = {}
    for node, spec in zip(output_values(component.graph), component.outputs, strict=False):
        is_grown = any(isinstance(size, str) and size != "batch" for size in spec.shape)
        if spec.name.startswith(PRESENT) and is_grown and not spec.is_cross:  # others are kept once
            size = torch.empty((), dtype=getattr(torch, spec.dtype)).element_size()
            found[node] = size * math.prod(size for size in spec.shape if isinstance(size, int))
    return found


def weights_of(module: fx.GraphModule, node: fx.Node) -> list[torch.Tensor]:
    """The weights that the node brings with it; index buffers are no parameters."""
    if node.op == "call_module":
        leaf = get_at(module, str(node.target))
        if isinstance(leaf, QuantizedLeaf):
            return list(leaf.buffers())
        return list(leaf.parameters()) if isinstance(leaf, nn.Module) else []
    if node.op == "get_attr":
        value = get_at(module, str(node.target))
        return [value] if isinstance(value, torch.Tensor) and value.is_floating_point() else []
    return []


def _count(module: fx.GraphModule, node: fx.Node, tensor: torch.Tensor) -> int:
    """Numbers in a weight of the node; several of few bits lie in one element."""
    leaf = get_at(module, str(node.target))
    return leaf.n_weights if isinstance(leaf, QuantizedLeaf) and tensor is leaf.weight else tensor.numel()


def node_macs(module: fx.GraphModule, node: fx.Node, sizes: Sizes) -> int:
    """Multiply-accumulates of one node."""
    out = shape_of(node, sizes)
    if out is None:
        return 0
    if node.op == "call_module":
        return _module_macs(get_at(module, str(node.target)), out)
    if node.op == "call_function":
        return _function_macs(node, out, sizes)
    return 0


def _module_macs(leaf: object, out: tuple[int, ...]) -> int:
    if isinstance(leaf, nn.Linear | Int8Linear | BlockwiseLinear | HalfLinear):
        return math.prod(out) * leaf.in_features
    if isinstance(leaf, nn.Conv2d):
        return math.prod(out) * leaf.in_channels // leaf.groups * math.prod(leaf.kernel_size)
    return 0


def _function_macs(node: fx.Node, out: tuple[int, ...], sizes: Sizes) -> int:
    shapes = [shape_of(arg, sizes) for arg in node.args if isinstance(arg, fx.Node)]
    if node.target is aten.scaled_dot_product_attention.default:
        return _attention_macs(shapes[0], shapes[1], shapes[2])
    if node.target in _PRODUCTS and shapes[0]:
        return math.prod(out) * shapes[0][-1]
    if node.target in (aten.addmm.default, aten.baddbmm.default) and shapes[1]:
        return math.prod(out) * shapes[1][-1]
    if node.target in _CONVOLUTIONS and shapes[1]:
        return math.prod(out) * math.prod(shapes[1][1:])
    return 0


def _attention_macs(query: tuple[int, ...] | None, key: tuple[int, ...] | None, value: tuple[int, ...] | None) -> int:
    """Scores and weighted sum: B H Nq Nk (d_k + d_v)."""
    if query is None or key is None or value is None:
        return 0
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def peak_activation_bytes(component: Component, dims: Mapping[str, Dim]) -> int:
    """Largest sum of values alive at one time, walking the graph in order; a view keeps what it looks at alive."""
    sizes = counting_sizes(component, dims)
    nodes = list(component.graph.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    last_use: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        ends_at = (last_use[user] if user.target in VIEWS else order[user] for user in node.users)
        last_use[node] = max(ends_at, default=order[node])
    ends: dict[int, list[int]] = {}
    alive = peak = 0
    for i, node in enumerate(nodes):
        if node.op != "get_attr" and node.target not in VIEWS:
            size = bytes_of(node, sizes)
            alive += size
            ends.setdefault(last_use[node], []).append(size)
        peak = max(peak, alive)
        alive -= sum(ends.pop(i, []))
    return peak
