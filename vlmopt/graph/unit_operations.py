"""How operations pass layouts of units on (`unit_axes.py`): views and permutations move them, operations on single
numbers hand them on to operands of the same size, and what sums over units keeps none apart.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from vlmopt.graph.canonical import writes
from vlmopt.graph.unit_axes import (
    FREE,
    Layout,
    Mixed,
    Together,
    aligned,
    aligned_up,
    axis_argument,
    n_axes,
    operands_of,
    refuse_along,
    refuse_normed,
    size_at,
    split_of,
)

aten = torch.ops.aten

_RESHAPES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.view_as.default,
}  # fmt: skip
_HANDED_ON = {
    aten.dropout.default, aten.feature_dropout.default, aten.clone.default, aten.contiguous.default, aten.to.dtype,
    aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, aten.expand.default, aten.expand_as.default,
    aten.alias.default, aten.detach.default,
}  # fmt: skip
_ALONG_ONE = {aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default, aten.cat.default}
_REDUCED = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction}
_SDPA = aten.scaled_dot_product_attention.default


class _Rule(NamedTuple):
    """`down` gives the layout of an operation's value from that of an operand; `up` that of an operand from the
    value's, or None where the operand holds no units."""

    down: Callable[[fx.Node, fx.Node, Layout], Layout]
    up: Callable[[fx.Node, fx.Node, Layout], Layout | None]


def passed_on(node: fx.Node, at: fx.Node, layout: Layout) -> dict[fx.Node, Layout]:
    """The layouts of a call's other operands and of its value, where `at`, an operand or the call itself, has this one.

    Raises:
        Mixed: the call computes one unit from others, or is not known.
    """
    rule = _rule_of(node)
    found: dict[fx.Node, Layout] = {}
    value = layout
    if at is not node:
        value = found[node] = rule.down(node, at, layout)
    for operand in operands_of(node):
        above = rule.up(node, operand, value)
        if above is not None and operand is not at:
            found[operand] = above
    return found


