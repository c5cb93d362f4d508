"""Maps of keys and values on the side of few queries: the same numbers, whatever the shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from vlmopt.core.program import Component
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.example import component_of
from vlmopt.graph.few_queries import find_few_queries, move_maps
from vlmopt.graph.replay import run_component

QUERIES, TOKENS = torch.linspace(-2, 2, 36).reshape(2, 3, 6), torch.linspace(-3, 1, 140).reshape(2, 7, 10)
N_HEADS, WIDTH = 2, 3


class Pooling(nn.Module):
    """Queries [B, n, 6] that read tokens [B, T, 10], their values other than their keys."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(10, 6), nn.Linear(10, 6)
            self.keys = nn.Parameter(torch.randn(1, N_HEADS, 7, WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = y.tanh() if self.kind == "other values" else y
        q, k, v = (self._heads(one(part)) for one, part in ((self.q, x), (self.k, y), (self.v, z)))
        if self.kind == "given":
            k, v = (y.unflatten(1, (1, 7))[..., :WIDTH].expand(-1, N_HEADS, -1, -1) for _ in range(2))
            return attend(q, k, self.keys.expand(x.shape[0], -1, -1, -1)) + attend(q, self.keys, v)
        if self.kind == "repeated":
            k, v = (part[:, :1].expand(-1, N_HEADS, -1, -1) for part in (k, v))
        return attend(q, k, v, scale=0.7 if self.kind == "scale" else None)

    def _heads(self, x: Tensor) -> Tensor:
        if self.kind == "permuted":
            return x.view(x.shape[0], x.shape[1], N_HEADS, WIDTH).permute(0, 2, 1, 3)
        return x.view(x.shape[0], x.shape[1], N_HEADS, WIDTH).transpose(1, 2)


def pooling(kind: str) -> tuple[Component, dict[str, Tensor]]:
    return component_of(Pooling(kind), QUERIES, TOKENS), {"x": QUERIES, "y": TOKENS}


@pytest.mark.parametrize("kind", ["plain", "scale", "other values"])
def test_the_answer_is_the_same_and_no_layer_of_keys_and_values_is_left(kind: str) -> None:
    component, feed = pooling(kind)
    wanted = run_component(component, [feed])
    ((one,), reasons) = find_few_queries(component.graph)
    assert reasons == {}
    move_maps(component.graph, one)
    drop_dead_nodes(component.graph)
    assert [str(node.target) for node in component.graph.graph.nodes if node.op == "call_module"] == ["q"]
    assert torch.allclose(run_component(component, [feed]), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["repeated", "permuted", "given"])
def test_keys_of_another_form_are_left_with_a_reason(kind: str) -> None:
    found, reasons = find_few_queries(pooling(kind)[0].graph)
    assert found == []
    assert "more than a Linear" in next(iter(reasons.values()))
