"""What a region of a graph computes, as one matrix: linear layers, low-rank chains, scales, sums and casts together.

Let `x` be the value of a node, the root. A value behind it is a linear map of it where, in rows,

    value = f(x) M + c      with M [K, D] and c [D] the same in every call and for every token.

Three kinds of features `f` cover what weights are put on:

1. vector: `f(x)` is a row of `x` along one axis (Linear, and products with a constant matrix);
2. patch: `f(x)` is what a convolution reads at one place, of one kernel size, stride, padding and dilation; one of
   kernel 1 behind it acts on channels alone, so a chain of both is a convolution of the first one's kind;
3. row: `f(x)` has a one at the row that `x` names (Embedding), and M is the table.

Everything behind the first weight acts on channels: further Linears, scales, sums of maps of the same features, casts
between real types, reshapes that keep the channels whole, permutations that are undone. Constants are whatever depends
on no input, computed or stored: the norm over a weight and its update, for instance, is one.

What is no such map raises `NotLinear` with the reason in words. Numbers are computed when asked for, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from vlmopt.graph.canonical import is_hand_on
from vlmopt.graph.constants import evaluate_constant
from vlmopt.graph.modules import get_at
from vlmopt.graph.text import operation_text

aten = torch.ops.aten

Values = tuple[Tensor | float, Tensor | None]  # matrix [D, K], or so many times the identity; shift [D]

SELECTING = {
    aten.where.self, aten.index.Tensor, aten.index_put.default, aten.masked_fill.Scalar, aten.masked_scatter.default,
    aten.index_select.default, aten.gather.default, aten.scatter.src, aten.masked_select.default, aten.select.int,
    aten.where.ScalarOther, aten.masked_fill.Tensor,
}  # fmt: skip
VIEWING = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.expand.default,
    aten.view_as.default, aten.expand_as.default,
}  # fmt: skip
CASTS = {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default}


class NotLinear(Exception):  # noqa: N818  (a finding, caught in this room)
    """Why a value is no linear map of the root."""


@dataclass(frozen=True)
class Features:
    """What of the root a map reads: `kind` is vector, patch or row; the rest is the axis, or the geometry."""

    kind: str
    detail: tuple[object, ...] = ()


@dataclass(frozen=True)
class LinearMap:
    """A value as a linear map of the root.

    Args:
        features: None for the root itself (scaled, permuted, reshaped) that no weight has read yet.
        axes: for every axis of the value its place before permutations.
        channel: the axis of the D channels, before permutations.
        groups: the matrix is zero outside so many blocks on its diagonal.
        values: the numbers, computed when called.
    """

    features: Features | None
    width: int
    axes: tuple[int, ...]
    channel: int
    groups: int
    has_shift: bool
    values: Callable[[], Values]

    @property
    def place(self) -> int:
        """The axis of the channels in the value as it is."""
        return self.axes.index(self.channel)

    @property
    def is_upright(self) -> bool:
        return self.axes == tuple(range(len(self.axes)))


@dataclass
class Maps:
    """The linear maps of one graph from one root; every value is looked at once.

    Args:
        constants: the nodes that depend on no input.
        operations: what ATen calls make of maps (`linear_operations.py`).
    """

    module: fx.GraphModule
    root: fx.Node
    constants: frozenset[fx.Node]
    operations: Mapping[object, Callable[[Maps, fx.Node], LinearMap]]
    _known: dict[fx.Node, LinearMap] = field(default_factory=dict)

    def of(self, node: fx.Node) -> LinearMap:
        """The value of the node as a map of the root.

        Raises:
            NotLinear: it is none.
        """
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def _find(self, node: fx.Node) -> LinearMap:
        if node is self.root:
            n = node.meta["val"].dim()
            return LinearMap(None, 0, tuple(range(n)), -1, 1, has_shift=False, values=lambda: (1.0, None))
        if node.op == "call_module":
            return self._leaf(node)
        if node.op != "call_function" or not node.all_input_nodes:
            raise NotLinear(f"it reads {node.name}, which is another input")
        if node.target in CASTS or is_hand_on(node):
            return self._cast(node)
        if node.target in VIEWING:
            return self._viewed(node)
        operation = self.operations.get(node.target)
        if operation is not None:
            return operation(self, node)
        what = operation_text(self.module, node)
        if node.target in SELECTING:
            raise NotLinear(f"only some tokens see it: {what} chooses among them")
        raise NotLinear(f"a {what} is part of it")

    def is_constant(self, value: object) -> bool:
        return isinstance(value, int | float) or value in self.constants

    def number(self, value: object) -> Tensor | float:
        """A constant operand, in float64."""
        if isinstance(value, int | float):
            return float(value)
        assert isinstance(value, fx.Node)
        found = get_at(self.module, str(value.target)) if value.op == "get_attr" else None
        stored = found if isinstance(found, Tensor) else evaluate_constant(self.module, value)
        return stored.detach().double()

    def vector(self, value: object, own: LinearMap) -> Callable[[], Tensor | float]:
        """A constant that differs by channel alone: a number, or [D]."""
        if isinstance(value, int | float):
            return lambda: self.number(value)
        assert isinstance(value, fx.Node)
        shape = list(value.meta["val"].shape)
        if math.prod(shape) == 1:
            return lambda: torch.as_tensor(self.number(value)).reshape(())
        from_end = len(own.axes) - own.place
        others = [size for i, size in enumerate(shape) if len(shape) - i != from_end]
        if own.features is None or len(shape) > len(own.axes) or any(size != 1 for size in others):
            raise NotLinear(f"{value.name} differs from token to token")
        return lambda: torch.as_tensor(self.number(value)).reshape(-1)

    def matrix(self, value: object, what: str) -> Callable[[], Tensor]:
        """A constant matrix."""
        if not isinstance(value, fx.Node) or value not in self.constants:
            raise NotLinear(f"it is routed: the second factor of a {what} is no constant, it depends on an input")
        if value.meta["val"].dim() != 2:
            raise NotLinear(f"a {what} with {value.meta['val'].dim()} axes is part of it")
        return lambda: torch.as_tensor(self.number(value))

    def _cast(self, node: fx.Node) -> LinearMap:
        if not node.meta["val"].is_floating_point() and node.args[0] is not self.root:
            raise NotLinear(f"a {operation_text(self.module, node)} to {node.meta['val'].dtype} is part of it")
        return self.of(operand_of(node))

    def _viewed(self, node: fx.Node) -> LinearMap:
        """A reshape keeps the order of the tokens where the channels come last and stay whole."""
        own, before, after = self.of(operand_of(node)), operand_of(node).meta["val"].shape, node.meta["val"].shape
        if [str(size) for size in before] == [str(size) for size in after]:
            return own
        is_last = own.features is None or own.place == len(before) - 1
        rows = own.is_upright and is_last and len(after) > 0 and str(before[-1]) == str(after[-1])
        if not rows or node.target in (aten.expand.default, aten.expand_as.default):
            raise NotLinear(f"a {operation_text(self.module, node)} takes its channels apart")
        n = len(after)
        return replace(own, axes=tuple(range(n)), channel=-1 if own.features is None else n - 1)

    def _leaf(self, node: fx.Node) -> LinearMap:
        leaf, own = get_at(self.module, str(node.target)), self.of(operand_of(node))
        if type(leaf) is nn.Linear:
            bias = None if leaf.bias is None else (lambda: leaf.bias.detach().double())
            return on_channels(own, len(own.axes) - 1, leaf.out_features, lambda: leaf.weight.detach().double(), bias)
        if type(leaf) is nn.Embedding and own.features is None and own.is_upright:
            return table_map(own, leaf.embedding_dim, lambda: leaf.weight.detach().double())
        if type(leaf) is nn.Conv2d:
            return _convolved(own, leaf)
        raise NotLinear(f"a {operation_text(self.module, node)} is part of it")


def operand_of(node: fx.Node) -> fx.Node:
    operand = node.all_input_nodes[0] if node.op == "call_module" else node.args[0]
    if not isinstance(operand, fx.Node):
        raise NotLinear(f"{node.name} reads no value")
    return operand


def on_channels(
    own: LinearMap, axis: int, width: int, weight: Callable[[], Tensor], bias: Callable[[], Tensor] | None
) -> LinearMap:
    """The map with another one `v W + b` behind it, along the axis of its value; `weight` gives [width, D]."""
    if own.features is not None and own.place != axis:
        raise NotLinear("a map along another axis than that of the channels is part of it")
    channel = own.axes[axis]

    def values() -> Values:
        matrix, shift = own.values()
        last = weight()
        made = last * matrix if isinstance(matrix, float) else last @ matrix
        moved = None if shift is None else last @ shift
        if bias is None:
            return made, moved
        return made, bias() if moved is None else moved + bias()

    features = own.features or Features("vector", (channel - len(own.axes),))
    return LinearMap(features, width, own.axes, channel, 1, own.has_shift or bias is not None, values)


def table_map(own: LinearMap, width: int, weight: Callable[[], Tensor]) -> LinearMap:
    n = len(own.axes)
    return LinearMap(
        Features("row"), width, tuple(range(n + 1)), n, 1, has_shift=False, values=lambda: (weight().T, None)
    )


_POINT = ((1, 1), (1, 1), (0, 0), (1, 1))


def _convolved(own: LinearMap, leaf: nn.Conv2d) -> LinearMap:
    """A convolution of the root; one of kernel 1 behind such a map; or any behind one of kernel 1 without shift."""
    geometry = (leaf.kernel_size, leaf.stride, leaf.padding, leaf.dilation)
    is_point = (*geometry[:2], geometry[2] if leaf.padding != "valid" else (0, 0), geometry[3]) == _POINT
    if len(own.axes) != 4 or not own.is_upright:
        raise NotLinear("a convolution of a value that was turned or reshaped is part of it")
    bias = None if leaf.bias is None else (lambda: leaf.bias.detach().double())  # type: ignore[union-attr]
    if own.features is None or (own.features == Features("patch", _POINT) and not own.has_shift and not is_point):
        inner = own

        def values() -> Values:
            kernel, (matrix, _) = dense_kernel(leaf), inner.values()
            made = kernel * matrix if isinstance(matrix, float) else torch.einsum("orhw,ri->oihw", kernel, matrix)
            return made.flatten(1), None if bias is None else bias()

        groups = leaf.groups if own.features is None or own.groups == leaf.groups else 1
        return LinearMap(
            Features("patch", geometry), leaf.out_channels, own.axes, 1, groups, leaf.bias is not None, values
        )
    if not is_point or own.features.kind != "patch":
        raise NotLinear("a convolution that mixes places is behind another map")
    made = on_channels(own, 1, leaf.out_channels, lambda: dense_kernel(leaf).flatten(1), bias)
    return replace(made, groups=leaf.groups if leaf.groups == own.groups else 1)


def dense_kernel(leaf: nn.Conv2d) -> Tensor:
    """The kernel [C_out, C_in, h, w] of a convolution, zero between groups, in float64."""
    weight = leaf.weight.detach().double()
    if leaf.groups == 1:
        return weight
    n_out, n_in = leaf.out_channels // leaf.groups, leaf.in_channels // leaf.groups
    dense = weight.new_zeros(leaf.out_channels, leaf.in_channels, *weight.shape[2:])
    for group in range(leaf.groups):
        rows, columns = slice(group * n_out, (group + 1) * n_out), slice(group * n_in, (group + 1) * n_in)
        dense[rows, columns] = weight[rows]
    return dense