def layout_above(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    """The layout of an operand of a call whose value has this one; None where the operand holds no units.

    Raises:
        Mixed, Together: the call computes one unit from others, or is not known.
    """
    return _rule_of(node).up(node, operand, layout)


def _rule_of(node: fx.Node) -> _Rule:
    target = node.target
    if target is operator.getitem:
        target = split_of(node).target
    if target in _RULES:
        return _RULES[target]
    is_pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    if is_pointwise and not writes(node):
        return _ALIGNED
    raise Mixed(f"{node.name} is no operation that keeps them apart")


def _apart(place: int, default: int) -> _Rule:
    """Operations along one axis, which must not be that of the units."""

    def down(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout:
        found = aligned(node, operand, layout)
        refuse_along(node, found, {axis_argument(node, place, default, n_axes(node))})
        return found

    def up(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
        refuse_along(node, layout, {axis_argument(node, place, default, n_axes(node))})
        return aligned_up(node, operand, layout)

    return _Rule(down, up)


def _normed(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout:
    found = aligned(node, operand, layout)
    refuse_normed(node, found, len(node.args[1]))  # type: ignore[arg-type]
    return found


def _normed_up(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    refuse_normed(node, layout, len(node.args[1]))  # type: ignore[arg-type]
    return aligned_up(node, operand, layout)


def _kept_axes(node: fx.Node) -> list[int]:
    """For every axis of a reduced value the axis that it was; -1 for one that holds a single number now."""
    n = n_axes(operands_of(node)[0])
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = {axis % n for axis in given if isinstance(axis, int)} if isinstance(given, list | tuple) else set()
    axes = axes or set(range(n))
    if n_axes(node) == n:
        return [-1 if axis in axes else axis for axis in range(n)]
    return [axis for axis in range(n) if axis not in axes]


def _moved(order: Callable[[fx.Node], list[int]]) -> _Rule:
    """Operations whose value has the axes `order` of their operand."""

    def down(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout:
        if layout.axis not in order(node):
            raise Mixed(f"{node.name} computes one unit from the others")
        return Layout(order(node).index(layout.axis), layout.units)

    def up(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
        axis = order(node)[layout.axis]
        return None if axis < 0 else Layout(axis, layout.units)

    return _Rule(down, up)


def _permutation(node: fx.Node) -> list[int]:
    n = n_axes(node)
    if node.target is aten.permute.default:
        return [int(axis) % n for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    order = list(range(n))
    one, other = (int(axis) % n for axis in (node.args[1:] if len(node.args) > 2 else (-2, -1)))  # type: ignore[arg-type]
    order[one], order[other] = order[other], order[one]
    return order


def _without_one(node: fx.Node) -> list[int]:
    (operand,) = operands_of(node)
    source = split_of(node) if node.target is operator.getitem else node
    n = n_axes(operand)
    gone = axis_argument(source, 1, 0, n)
    return [axis for axis in range(n) if axis != gone]


def _part_of(part: fx.Node) -> tuple[int, slice]:
    """The axis that a value is split along, and which positions a part holds."""
    source, number = split_of(part), int(part.args[1])  # type: ignore[arg-type]
    whole = source.all_input_nodes[0]
    axis = axis_argument(source, 2, 0, n_axes(whole))
    sizes = [value.shape[axis] for value in source.meta["val"]]
    start = sum(sizes[:number])
    return axis, slice(start, start + sizes[number])


def _split_down(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout:
    axis, places = _part_of(node)
    return Layout(axis, layout.units[places]) if layout.axis == axis else layout


def _split_up(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    axis, places = _part_of(node)
    if layout.axis != axis:
        return layout
    units = torch.full((int(size_at(operand, axis)),), FREE)
    units[places] = layout.units
    return Layout(axis, units)


def _sliced(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout:
    """Slices along other axes; one that takes all of an axis changes nothing."""
    if layout.axis == axis_argument(node, 1, 0, n_axes(node)) and size_at(node, layout.axis) != len(layout.units):
        raise Mixed(f"{node.name} takes some of its units by number")
    return layout


def _sliced_up(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    if size_at(operand, layout.axis) != len(layout.units):
        raise Mixed(f"{node.name} takes some of its units by number")
    return layout


def _repeated(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout:
    times, axis = int(node.args[1]), axis_argument(node, 2, 0, n_axes(node))  # type: ignore[arg-type]
    return Layout(axis, layout.units.repeat_interleave(times)) if layout.axis == axis else layout


def _repeated_up(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    times, axis = int(node.args[1]), axis_argument(node, 2, 0, n_axes(node))  # type: ignore[arg-type]
    return Layout(axis, _one_of(layout.units, times)) if layout.axis == axis else layout


def _one_of(units: Tensor, times: int) -> Tensor:
    """One unit for so many neighbours, which read one value."""
    rows = units.reshape(-1, times)
    if bool((rows != rows[:, :1]).any()):
        raise Together(rows)
    return rows[:, 0]


def _attended(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout:
    """Attention: the units are heads; heads of keys and values are repeated for the queries of a group."""
    if operand not in node.args[:3]:
        return aligned(node, operand, layout)
    if layout.axis != n_axes(operand) - 3:
        raise Mixed(f"{node.name} computes one unit from the others")
    times, rest = divmod(int(size_at(node, n_axes(node) - 3)), len(layout.units))
    if rest:
        raise Mixed(f"{node.name} has another number of heads")
    return Layout(n_axes(node) - 3, layout.units.repeat_interleave(times))


def _attended_up(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    if layout.axis != n_axes(node) - 3:
        raise Mixed(f"{node.name} computes one unit from the others")
    if operand not in node.args[:3]:
        return aligned_up(node, operand, layout)
    axis = n_axes(operand) - 3
    return Layout(axis, _one_of(layout.units, len(layout.units) // int(size_at(operand, axis))))


def _multiplied(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout:
    """A matrix product: rows of the first factor, columns of the second, or an axis of many products."""
    from_end = n_axes(operand) - layout.axis
    own = 2 if operand is node.args[0] else 1
    if from_end > 2:
        return aligned(node, operand, layout)
    if from_end != own or node.args[0] is node.args[1]:
        raise Mixed(f"{node.name} sums over them")
    return Layout(n_axes(node) - own, layout.units)


def _multiplied_up(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    from_end = n_axes(node) - layout.axis
    if from_end > 2:
        return aligned_up(node, operand, layout)
    own = 2 if operand is node.args[0] else 1
    return Layout(n_axes(operand) - own, layout.units) if from_end == own else None


def _reshaped(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout:
    return _viewed(node, operand, node, layout)


def _reshaped_up(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    return _viewed(node, node, operand, layout) if operand is node.args[0] else None


def _viewed(node: fx.Node, before: fx.Node, after: fx.Node, layout: Layout) -> Layout:
    """The layout under another shape of the same numbers: the axes around stay, some are joined or taken apart."""
    old, new = (list(one.meta["val"].shape) for one in (before, after))
    olds, news = _same_part(node, old, new, layout.axis)
    sizes = [*(old[axis] for axis in olds), *(new[axis] for axis in news)]
    if not all(isinstance(size, int) for size in sizes):
        raise Mixed(f"{node.name} joins them with an axis whose size may vary")
    shape = [len(layout.units) if axis == layout.axis else 1 for axis in olds]
    flat = layout.units.reshape(shape).expand([int(old[axis]) for axis in olds]).reshape([int(new[a]) for a in news])
    for place, axis in enumerate(news):
        first = flat.movedim(place, 0).reshape(flat.shape[place], -1)
        if len(first) > 1 and bool((first == first[:, :1]).all()):
            return Layout(axis, first[:, 0].contiguous())
    outermost = next(place for place, size in enumerate(flat.shape) if size > 1)
    raise Together(flat.movedim(outermost, 0).reshape(flat.shape[outermost], -1))


def _same_part(node: fx.Node, old: list[object], new: list[object], wanted: int) -> tuple[list[int], list[int]]:
    """The shortest runs of axes of two shapes that hold the same numbers, the axis `wanted` among the first."""
    i = j = 0
    while i < len(old):
        olds, news = [i], [j] if j < len(new) else []
        while (sizes := (_product(old, olds), _product(new, news)))[0] != sizes[1]:
            is_less = _is_less(*sizes)
            run, shape = (olds, old) if is_less else (news, new)
            following = run[-1] + 1 if run else len(shape)
            if following >= len(shape):
                run, shape = (news, new) if is_less else (olds, old)
                following = run[-1] + 1 if run else len(shape)
            if following >= len(shape):
                raise Mixed(f"{node.name} takes its value apart in an unknown way")
            run.append(following)
        while (end := news[-1] + 1 if news else j) < len(new) and _is_one(new[end]) and wanted in olds:
            news.append(end)
        if wanted in olds:
            return olds, news
        i, j = i + len(olds), j + len(news)
    raise Mixed(f"{node.name} takes its value apart in an unknown way")


def _product(shape: list[object], axes: list[int]) -> object:
    found: object = math.prod(_expression(shape[axis]) for axis in axes)
    return found


def _expression(size: object) -> Any:
    """A size as a number, or as an expression of symbols that compares as such."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _is_less(one: object, other: object) -> bool:
    """Whether the first is the smaller number; False where a size may vary."""
    return isinstance(one, int) and (not isinstance(other, int) or one < other)


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


_ALIGNED = _Rule(aligned, aligned_up)
_PERMUTED, _FEWER = _moved(_permutation), _moved(_without_one)
_SPLIT = _Rule(_split_down, _split_up)
_RULES: dict[object, _Rule] = {
    **dict.fromkeys(_HANDED_ON, _ALIGNED),
    **dict.fromkeys(_RESHAPES, _Rule(_reshaped, _reshaped_up)),
    **dict.fromkeys(_ALONG_ONE, _apart(1, 0)),
    **dict.fromkeys(_REDUCED, _moved(_kept_axes)),
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.t.default), _PERMUTED),
    **dict.fromkeys((aten.select.int, aten.unbind.int), _FEWER),
    **dict.fromkeys((aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default), _SPLIT),
    aten.slice.Tensor: _Rule(_sliced, _sliced_up),
    aten.repeat_interleave.self_int: _Rule(_repeated, _repeated_up),
    aten.matmul.default: _Rule(_multiplied, _multiplied_up),
    aten.layer_norm.default: _Rule(_normed, _normed_up),
    aten.rms_norm.default: _Rule(_normed, _normed_up),
    _SDPA: _Rule(_attended, _attended_up),
}  # fmt: skip
