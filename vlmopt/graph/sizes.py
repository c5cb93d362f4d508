"""Sizes of values: symbolic dimensions evaluated at the sizes that costs are counted at."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import fx

from vlmopt.core.program import Component, Dim
from vlmopt.graph.modules import placeholders

Sizes = Mapping[str, int]  # symbol of the export -> size


def counting_sizes(component: Component, dims: Mapping[str, Dim]) -> dict[str, int]:
    """The size of every symbolic dimension of a component at batch 1 and the typical size of the others."""
    sizes: dict[str, int] = {}
    sums: dict[str, int] = {}
    for spec, node in zip(component.inputs, placeholders(component.graph), strict=True):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        for wanted, actual in zip(spec.shape, value.shape, strict=True):
            if isinstance(wanted, str):
                typical = 1 if wanted == "batch" else dims[wanted].typical
                (sums if dims[wanted].sum_of else sizes).update(dict.fromkeys(symbols_of(actual), typical))
    return sums | sizes  # a sum may be written in the symbols of its parts


def symbols_of(size: int | torch.SymInt) -> list[str]:
    """Names of the symbols in a dimension; none if it is a number."""
    if not isinstance(size, torch.SymInt):
        return []
    return [str(symbol) for symbol in size.node.expr.free_symbols]


def size_text(size: int | torch.SymInt, names: Mapping[str, str]) -> str:
    """A dimension as text, its symbols (which differ from run to run) under these names."""
    if isinstance(size, int):
        return str(size)
    return re.sub(r"[A-Za-z_]\w*", lambda symbol: names.get(symbol[0], symbol[0]), _text_of(size.node.expr))


@cache
def _text_of(expression: Any) -> str:
    """An expression as text, kept: sympy writes it anew at every call, for thousands of nodes of one graph."""
    return str(expression)


def size_of(size: int | torch.SymInt, sizes: Sizes) -> int:
    """A dimension as a number; symbols that no input names count as 1."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    if expression.is_Symbol:
        return sizes.get(str(expression), 1)
    return int(expression.subs({symbol: sizes.get(str(symbol), 1) for symbol in expression.free_symbols}))


def shape_of(node: fx.Node, sizes: Sizes) -> tuple[int, ...] | None:
    """Shape of the node's (first) tensor; None where the node is not a tensor."""
    tensor = tensor_of(node)
    return None if tensor is None else tuple(size_of(dim, sizes) for dim in tensor.shape)


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        value = next((item for item in value if isinstance(item, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None


def bytes_of(node: fx.Node, sizes: Sizes) -> int:
    """Bytes of the node's (first) tensor; 0 where the node is not a tensor."""
    tensor, shape = tensor_of(node), shape_of(node, sizes)
    return 0 if tensor is None or shape is None else math.prod(shape) * tensor.element_size()


def export_dims(dims: Mapping[str, Dim]) -> dict[str, Any]:
    """What `torch.export` takes for each dimension that may vary; a sum of others follows from them."""
    free = {name: dim for name, dim in dims.items() if dim.minimum < dim.maximum}
    return {
        name: torch.export.Dim.AUTO if dim.sum_of else torch.export.Dim(name, min=dim.minimum, max=dim.maximum)
        for name, dim in free.items()
    }
