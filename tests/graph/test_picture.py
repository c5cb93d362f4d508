"""Graphs as drawings: every node with its facts, and what an edit did to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.graph.blocks import PostNorm, PreNorm, Stack, sample, seeded
from vlmopt.core.drawing import Drawing, DrawnNode, Mark, NodeKind
from vlmopt.core.program import Component
from vlmopt.graph.branches import find_branches
from vlmopt.graph.build import insert_call
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.costing import component_cost
from vlmopt.graph.example import DIMS, component_of
from vlmopt.graph.modules import clone_graph, set_at
from vlmopt.graph.picture import _joint_order, difference_drawing, node_drawing
from vlmopt.graph.regions import skip_branch


@pytest.fixture(scope="module")
def component() -> Component:
    return component_of(seeded(Stack(PreNorm(), PreNorm())), sample())


def edited(component: Component, edit: Callable[[torch.fx.GraphModule], None]) -> Component:
    graph = clone_graph(component.graph)
    edit(graph)
    graph.recompile()
    return replace(component, graph=graph)


def by_key(drawing: Drawing) -> dict[str, DrawnNode]:
    return {node.key: node for node in drawing.nodes}


def test_every_node_is_a_box_and_every_operand_an_edge(component: Component) -> None:
    drawing = node_drawing(component, DIMS)
    nodes = list(component.graph.graph.nodes)
    assert [node.key for node in drawing.nodes] == [node.name for node in nodes]
    assert set(drawing.edges) == {(operand.name, node.name) for node in nodes for operand in node.all_input_nodes}
    assert len(drawing.edges) == len(set(drawing.edges))
    assert drawing == node_drawing(component, DIMS)


def test_a_box_says_operation_name_shape_and_cost(component: Component) -> None:
    node = next(n for n in node_drawing(component, DIMS).nodes if n.label.startswith("linear fc1"))
    assert node.label == "linear fc1\nfloat32[batch, 5, 16]"
    assert node.kind is NodeKind.MODULE
    assert node.group == "layers.0.mlp"
    assert node.detail == (
        node.key,
        "linear layers.0.mlp.fc1 (·)",
        "float32[batch, 5, 16]",
        "144 parameters",
        "640 MACs for one sample",
    )


def test_the_costs_of_all_boxes_are_the_cost_of_the_component(component: Component) -> None:
    lines = [line for node in node_drawing(component, DIMS).nodes for line in node.detail]

    def total(words: str) -> int:
        return sum(int(line.split()[0].replace(",", "")) for line in lines if line.endswith(words))

    cost = component_cost(component, DIMS)
    assert (total(" parameters"), total(" MACs for one sample")) == (cost.parameters, cost.macs)


def test_kinds_tell_inputs_weights_views_sizes_sums_and_outputs_apart(component: Component) -> None:
    kinds = {node.label.split()[0]: node.kind for node in node_drawing(component, DIMS).nodes}
    assert kinds["input"] is NodeKind.INPUT
    assert kinds["output"] is NodeKind.OUTPUT
    assert kinds["attention"] is NodeKind.OPERATION
    assert kinds["transpose"] is NodeKind.VIEW

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.shift).reshape(x.shape[0] * 5, 8)

    own = {n.label.split()[0]: n.kind for n in node_drawing(component_of(Added(), sample()), DIMS).nodes}
    assert own["tensor"] is NodeKind.TENSOR
    assert own["sym_size"] is NodeKind.SIZE


@pytest.mark.parametrize("block", [PreNorm, PostNorm])
def test_sums_of_branches_follow_the_stream(block: type[nn.Module]) -> None:
    component = component_of(seeded(Stack(block(), block())), sample())
    branches = find_branches(component.graph)
    assert len(branches) == 4
    exits = [branch.exit if block is PreNorm else branch.exit.all_input_nodes[0] for branch in branches]
    sums = [node for node in node_drawing(component, DIMS).nodes if node.kind is NodeKind.SUM]
    assert [node.key for node in sums] == [node.name for node in exits]
    assert [node.follows for node in sums] == [branch.stream.name for branch in branches]


def test_marks_notes_and_makers_are_shown(component: Component) -> None:
    graph = clone_graph(component.graph)
    name = next(node.name for node in graph.graph.nodes if node.op == "call_module")
    next(node for node in graph.graph.nodes if node.name == name).meta["made_by"] = (3, "fold-constants")
    drawing = node_drawing(
        replace(component, graph=graph), DIMS, marks={name: Mark.SITE}, notes={name: "read behind the sum"}
    )
    assert by_key(drawing)[name].mark is Mark.SITE
    assert by_key(drawing)[name].detail[-2:] == ("made by step 3 fold-constants", "read behind the sum")
    assert {node.mark for node in drawing.nodes if node.key != name} == {Mark.PLAIN}


def test_equal_graphs_differ_in_nothing(component: Component) -> None:
    drawing = difference_drawing(component, edited(component, lambda graph: None), DIMS)
    assert {node.mark for node in drawing.nodes} == {Mark.PLAIN}
    assert (drawing.edge_marks, drawing.note) == ({}, "unchanged")
    assert drawing.nodes == node_drawing(component, DIMS).nodes


def test_a_skipped_branch_is_drawn_as_removed_with_the_edge_that_replaces_it(component: Component) -> None:
    def skip(graph: torch.fx.GraphModule) -> None:
        skip_branch(graph, find_branches(graph)[1])
        drop_dead_nodes(graph)

    after = edited(component, skip)
    drawing = difference_drawing(component, after, DIMS, refused={"embed": "is no branch"})
    marks = {node.key: node.mark for node in drawing.nodes}
    gone = {n.name for n in component.graph.graph.nodes} - {n.name for n in after.graph.graph.nodes}
    assert len(gone) > 3
    assert {key for key, mark in marks.items() if mark is Mark.REMOVED} == gone
    assert marks["embed"] is Mark.REFUSED
    assert by_key(drawing)["embed"].detail[-1] == "refused: is no branch"
    assert drawing.note == f"{len(gone)} removed, 1 refused"
    added = {edge for edge, mark in drawing.edge_marks.items() if mark is Mark.ADDED}
    branch = find_branches(component.graph)[1]
    assert added == {(branch.stream.name, reader.name) for reader in branch.exit.users}
    assert_in_order(drawing)


def test_new_nodes_are_added_and_nodes_with_another_shape_are_changed(component: Component) -> None:
    def widen(graph: torch.fx.GraphModule) -> None:
        fc1 = next(node for node in graph.graph.nodes if str(node.target).endswith("0.mlp.fc1"))
        set_at(graph, str(fc1.target), nn.Linear(8, 12))
        fc1.meta["val"] = fc1.meta["val"].new_empty((*fc1.meta["val"].shape[:-1], 12))
        with graph.graph.inserting_after(fc1):
            insert_call(graph, torch.ops.aten.relu.default, (fc1,))

    drawing = difference_drawing(component, edited(component, widen), DIMS)
    marks = {node.key: node.mark for node in drawing.nodes if node.mark is not Mark.PLAIN}
    changed = [key for key, mark in marks.items() if mark is Mark.CHANGED]
    assert len(changed) == 1
    assert changed[0].endswith("fc1")
    assert marks == {changed[0]: Mark.CHANGED, "relu_default": Mark.ADDED}
    assert "before: float32[batch, 5, 16]" in by_key(drawing)[changed[0]].detail
    assert_in_order(drawing)


def test_a_name_that_comes_twice_in_both_orders_is_drawn_as_in_the_later_graph() -> None:
    kept, gone = {("x", "b"): None, ("b", "a"): None}, [("x", "a"), ("a", "b")]
    order, edges = _joint_order(["x", "a", "b"], kept, gone)
    assert order == ["x", "b", "a"]
    assert edges == (("x", "b"), ("b", "a"), ("x", "a"))


def assert_in_order(drawing: Drawing) -> None:
    place = {node.key: i for i, node in enumerate(drawing.nodes)}
    assert len(place) == len(drawing.nodes)
    assert all(place[source] < place[target] for source, target in drawing.edges)
    assert not [pair for pair, n in itertools.groupby(sorted(drawing.edges)) if len(list(n)) > 1]
