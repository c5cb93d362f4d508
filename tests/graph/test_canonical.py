"""Canonical form: nothing dead, no assertions, nothing that only hands on its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.graph.blocks import WIDTH, in_heads, sample, seeded
from vlmopt.graph.canonical import assertion_nodes, canonicalize_graph, dead_nodes, drop_dead_nodes, hand_on_nodes
from vlmopt.graph.example import component_of
from vlmopt.graph.modules import clone_graph, get_at, has_path, output_values

aten = torch.ops.aten


class Litter(nn.Module):
    """Dead code with a weight of its own, an assertion, a dropout, a cast to the same type."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        x = x.to(torch.float32).contiguous()
        return self.dropout(self.used(x)).clone().detach()


def test_litter_goes_and_the_value_stays() -> None:
    module = seeded(Litter())
    raw = component_of(module, sample(), raw=True)
    assert len(assertion_nodes(raw.graph)) == 1
    assert len(hand_on_nodes(raw.graph)) >= 3
    clone = clone_graph(raw.graph)
    before = len(clone.graph.nodes)
    gone = canonicalize_graph(clone)
    assert len(clone.graph.nodes) == before - gone
    assert [node.op for node in clone.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(clone(sample())[0], module(sample()))
    assert len(raw.graph.graph.nodes) == before
    assert canonicalize_graph(clone) == 0


def test_dead_weights_leave_the_clone_and_stay_with_the_original() -> None:
    raw = component_of(seeded(Litter()), sample(), raw=True)
    clone = clone_graph(raw.graph)
    canonicalize_graph(clone)
    assert not has_path(clone, "unused")
    assert has_path(raw.graph, "unused")
    assert {name for name, _ in clone.named_parameters()} == {"used.weight", "used.bias"}


def test_a_copy_that_changes_strides_stays() -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return in_heads(x).contiguous().view(-1, 5, 4)

    component = component_of(Heads(), sample())
    copies = [n for n in component.graph.graph.nodes if n.target in (aten.contiguous.default, aten.clone.default)]
    assert len(copies) == 1
    assert torch.equal(component.graph(sample(batch=3))[0], Heads()(sample(batch=3)))


def test_strides_that_agree_only_at_the_sample_do_not_drop_a_copy() -> None:
    """[B, 1 token, 2 heads] is contiguous both ways where a free size happens to be 1."""

    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1).contiguous().view(-1)

    with torch.no_grad():
        component = component_of(Heads(), torch.ones(2, 3))
    value = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(component.graph(value)[0], Heads()(value))


def test_a_cast_that_changes_the_type_stays() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float64)

    component = component_of(Cast(), sample())
    assert component.graph(sample())[0].dtype is torch.float64


def test_placeholders_stay_even_if_nothing_reads_them() -> None:
    class Ignores(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + 1

    component = component_of(Ignores(), sample(), sample())
    assert [n.op for n in component.graph.graph.nodes][:2] == ["placeholder"] * 2
    assert dead_nodes(component.graph) == []


def test_a_tensor_that_is_read_raw_outlives_the_leaf_that_held_it() -> None:
    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, WIDTH)

        def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.embed.weight.t(), self.embed(ids)

    component = component_of(seeded(Projection()), torch.tensor([[1], [2]]), sample())
    graph = clone_graph(component.graph)
    output = graph.graph.output_node()
    output.args = ((output_values(graph)[0],),)
    drop_dead_nodes(graph)
    ids, x = torch.tensor([[1], [2]]), sample()
    assert torch.equal(graph(ids, x)[0], component.graph(ids, x)[0])
    weight = get_at(graph, "embed.weight")
    assert isinstance(weight, Tensor)
