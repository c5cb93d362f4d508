"""Paths inside a graph, and the patterns that users write for branches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmopt.core.errors import PassError
from vlmopt.graph.build import insert_call, insert_linear
from vlmopt.graph.example import ResidualBlocks, component_of
from vlmopt.graph.modules import clone_graph, free_path, get_at, has_path, output_node, output_values, set_at
from vlmopt.graph.patterns import check_patterns, is_match

NAMES = ["image/layers.0.attn", "image/layers.1.attn", "text/layers.0.mlp"]


def test_a_pattern_may_leave_the_component_out() -> None:
    assert is_match("image/layers.0.attn", ["layers.0.attn"])
    assert is_match("image/layers.0.attn", ["image/*"])
    assert is_match("image/layers.0.attn", ["layers.?.attn"])
    assert not is_match("image/layers.0.attn", ["text/*", "layers.0.mlp"])


def test_a_pattern_that_means_nothing_is_refused_with_the_closest_name() -> None:
    check_patterns("recipe", ["layers.*.attn", "text/*"], NAMES)
    with pytest.raises(PassError, match=r"recipe: 'layers.0.atn' matches nothing; .*did you mean 'layers.0.attn'\?"):
        check_patterns("recipe", ["layers.0.atn"], NAMES)
    with pytest.raises(PassError, match="see `vlmopt inspect MODEL`"):
        check_patterns("recipe", ["????"], NAMES)


def test_a_path_holds_a_module_a_parameter_or_a_buffer() -> None:
    root = nn.Module()
    set_at(root, "a.b.linear", nn.Linear(2, 2))
    set_at(root, "a.scale", nn.Parameter(torch.ones(1)))
    set_at(root, "a.ids", torch.arange(3))
    assert [name for name, _ in root.named_parameters()] == ["a.scale", "a.b.linear.weight", "a.b.linear.bias"]
    assert [name for name, _ in root.named_buffers()] == ["a.ids"]
    assert has_path(root, "a.b")
    assert free_path(root, "a.ids") == "a.ids_2"
    assert free_path(root, "a.new") == "a.new"
    with pytest.raises(AttributeError):
        get_at(root, "a.missing")


def test_inserted_nodes_carry_fresh_shapes() -> None:
    component = component_of(ResidualBlocks(), torch.ones(2, 8))
    graph = clone_graph(component.graph)
    (value,) = output_values(graph)
    with graph.graph.inserting_before(output_node(graph)):
        call = insert_linear(graph, "head", nn.Linear(3, 5), value)
        doubled = insert_call(graph, torch.ops.aten.mul.Tensor, (call, 2.0))
    output_node(graph).args = ((doubled,),)
    graph.graph.lint()
    graph.recompile()
    assert call.target == "head_2"
    batch = value.meta["val"].shape[0]
    assert doubled.meta["val"].shape[0] == batch
    assert doubled.meta["val"].shape[1] == 5
    assert tuple(graph(torch.ones(4, 8))[0].shape) == (4, 5)
    assert tuple(component.graph(torch.ones(4, 8))[0].shape) == (4, 3)
