"""Shapes and dtypes of a graph, computed anew from its inputs and compared with what its nodes say of themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import SymInt, Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from vlmopt.core.program import Component, Dim, TensorSpec
from vlmopt.graph.modules import placeholders
from vlmopt.graph.replay import run_node
from vlmopt.graph.sizes import size_of, symbols_of
from vlmopt.graph.text import component_text

# Sizes at which two symbolic dimensions are compared: equal at all of them counts as equal.
_PROBES = ((7, 11, 13, 17), (5, 23, 29, 31), (19, 3, 37, 41))


def stale_metadata(component: Component, dims: Mapping[str, Dim]) -> str:
    """The first node whose `meta["val"]` is missing or is not what is computed, in words; empty if there is none.

    The shapes are computed with symbols for the named dimensions, so a dimension that was frozen is found as well.
    """
    missing = [node.name for node in component.graph.graph.nodes if node.op != "output" and "val" not in node.meta]
    if missing:
        return f"node {missing[0]} has no shape metadata"
    names = [name for name in dims if any(name in spec.shape for spec in component.inputs)]
    recomputed, problem = _recomputed(component, names)
    inputs = list(zip(component.inputs, placeholders(component.graph), strict=True))
    old_symbols = _symbols([(spec, node.meta["val"]) for spec, node in inputs])
    new_symbols = _symbols([(spec, recomputed.get(node)) for spec, node in inputs])
    for node, value in recomputed.items():
        if _probed(node.meta["val"], old_symbols, names) != _probed(value, new_symbols, names):
            return f"node {node.name} says {_text(node.meta['val'])}, and computes {_text(value)}"
    return problem


def metadata_key(component: Component) -> object:
    """What the shapes that a graph says of itself, and those that are computed, depend on."""
    graph = component.graph
    nodes = tuple((node.name, _exact(node.meta.get("val"))) for node in graph.graph.nodes)
    modules = tuple(repr(module) for module in graph.modules() if module is not graph)
    tensors = tuple((name, str(value.dtype), tuple(value.shape)) for name, value in graph.state_dict().items())
    return component_text(component), component.inputs, component.outputs, nodes, modules, tensors


def _exact(value: object) -> object:
    if isinstance(value, Tensor):
        return str(value.dtype), str(tuple(value.shape))
    if isinstance(value, list | tuple):
        return tuple(map(_exact, value))
    return type(value), str(value)


def _recomputed(component: Component, names: list[str]) -> tuple[dict[fx.Node, object], str]:
    """The values of all nodes as fake tensors; and what went wrong at the node where the shapes do not fit."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    feed: dict[str, Tensor] = {}
    for spec, node in zip(component.inputs, placeholders(component.graph), strict=True):
        sizes = [_PROBES[0][names.index(size)] if isinstance(size, str) else size for size in spec.shape]
        dynamic = [DimDynamic.DUCK if isinstance(size, str) else DimDynamic.STATIC for size in spec.shape]
        real = torch.zeros(sizes, dtype=getattr(torch, spec.dtype))
        context = StatelessSymbolicContext(dynamic_sizes=dynamic)  # type: ignore[var-annotated]
        feed[str(node.target)] = mode.from_tensor(real, symbolic_context=context)
    values: dict[fx.Node, object] = {}
    with mode, torch.no_grad():
        for node in component.graph.graph.nodes:
            if node.op == "output":
                break
            try:
                values[node] = run_node(component.graph, node, values, feed)
            except Exception as error:  # noqa: BLE001 - whatever torch raises for shapes that do not fit is the finding
                text = " ".join(str(error).split())[:200]
                return values, f"node {node.name} cannot be given a shape ({type(error).__name__}: {text})"
    return values, ""


def _symbols(inputs: list[tuple[TensorSpec, object]]) -> dict[str, str]:
    """Which named dimension each symbol of an export stands for."""
    symbols: dict[str, str] = {}
    for spec, value in inputs:
        if not isinstance(value, Tensor) or value.dim() != len(spec.shape):
            continue
        for wanted, actual in zip(spec.shape, value.shape, strict=True):
            if isinstance(wanted, str):
                symbols.update({symbol: symbols.get(symbol, wanted) for symbol in symbols_of(actual)})
    return symbols


def _probed(value: object, symbols: Mapping[str, str], names: list[str]) -> object:
    return [_at(value, symbols, dict(zip(names, probe, strict=False))) for probe in _PROBES]


def _at(value: object, symbols: Mapping[str, str], sizes: Mapping[str, int]) -> object:
    """The value's kind, dtype and shape at these sizes."""
    known = {symbol: sizes[name] for symbol, name in symbols.items()}
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(size_of(size, known) for size in value.shape)
    if isinstance(value, list | tuple):
        return [_at(item, symbols, sizes) for item in value]
    if isinstance(value, SymInt | int) and not isinstance(value, bool):
        return size_of(value, known)
    return None  # no tensor and no size: numbers and truth values of assertions


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{[str(size) for size in value.shape]}".replace("'", "")
    return f"{type(value).__name__} {value}"
