"""A component as a `torch.export` program whose named dimensions may vary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmopt.core.errors import EmitError
from vlmopt.core.program import Component, Dim, TensorSpec
from vlmopt.graph.modules import make_code
from vlmopt.graph.sizes import export_dims


def export_component(component: Component, dims: Mapping[str, Dim]) -> torch.export.ExportedProgram:
    """The component's graph exported again; the shapes come from its input specs, never from stale node metadata.

    Raises:
        EmitError: torch refuses the graph, for instance since a node holds a named dimension to one size.
    """
    symbols = export_dims(dims)
    arguments = tuple(example_input(spec, dims) for spec in component.inputs)
    shapes = tuple(
        {axis: symbols[size] for axis, size in enumerate(spec.shape) if size in symbols} for spec in component.inputs
    )
    try:
        with torch.no_grad():
            make_code(component.graph)
            return torch.export.export(component.graph, arguments, dynamic_shapes=shapes, strict=False)
    except Exception as problem:
        raise EmitError(
            component.name,
            f"torch.export refuses the graph ({_first_line(problem)})",
            expected="a graph whose named dimensions can vary",
            remedy="run again with --verify-each to find the pass that broke it",
        ) from problem


def example_input(spec: TensorSpec, dims: Mapping[str, Dim]) -> Tensor:
    """Zeros of the spec's shape, at sizes that are neither 0 nor 1 where the dimension allows it: torch would take
    those for constants."""
    return torch.zeros([_example_size(size, dims) for size in spec.shape], dtype=getattr(torch, spec.dtype))


def _example_size(size: int | str, dims: Mapping[str, Dim]) -> int:
    if isinstance(size, int):
        return size
    dim = dims[size]
    if dim.sum_of:
        return sum(_example_size(part, dims) for part in dim.sum_of)
    return min(max(dim.typical + 1, dim.minimum, 2), dim.maximum)


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__
