"""What a graph computes from constants alone, and what must never be folded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.blocks import WIDTH, sample, seeded
from vlmopt.core.program import Component
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.constants import constant_frontier, constant_region, evaluate_constant, store_constant
from vlmopt.graph.example import component_of
from vlmopt.graph.modules import clone_graph, get_at

aten = torch.ops.aten


class Positions(nn.Module):
    """A table resized and normed before it is added: three constant operations behind one another."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.ones(1, WIDTH, 3)), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        resized = F.interpolate(self.table, size=5, mode="linear").transpose(1, 2)
        return x + self.norm(resized) * 2


def frontier(module: nn.Module, *samples: Tensor) -> tuple[Component, list[str]]:
    component = component_of(seeded(module), *samples)
    return component, [str(node.target) for node in constant_frontier(component.graph)]


def test_the_last_constant_operation_is_the_frontier() -> None:
    component, names = frontier(Positions(), sample())
    assert names == ["aten.mul.Tensor"]
    (node,) = constant_frontier(component.graph)
    region = constant_region(node)
    assert region[-1] is node
    assert {str(n.target) for n in region} >= {"table", "norm", "aten.mul.Tensor"}


def test_a_folded_graph_is_bit_equal_and_keeps_the_original() -> None:
    module = seeded(Positions())
    component = component_of(module, sample())
    graph = clone_graph(component.graph)
    (node,) = constant_frontier(graph)
    value = evaluate_constant(graph, node)
    assert value.shape == (1, 5, WIDTH)
    assert value.is_contiguous()
    made = store_constant(graph, node, value, "table")
    drop_dead_nodes(graph)
    graph.graph.lint()
    assert made.target == "table_2"  # `table` was taken when the constant was stored
    assert torch.equal(graph(sample(seed=1))[0], module(sample(seed=1)))
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "get_attr", "call_function", "output"]
    assert constant_frontier(graph) == []
    assert torch.equal(get_at(component.graph, "table"), module.table)  # type: ignore[arg-type]


def test_a_constant_read_by_two_stays_one_frontier() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            shared = self.table.exp()
            return (x + shared) * shared

    assert frontier(TwoReaders(), sample())[1] == ["aten.exp.default"]


def test_what_depends_on_a_free_size_is_no_constant() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[0])[:, None, None] + torch.arange(5)[:, None]

    component, names = frontier(Sized(), sample())
    constants = constant_frontier(component.graph)
    assert len(names) == 1
    assert tuple(constants[0].meta["val"].shape) == (5, 1)


def test_random_and_undefined_values_are_never_folded() -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            drawn = torch.rand(5, WIDTH) + torch.randn(5, WIDTH) + torch.randint(0, 3, (5, WIDTH))
            drawn = drawn + torch.bernoulli(torch.full((5, WIDTH), 0.5))
            dropped = F.dropout(torch.ones(5, WIDTH), 0.5, training=True)
            return x + drawn + dropped + torch.empty(5, WIDTH)

    component, _ = frontier(Random(), sample())
    folded = {str(n.target) for node in constant_frontier(component.graph) for n in constant_region(node)}
    assert folded <= {"aten.full.default", "aten.ones.default"}


def test_attention_over_constants_folds_unless_it_drops_out() -> None:
    class Pooled(nn.Module):
        def __init__(self, dropout: float) -> None:
            super().__init__()
            self.probe, self.dropout = nn.Parameter(torch.ones(1, 2, 5, 4)), dropout

        def forward(self, x: Tensor) -> Tensor:
            probe = self.probe * 2
            return x + F.scaled_dot_product_attention(probe, probe, probe, dropout_p=self.dropout).sum()

    assert frontier(Pooled(0.0), sample())[1] == ["aten.sum.default"]
    assert frontier(Pooled(0.5), sample())[1] == ["aten.mul.Tensor"]
