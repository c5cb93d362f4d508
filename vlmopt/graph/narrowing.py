"""Cuts units out of a graph: rows and columns of Linears, tensors of one number a unit, constants in views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from vlmopt.core.cost import Cost
from vlmopt.core.program import Component, Dim, TensorSpec
from vlmopt.graph.costing import nodes_cost
from vlmopt.graph.folding import linear_of
from vlmopt.graph.modules import clone_graph, free_path, get_at, output_values, placeholders, set_at
from vlmopt.graph.unit_axes import FREE, SPLITS, Layout, Mixed, axis_argument, n_axes
from vlmopt.graph.widths import Group

aten = torch.ops.aten

_SIZES_AT = {
    aten.view.default: 1, aten.reshape.default: 1, aten._unsafe_view.default: 1, aten.expand.default: 1,
}  # fmt: skip

Taking = Callable[[Tensor, int, Tensor], Tensor]


def take(tensor: Tensor, axis: int, places: Tensor) -> Tensor:
    """The tensor at these places of one axis, in memory of its own."""
    return tensor.detach().index_select(axis, places.to(tensor.device))


def shape_only(tensor: Tensor, axis: int, places: Tensor) -> Tensor:
    """What `take` gives, without numbers."""
    shape = list(tensor.shape)
    shape[axis] = len(places)
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def narrowed(
    component: Component,
    group: Group,
    kept: Sequence[int],
    *,
    readers: Mapping[str, nn.Linear] | None = None,
    taking: Taking = take,
) -> Component:
    """The component with no units of the group but these, its graph edited in place.

    Args:
        kept: units, ascending.
        readers: Linears of the new width for paths of consumers; by default their own columns are kept.
        taking: how tensors are cut.

    Raises:
        Mixed: a constant of the graph says how many units there are, and cannot be rewritten.
    """
    module = component.graph
    wanted = torch.tensor([FREE, *kept])
    places = {node: torch.isin(one.units, wanted).nonzero().flatten() for node, one in group.layouts.items()}
    for node in list(module.graph.nodes):
        if node in places:
            _narrow(module, node, group.layouts[node], places[node], taking)
        elif node.target in SPLITS and (whole := node.all_input_nodes[0]) in places:
            _narrow_split(node, group.layouts[whole], places[whole])
    for node in group.consumers:
        leaf, path = linear_of(module, node), str(node.target)
        made = None if readers is None else readers.get(path)
        columns = places[group.source]
        set_at(module, path, linear_like(taking(leaf.weight, 1, columns), leaf.bias, leaf) if made is None else made)
    return _with_specs(component, places)


def narrowing_saving(component: Component, group: Group, n_kept: int, dims: Mapping[str, Dim]) -> Cost:
    """What is saved where so many units are kept.

    Raises:
        Mixed: the group cannot be cut.
    """
    trial = replace(component, graph=clone_graph(component.graph))
    twins = dict(zip(component.graph.graph.nodes, trial.graph.graph.nodes, strict=True))
    own = Group(
        group.n_units,
        {twins[node]: layout for node, layout in group.layouts.items()},
        tuple(twins[node] for node in group.producers),
        tuple(twins[node] for node in group.consumers),
        twins[group.source],
    )
    before, nodes = nodes_cost(trial, own.nodes, dims), own.nodes
    return before - nodes_cost(narrowed(trial, own, range(n_kept), taking=shape_only), nodes, dims)


def _narrow(module: fx.GraphModule, node: fx.Node, layout: Layout, places: Tensor, taking: Taking) -> None:
    axis, value = layout.axis, node.meta["val"]
    if node.op == "call_function":
        rewrite_size(node, axis, len(places))
        node.meta["val"] = computed_value(node)
        if node.meta["val"].shape[axis] != len(places):
            raise Mixed(f"{node.name} has {node.meta['val'].shape[axis]} of {len(places)} places after the cut")
        return
    if node.op == "get_attr":
        tensor = get_at(module, str(node.target))
        assert isinstance(tensor, Tensor)
        made, is_weight = taking(tensor, axis, places), isinstance(tensor, nn.Parameter)
        path = free_path(module, str(node.target))
        set_at(module, path, nn.Parameter(made, requires_grad=tensor.requires_grad) if is_weight else made)
        node.target = path
    elif node.op == "call_module" and axis == value.dim() - 1:
        leaf = linear_of(module, node)
        bias = None if leaf.bias is None else taking(leaf.bias, 0, places)
        set_at(module, str(node.target), linear_like(taking(leaf.weight, 0, places), bias, leaf))
    shape = list(value.shape)
    shape[axis] = len(places)
    node.meta["val"] = value.new_empty(shape)


def _narrow_split(node: fx.Node, layout: Layout, places: Tensor) -> None:
    """A value that is taken apart: along the axis of the units every part gets its own number of places."""
    axis = axis_argument(node, 1 if node.target is aten.unbind.int else 2, 0, n_axes(node.all_input_nodes[0]))
    if axis == layout.axis:
        ends = torch.tensor([part.shape[axis] for part in node.meta["val"]]).cumsum(0)
        counts = torch.bincount(torch.bucketize(places, ends, right=True), minlength=len(ends)).tolist()
        if node.target is aten.split_with_sizes.default:
            node.update_arg(1, counts)
        elif len(set(counts)) > 1 or node.target is aten.unbind.int:
            raise Mixed(f"{node.name} would split its value into other parts")
        elif node.target is aten.split.Tensor:
            node.update_arg(1, counts[0])
    node.meta["val"] = computed_value(node)


def computed_value(node: fx.Node) -> object:
    """The value of a call from those of its operands."""
    args, kwargs = (fx.node.map_arg(part, lambda n: n.meta["val"]) for part in (node.args, node.kwargs))
    assert callable(node.target)
    try:
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[arg-type]
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise Mixed(f"{node.name} does not accept fewer units ({reason})") from error


def rewrite_size(node: fx.Node, axis: int, size: int) -> None:
    """Puts the new size into a view that states it."""
    first = 0
    if node.target is aten.unflatten.int:
        first = axis_argument(node, 1, 0, n_axes(node.all_input_nodes[0]))
    elif node.target not in _SIZES_AT:
        return
    place = _SIZES_AT.get(node.target, 2)
    sizes = list(node.args[place])  # type: ignore[arg-type]
    at = axis - first
    if not 0 <= at < len(sizes) or sizes[at] == -1:
        return
    if not isinstance(sizes[at], int):
        raise Mixed(f"{node.name} computes how many there are")
    sizes[at] = size
    node.update_arg(place, sizes)


def _with_specs(component: Component, places: Mapping[fx.Node, Tensor]) -> Component:
    """The component whose entries of the cache are as wide as they became."""
    module = component.graph
    inputs = zip(component.inputs, placeholders(module), strict=True)
    outputs = zip(component.outputs, output_values(module), strict=True)
    made = replace(
        component,
        inputs=tuple(_with_shape(spec, node) if node in places else spec for spec, node in inputs),
        outputs=tuple(_with_shape(spec, node) if node in places else spec for spec, node in outputs),
    )
    module.recompile()
    return made


def _with_shape(spec: TensorSpec, node: fx.Node) -> TensorSpec:
    pairs = zip(spec.shape, node.meta["val"].shape, strict=True)
    return replace(spec, shape=tuple(old if isinstance(old, str) else int(new) for old, new in pairs))


def linear_like(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """A Linear with this weight [d_out, d_in] and bias, which are trained where those of `like` are."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
    if bias is not None:
        own = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=like.weight.requires_grad)
        linear.bias = own
    return linear.train(like.training)
