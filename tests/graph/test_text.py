"""The text form is equal for equal graphs and differs after an edit."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.graph.blocks import PreNorm, Stack, sample, seeded
from vlmopt.core.program import Component, TensorSpec
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.example import component_of
from vlmopt.graph.modules import clone_graph, placeholders
from vlmopt.graph.regions import skip_branch
from vlmopt.graph.sizes import counting_sizes, shape_of, size_of, size_text
from vlmopt.graph.text import component_text


def block() -> Component:
    return component_of(seeded(Stack(PreNorm())), sample())


def test_two_captures_give_one_text() -> None:
    first, second = component_text(block()), component_text(block())
    assert first == second
    assert first == component_text(replace(block(), graph=clone_graph(block().graph)))
    lines = first.splitlines()
    assert lines[0] == "component model"
    assert "%0: float32[batch, 5, 8] = input x" in lines
    assert "%1: float32[batch, 5, 8] = layernorm embed (%0)" in lines
    assert lines[-1].startswith("return [%") or lines[-1].startswith("return (%")
    assert "0x" not in first


def test_an_edit_shows_in_the_text() -> None:
    component = block()
    before = component_text(component)
    graph = clone_graph(component.graph)
    skip_branch(graph, find_branches(graph)[0])
    drop_dead_nodes(graph)
    after = component_text(replace(component, graph=graph))
    assert before == component_text(component)
    assert len(after.splitlines()) < len(before.splitlines())
    assert "layers.0.attn" not in after


def test_a_number_that_differs_in_its_last_digit_shows() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    texts = [component_text(component_of(Scaled(factor), sample())) for factor in (0.1, 0.1 + 1e-16)]
    assert texts[0] != texts[1]


class Joined(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat((x, y, y), dim=1)


def two_dims() -> Component:
    batch, text = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("text", min=2, max=24)
    dynamic = ({0: batch, 1: text}, {0: batch})
    exported = torch.export.export(Joined(), (torch.ones(2, 6), torch.ones(2, 5)), dynamic_shapes=dynamic, strict=False)
    from vlmopt.graph.raising import raise_program

    inputs = (TensorSpec("x", ("batch", "text"), "float32"), TensorSpec("y", ("batch", 5), "float32"))
    return Component("model", raise_program(exported), inputs, ())


def test_sizes_computed_from_dims_are_written_in_their_names() -> None:
    assert "float32[batch, text + 10] = cat" in component_text(two_dims())


def test_symbolic_sizes_are_counted_at_batch_one_and_the_typical_text() -> None:
    from vlmopt.core.program import Dim

    component = two_dims()
    sizes = counting_sizes(component, {"batch": Dim("batch", 1, 8, 1), "text": Dim("text", 2, 24, 7)})
    assert sorted(sizes.values()) == [1, 7]
    (joined,) = (n for n in component.graph.graph.nodes if n.target is torch.ops.aten.cat.default)
    assert shape_of(joined, sizes) == (1, 17)
    assert size_of(3, sizes) == 3
    symbol = placeholders(component.graph)[0].meta["val"].shape[1]
    assert size_of(symbol, {}) == 1
    assert size_text(symbol, {str(symbol): "text"}) == "text"
