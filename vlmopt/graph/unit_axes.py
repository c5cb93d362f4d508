"""How the units that a width consists of (hidden channels, heads) lie along axes of values.

A layout says of one axis of a value which unit every position belongs to. Operations pass it on from operand to value
and back (`unit_operations.py`), and whatever computes one unit from another raises `Mixed`. That is all that is needed
to say what else must be cut where a unit is cut, whichever way a model writes its attention.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

aten = torch.ops.aten

FREE = -1  # positions that belong to no unit, or not yet

SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


class Mixed(Exception):  # noqa: N818  (a finding, caught in this room)
    """Why units cannot be told apart, or cut apart."""


class Together(Exception):  # noqa: N818
    """Units that can only be cut together, a row for each set of them, [sets, units]."""

    def __init__(self, sets: Tensor) -> None:
        super().__init__()
        self.sets = sets


@dataclass(frozen=True, eq=False)
class Layout:
    """`units` [size of the axis] holds the unit of every position along the axis, or `FREE`."""

    axis: int
    units: Tensor

    def joined(self, other: Layout) -> Layout:
        """What both say together.

        Raises:
            Mixed: they contradict each other.
        """
        if self.axis != other.axis or len(self.units) != len(other.units):
            raise Mixed("its units lie along two axes of one value")
        both = (self.units != FREE) & (other.units != FREE)
        if bool((self.units[both] != other.units[both]).any()):
            raise Mixed("one value holds different units at one place")
        return Layout(self.axis, torch.where(self.units == FREE, other.units, self.units))


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The tensors that a call reads; a part of a split value reads what was split."""
    if node.target is operator.getitem:
        return split_of(node).all_input_nodes[:1]
    return [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), Tensor)]


def readers_of(value: fx.Node) -> list[fx.Node]:
    """The calls that read a value, parts in the place of the call that splits it."""
    return [reader for user in value.users for reader in (user.users if user.target in SPLITS else (user,))]


def n_axes(node: fx.Node) -> int:
    """The number of axes of a node's value."""
    return int(node.meta["val"].dim())


def size_at(node: fx.Node, axis: int) -> int | torch.SymInt:
    """The size of a node's value along an axis."""
    found: int | torch.SymInt = node.meta["val"].shape[axis]
    return found


def aligned(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout:
    """For operations on single numbers: axes are counted from the last one."""
    axis = layout.axis + n_axes(node) - n_axes(operand)
    if axis < 0 or size_at(node, axis) != len(layout.units):
        raise Mixed(f"{node.name} repeats its units")
    return Layout(axis, layout.units)


def aligned_up(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    """The layout of the operand of such an operation; None where one number of it serves all units."""
    axis = layout.axis + n_axes(operand) - n_axes(node)
    if axis < 0 or size_at(operand, axis) == 1:
        return None
    if size_at(operand, axis) != len(layout.units):
        raise Mixed(f"{operand.name} has another size than the units of {node.name}")
    return Layout(axis, layout.units)


def split_of(part: fx.Node) -> fx.Node:
    """The call that a part of a split value comes from.

    Raises:
        Mixed: the value is no part of one that is split.
    """
    source = part.args[0]
    if not isinstance(source, fx.Node) or source.target not in SPLITS:
        raise Mixed(f"{part.name} takes a part of a value that is not split evenly")
    return source


def axis_argument(node: fx.Node, place: int, default: int, n: int) -> int:
    """An axis among the arguments of a call, counted from the first of `n`."""
    found = node.args[place] if len(node.args) > place else node.kwargs.get("dim", default)
    if not isinstance(found, int):
        raise Mixed(f"{node.name} names no axis")
    return found % n


def refuse_along(node: fx.Node, layout: Layout, axes: set[int]) -> None:
    """Refuses an operation along these axes where the units lie along one of them."""
    if layout.axis in axes:
        raise Mixed(f"{node.name} computes one unit from the others")


def refuse_normed(node: fx.Node, layout: Layout, n_normed: int) -> None:
    """Refuses a norm over the last `n_normed` axes where the units lie along one of them."""
    refuse_along(node, layout, set(range(n_axes(node) - n_normed, n_axes(node))))
