"""A part of a graph on its own computes what it computed inside, and an edit is told by names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.emit.toy import cases, image_component, text_component
from vlmopt.core.program import Component
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.example import ResidualBlocks, component_of, program_of
from vlmopt.graph.excerpt import changes_between, excerpt, grown, input_values, seeds
from vlmopt.graph.regions import skip_branch
from vlmopt.rewrite.pipeline import clone_program

COMPONENTS = [image_component(), text_component()]


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda part: part.name)
@pytest.mark.parametrize("n_hops", [0, 2, 5])
def test_every_excerpt_computes_what_the_whole_does(component: Component, n_hops: int) -> None:
    feed = {spec.name: value for spec, value in zip(component.inputs, cases(component)[1], strict=True)}
    nodes = [node for node in component.graph.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    n_made = 0
    for node in nodes[:: max(1, len(nodes) // 12)]:
        part = excerpt(component, grown(component, {node.name}, n_hops))
        if part is None:
            continue
        n_made += 1
        part.graph.graph.lint()
        values = input_values(component, feed, [spec.name for spec in part.inputs])
        wanted = input_values(component, feed, [spec.name for spec in part.outputs])
        found = part.graph(*(values[spec.name] for spec in part.inputs))
        for spec, value in zip(part.outputs, found, strict=True):
            assert torch.equal(value, wanted[spec.name])
        for spec in part.inputs:
            assert all(isinstance(size, int) or size in ("batch", "text") for size in spec.shape)
    assert n_made > 5


def test_an_excerpt_holds_only_what_lies_between_its_nodes() -> None:
    component = component_of(ResidualBlocks(blocks=4), torch.ones(2, 8))
    part = excerpt(component, {"layers_1_up", "layers_1_down"})
    assert part is not None
    assert [node.name for node in part.graph.graph.nodes if node.op == "call_module"] == [
        "layers_1_up",
        "layers_1_down",
    ]
    small = excerpt(component, grown(component, {"layers_1_up", "layers_1_down"}, 0))
    assert small is not None
    assert len(list(small.graph.graph.nodes)) == 5  # input, up, relu, down, output
    assert len(list(small.graph.parameters())) == 4


class Splits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [2, 2], dim=1)
        return (a * b).reshape(x.shape[0] * 2) + 1.0


def test_tuples_sizes_and_nameless_shapes_are_taken_in() -> None:
    component = component_of(Splits(), torch.ones(3, 4))
    total = next(node.name for node in component.graph.graph.nodes if "add" in node.name)
    part = excerpt(component, {total})
    assert part is not None  # its operand has the shape 2 * batch, which is no input's
    assert all(size in ("batch", 2, 4) for spec in part.inputs for size in spec.shape)
    taken = next(node.name for node in component.graph.graph.nodes if "split" in node.name)
    assert excerpt(component, {taken}) is not None


def test_an_edit_is_told_by_the_names_of_its_nodes() -> None:
    program = program_of(ResidualBlocks(blocks=3), torch.ones(2, 8))
    clone = clone_program(program)
    before, after = program.components["model"], clone.components["model"]
    assert changes_between(before, after).names == ()
    skip_branch(after.graph, find_branches(after.graph)[1])
    drop_dead_nodes(after.graph)
    changes = changes_between(before, after)
    assert changes.removed == ("layers_1_norm", "layers_1_up", "relu_1", "layers_1_down", "add_1")
    assert changes.added == ()
    assert changes.rewired == ("layers_2_norm", "add_2")
    assert seeds(before, after) >= {*changes.removed, *changes.rewired}
    assert "layers_0_up" not in seeds(before, after)
