"""Inputs that a pass is tried on: example, zero, large and seeded random ones; tokens and masks that are valid."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from vlmopt.core.program import Dim, Program, TensorSpec
from vlmopt.graph.canonical import HAND_ON
from vlmopt.graph.costing import VIEWS
from vlmopt.graph.modules import get_at, placeholders

aten = torch.ops.aten

Feeds = Mapping[str, Mapping[str, Tensor]]  # component -> input -> tensor
LARGE = 1e3
BATCH = 2
_LOOKUPS: dict[object, tuple[int, int]] = {  # where table and index stand among the arguments
    aten.embedding.default: (0, 1),
    aten.index_select.default: (0, 2),
    aten.index.Tensor: (0, 1),
}


def make_feeds(*programs: Program, seed: int) -> dict[str, Feeds]:
    """Feeds by kind for the components of all these programs; the first that has a component of a name counts."""
    return {
        "example": feeds_of(programs, kind="example", seed=seed),
        "zero": feeds_of(programs, kind="zero", seed=seed),
        "large": feeds_of(programs, kind="large", seed=seed + 1),
        "random": feeds_of(programs, kind="random", seed=seed + 2),
        "second random": feeds_of(programs, kind="random", seed=seed + 3),
    }


def feeds_of(programs: tuple[Program, ...], *, kind: str, seed: int, batch: int = BATCH, more: int = 0) -> Feeds:
    """One feed for every component.

    Args:
        kind: example, zero, large or random.
        batch: size of the dimension of that name.
        more: how far the other named dimensions go beyond their typical sizes.
    """
    feeds: dict[str, dict[str, Tensor]] = {}
    for program in programs:
        sizes = sizes_of(program.dims, batch=batch, more=more)
        for name, component in program.components.items():
            if name not in feeds:
                generator = torch.Generator().manual_seed(seed)
                pairs = zip(component.inputs, placeholders(component.graph), strict=True)
                feeds[name] = {
                    spec.name: _tensor(spec, sizes, kind, generator, bound=_bound(component.graph, node))
                    for spec, node in pairs
                }
    return feeds


def sizes_of(dims: Mapping[str, Dim], *, batch: int, more: int = 0) -> dict[str, int]:
    """A size for every named dimension, within its bounds."""
    return {
        name: min(max(batch if name == "batch" else dim.typical + more, dim.minimum), dim.maximum)
        for name, dim in dims.items()
    }


def shape_at(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape)


def _tensor(
    spec: TensorSpec, sizes: Mapping[str, int], kind: str, generator: torch.Generator, *, bound: int | None
) -> Tensor:
    shape, dtype = shape_at(spec, sizes), getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return _floats(shape, kind, generator).to(dtype)
    if bound is None:
        return _mask(shape, kind, generator).to(dtype)
    if kind == "zero":
        return torch.zeros(shape, dtype=dtype)
    if kind == "large":
        return torch.full(shape, bound - 1, dtype=dtype)
    return torch.randint(0, bound, shape, generator=generator).to(dtype)


def _floats(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    if kind == "zero":
        return torch.zeros(shape, dtype=torch.float32)
    if kind == "example":
        n = max(1, torch.Size(shape).numel())
        return torch.linspace(-1.0, 1.0, n, dtype=torch.float32)[: torch.Size(shape).numel()].reshape(shape)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
    return drawn * LARGE if kind == "large" else drawn


def _mask(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    """Ones and zeros; every row keeps its first entry, since a row without any has no softmax."""
    if kind in ("example", "zero"):
        return torch.ones(shape, dtype=torch.int64)
    mask = torch.randint(0, 2, shape, generator=generator)
    if mask.dim() > 0 and mask.shape[-1] > 0:
        mask[..., 0] = 1
    return mask


def _bound(module: fx.GraphModule, node: fx.Node) -> int | None:
    """One more than the largest index that a whole-number input may hold; None for what is no index (a mask)."""
    bounds = [bound for user in node.users if (bound := _bound_of_user(module, node, user)) is not None]
    return min(bounds, default=None)


def _bound_of_user(module: fx.GraphModule, node: fx.Node, user: fx.Node) -> int | None:
    if user.op == "call_module":
        leaf = get_at(module, str(user.target))
        return leaf.num_embeddings if isinstance(leaf, nn.Embedding) else None
    if user.target in _LOOKUPS:
        return _bound_of_lookup(node, user)
    if user.target in VIEWS or user.target in HAND_ON:
        return _bound(module, user)
    return None


def _bound_of_lookup(node: fx.Node, user: fx.Node) -> int | None:
    """The extent of the table along the axis that the node indexes."""
    table_at, index_at = _LOOKUPS[user.target]
    table, index = user.args[table_at], user.args[index_at]
    axis: object = None
    if isinstance(index, list | tuple):  # one index for every axis, in order
        axis = list(index).index(node) if node in index else None
    elif index is node:
        axis = user.args[1] if user.target is aten.index_select.default else 0
    return _extent(table, axis) if isinstance(table, fx.Node) and isinstance(axis, int) else None


def _extent(table: fx.Node, axis: int) -> int | None:
    value = table.meta.get("val")
    size = value.shape[axis] if isinstance(value, Tensor) else None
    return size if isinstance(size, int) else None
