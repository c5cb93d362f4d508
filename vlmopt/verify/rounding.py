"""How much of a difference is rounding: programs beside what they compute in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from vlmopt.core.program import Component, Program
from vlmopt.core.workload import Feed
from vlmopt.graph.quantized import QuantizedLeaf


@contextmanager
def in_float64(program: Program, feeds: Mapping[str, Feed]) -> Iterator[tuple[Program, dict[str, Feed]] | None]:
    """The program with all that is float32 in float64, and the feeds; None where its numbers are not all float32.

    Within, new tensors are float64 by default.
    """
    before = torch.get_default_dtype()
    if before is not torch.float32 or not all(_is_plain(component) for component in program.components.values()):
        yield None
        return
    components = {name: _doubled(component) for name, component in program.components.items()}
    fixed = {name: _feed(feed) for name, feed in program.fixed_inputs.items()}
    torch.set_default_dtype(torch.float64)
    try:
        yield (
            replace(program.with_components(components), fixed_inputs=fixed),
            {name: _feed(feed) for name, feed in feeds.items()},
        )
    finally:
        torch.set_default_dtype(before)


def _is_plain(component: Component) -> bool:
    tensors = [*component.graph.parameters(), *component.graph.buffers()]
    is_rounded = any(isinstance(module, QuantizedLeaf) for module in component.graph.modules())
    return not is_rounded and all(one.dtype is torch.float32 for one in tensors if one.is_floating_point())


def _doubled(component: Component) -> Component:
    graph = copy.deepcopy(component.graph).double()
    for node in graph.graph.nodes:
        node.args, node.kwargs = _widened(node.args), _widened(node.kwargs)
    graph.recompile()
    return replace(component, graph=graph)


def _widened(argument: Any) -> Any:
    """Arguments of a call in which every float32 that it asks for is a float64."""
    return torch.fx.node.map_aggregate(argument, lambda one: torch.float64 if one is torch.float32 else one)


def _feed(feed: Feed) -> Feed:
    return {name: value.double() if value.dtype is torch.float32 else value for name, value in feed.items()}
