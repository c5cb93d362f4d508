"""What ATen calls make of linear maps: scales, sums, products with constants, look-ups, permutations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx

from vlmopt.graph.constants import constant_nodes
from vlmopt.graph.linear_maps import LinearMap, Maps, NotLinear, Values, on_channels, operand_of, table_map
from vlmopt.graph.text import operation_text

aten = torch.ops.aten


def maps_from(module: fx.GraphModule, root: fx.Node, constants: frozenset[fx.Node] | None = None) -> Maps:
    """The linear maps of the graph from a root; `constants` where they are known already."""
    known = constant_nodes(module) if constants is None else constants
    return Maps(module, root, known, OPERATIONS)


def _scaled(maps: Maps, node: fx.Node) -> LinearMap:
    """A product with, or a quotient by, a constant."""
    first, second = node.args[0], node.args[1]
    if node.target is aten.mul.Tensor and maps.is_constant(first):
        first, second = second, first
    if not maps.is_constant(second) or not isinstance(first, fx.Node):
        raise NotLinear(_why_no_factor(maps, node))
    own = maps.of(first)
    factor = maps.vector(second, own)
    is_quotient = node.target is aten.div.Tensor

    def values() -> Values:
        matrix, shift = own.values()
        scale = 1.0 / factor() if is_quotient else factor()
        if isinstance(matrix, float):
            return matrix * float(scale), None
        column = scale if isinstance(scale, float) or scale.dim() == 0 else scale[:, None]
        return matrix * column, None if shift is None else shift * scale

    return replace(own, values=values)


def _why_no_factor(maps: Maps, node: fx.Node) -> str:
    if node.target is aten.div.Tensor:
        return "it is divided by a value that is no constant"
    odd = [operand for operand in node.all_input_nodes if operand not in maps.constants][-1]
    return f"it is multiplied by {odd.name}, which is no constant: tokens, or calls, see it differently"


def _negated(maps: Maps, node: fx.Node) -> LinearMap:
    own = maps.of(operand_of(node))

    def values() -> Values:
        matrix, shift = own.values()
        return -matrix, None if shift is None else -shift

    return replace(own, values=values)


def _summed(maps: Maps, node: fx.Node) -> LinearMap:
    """A sum or difference of two maps, or of a map and a constant."""
    sign = float(node.kwargs.get("alpha", 1)) * (-1.0 if node.target is aten.sub.Tensor else 1.0)  # type: ignore[arg-type]
    first, second = node.args[0], node.args[1]
    if maps.is_constant(second):
        return _shifted(maps, first, second, 1.0, sign)
    if maps.is_constant(first):
        return _shifted(maps, second, first, sign, 1.0)
    one, other = maps.of(_node(first)), maps.of(_node(second))
    if one.features is None or one.features != other.features:
        raise NotLinear("it adds maps of different values, or the value itself, which goes by the weights")
    shapes = {tuple(str(size) for size in part.meta["val"].shape) for part in (node, first, second)}  # type: ignore[union-attr]
    if one.axes != other.axes or one.channel != other.channel or len(shapes) > 1:
        raise NotLinear("it adds values of different shapes")

    def values() -> Values:
        (matrix, shift), (more, moved) = one.values(), other.values()
        assert isinstance(more, Tensor)
        total = None if moved is None else sign * moved
        return matrix + sign * more, shift if total is None else total if shift is None else shift + total

    groups = one.groups if one.groups == other.groups else 1
    return replace(one, groups=groups, has_shift=one.has_shift or other.has_shift, values=values)


def _shifted(maps: Maps, value: object, constant: object, factor: float, sign: float) -> LinearMap:
    own = maps.of(_node(value))
    if own.features is None:
        raise NotLinear("it adds a constant to the value in front of the weights")
    vector = maps.vector(constant, own)

    def values() -> Values:
        matrix, shift = own.values()
        more = torch.as_tensor(sign * vector(), dtype=torch.float64).expand(own.width)
        return matrix * factor, more if shift is None else shift * factor + more

    return replace(own, has_shift=True, values=values)


def _node(value: object) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise NotLinear("it reads no value")
    return value


def _product(maps: Maps, node: fx.Node) -> LinearMap:
    """`v @ W`, with a constant W [D, width]."""
    matrix = maps.matrix(node.args[1], operation_text(maps.module, node))
    own = maps.of(operand_of(node))
    return on_channels(own, len(own.axes) - 1, int(node.meta["val"].shape[-1]), lambda: matrix().T, None)


def _functional_linear(maps: Maps, node: fx.Node) -> LinearMap:
    matrix, bias = maps.matrix(node.args[1], "linear"), node.args[2] if len(node.args) > 2 else None
    if bias is not None and not maps.is_constant(bias):
        raise NotLinear("the bias of a linear is no constant")
    own = maps.of(operand_of(node))
    shift = None if bias is None else (lambda: torch.as_tensor(maps.number(bias)))
    return on_channels(own, len(own.axes) - 1, int(node.meta["val"].shape[-1]), matrix, shift)


def _looked_up(maps: Maps, node: fx.Node) -> LinearMap:
    """`embedding(W, x)` with a constant table W."""
    matrix, own = maps.matrix(node.args[0], "embedding"), maps.of(_node(node.args[1]))
    if own.features is not None or not own.is_upright:
        raise NotLinear("an embedding of computed rows is part of it")
    return table_map(own, int(node.meta["val"].shape[-1]), matrix)


def _permuted(maps: Maps, node: fx.Node) -> LinearMap:
    own = maps.of(operand_of(node))
    n = len(own.axes)
    order = list(range(n))
    if node.target is aten.permute.default:
        order = [int(axis) % n for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        one, other = (-2, -1) if len(node.args) < 3 else (int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
    return replace(own, axes=tuple(own.axes[axis] for axis in order))


OPERATIONS: dict[object, Callable[[Maps, fx.Node], LinearMap]] = {
    aten.mul.Tensor: _scaled,
    aten.mul.Scalar: _scaled,
    aten.div.Tensor: _scaled,
    aten.div.Scalar: _scaled,
    aten.neg.default: _negated,
    aten.add.Tensor: _summed,
    aten.sub.Tensor: _summed,
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.linear.default: _functional_linear,
    aten.embedding.default: _looked_up,
    aten.transpose.int: _permuted,
    aten.permute.default: _permuted,
    aten.t.default: _permuted,
    aten.numpy_T.default: _permuted,
    aten.mT.default: _permuted,
}
