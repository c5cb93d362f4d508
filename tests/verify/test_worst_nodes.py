"""Errors by node: the worst come first, and a fault is told from what is only handed on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.emit.toy import DIMS, cases, image_component, text_component
from vlmopt.core.errors import ArtifactError
from vlmopt.core.program import Component
from vlmopt.emit import emit_onnx
from vlmopt.emit.exported import export_component
from vlmopt.verify.worst_nodes import departure, graph_values, onnx_values


@pytest.mark.parametrize("component", [image_component(), text_component()], ids=lambda part: part.name)
def test_nearly_every_node_is_found_in_the_onnx_file(component: Component, tmp_path: Path) -> None:
    emit_onnx(component, DIMS, tmp_path / "a.onnx")
    graph = export_component(component, DIMS).module(check_guards=False)
    feed = {spec.name: value for spec, value in zip(component.inputs, cases(component)[0], strict=True)}
    wanted = graph_values(graph, feed)
    found = onnx_values(tmp_path / "a.onnx", feed, wanted)
    rows = departure(graph, found, wanted)
    n_float = sum(value.is_floating_point() for value in wanted.values())
    assert len(rows.nodes) >= 0.85 * n_float
    assert rows.first_jump is None
    assert rows.worst(1)[0].error < 1e-5


def test_a_fault_counts_where_it_begins_and_not_where_it_is_handed_on() -> None:
    graph = image_component().graph
    feed = {"pixel_values": cases(image_component())[0][0]}
    wanted = graph_values(graph, feed)
    order = [node.name for node in graph.graph.nodes if node.name in wanted and node.op != "placeholder"]
    spoiled = order[len(order) // 2]
    found = {
        name: value * 1.01 if order.index(name) >= order.index(spoiled) else value
        for name, value in wanted.items()
        if name in order
    }
    rows = departure(graph, found, wanted)
    assert rows.first_jump is not None
    assert rows.first_jump.name == spoiled
    assert {row.name for row in rows.worst(len(order)) if row.error > 1e-3} == set(order[order.index(spoiled) :])
    assert all(row.growth < 2 for row in rows.nodes if row.name != spoiled and row.error > 1e-3 and row.growth < 10)


def test_operations_are_named_as_in_the_text_of_a_graph() -> None:
    graph = image_component().graph
    values = graph_values(graph, {"pixel_values": cases(image_component())[0][0]})
    operations = {row.operation for row in departure(graph, values, values).nodes}
    assert "linear" in operations
    assert "call_module" not in operations


def test_equal_values_and_noise_are_no_departure() -> None:
    graph = image_component().graph
    wanted = graph_values(graph, {"pixel_values": cases(image_component())[0][0]})
    noisy = {name: value * (1 + 1e-7) for name, value in wanted.items()}
    assert departure(graph, wanted, wanted).worst(1)[0].error == 0.0
    assert departure(graph, noisy, wanted).first_jump is None
    broken = {name: torch.full_like(value, torch.nan) for name, value in wanted.items()}
    assert departure(graph, broken, wanted).worst(1)[0].error == float("inf")


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load it"):
        onnx_values(tmp_path / "a.onnx", {}, [])
