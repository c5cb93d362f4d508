"""Measurements in bfloat16: only of large components, only where the processor is made for it, and close to float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.zoo.conftest import Captured, captured_toy
from vlmopt.core.program import Component
from vlmopt.graph import precision
from vlmopt.graph.branches import find_branches
from vlmopt.graph.modules import output_values
from vlmopt.graph.precision import LEAST_WEIGHTS, lowered_precision, measuring_precision
from vlmopt.graph.replay import Replay


@pytest.fixture
def component() -> Component:
    return captured_toy("clip").program.components["image_encoder"]


def grown(component: Component, dtype: torch.dtype = torch.float32) -> Component:
    """The component beside a large weight that nothing reads."""
    graph = torch.fx.GraphModule(component.graph, component.graph.graph)
    graph.register_parameter("more", torch.nn.Parameter(torch.zeros(LEAST_WEIGHTS, dtype=dtype)))
    return replace(component, graph=graph)


@pytest.mark.parametrize("is_fast", [True, False])
def test_only_large_components_in_float32_and_only_where_it_is_faster(
    component: Component, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_multiplies_bfloat16_fast", lambda device: is_fast)
    assert measuring_precision(component) is None
    assert measuring_precision(grown(component)) is (torch.bfloat16 if is_fast else None)
    assert measuring_precision(grown(component, torch.float16)) is None
    assert lowered_precision([component, grown(component)]) == ("bfloat16" if is_fast else None)


def test_products_in_bfloat16_come_back_in_float32_and_near(captured: Captured) -> None:
    for component in captured.program.components.values():
        branches, feed = find_branches(component.graph), captured.feed(component, batch=2, text=7)
        skips = [frozenset[str](), *(frozenset({branch.name}) for branch in branches)]
        target = output_values(component.graph)[0]
        made = (Replay(component, branches, target, precision=dtype) for dtype in (None, torch.bfloat16))
        for wanted, found in zip(*(replay.variants(feed, skips) for replay in made), strict=True):
            assert found.dtype is torch.float32
            assert 0 < float((found - wanted).abs().max()) < 0.04 * float(wanted.abs().max())
