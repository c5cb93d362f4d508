"""The direct way to ONNX beside the one through a second torch.export."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.emit.toy import DIMS, cases, image_component, text_component
from vlmopt.core.program import Component, Dim, TensorSpec
from vlmopt.emit import emit_onnx, onnx_direct, onnx_file
from vlmopt.emit.exported import export_component
from vlmopt.emit.onnx_direct import direct_program
from vlmopt.graph.example import component_of as dynamic_component_of
from vlmopt.graph.modules import clone_graph

BOTH = pytest.mark.parametrize("component", [image_component(), text_component()], ids=lambda c: c.name)


def component_of(module: nn.Module, *, width: int = 4) -> Component:
    """A component of one input [batch, width], exported at batch 2 and not dynamic."""
    graph = torch.export.export(module.eval(), (torch.ones(2, width),)).module(check_guards=False)
    return Component(
        "model", graph, (TensorSpec("x", ("batch", width), "float32"),), (TensorSpec("y", ("batch",), "float32"),)
    )


@BOTH
def test_both_ways_give_the_same_operations_dims_and_values(
    component: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = emit_onnx(component, DIMS, tmp_path / "direct.onnx").path
    monkeypatch.setattr(onnx_file, "direct_program", lambda *_: None)
    full = emit_onnx(component, DIMS, tmp_path / "full.onnx").path
    graphs = [onnx.load(path).graph for path in (direct, full)]
    counts, ends = [], []
    for graph in graphs:
        counts.append(Counter(node.op_type for node in graph.node))
        ends.append([value.SerializeToString() for value in (*graph.input, *graph.output)])
    assert counts[0] == counts[1]
    assert ends[0] == ends[1]
    for inputs in cases(component):
        feed = {spec.name: value.numpy() for spec, value in zip(component.inputs, inputs, strict=True)}
        found, wanted = (
            onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)[0]
            for path in (direct, full)
        )
        assert np.array_equal(found, wanted)


@BOTH
def test_values_have_the_names_of_a_component_exported_again(component: Component) -> None:
    direct = direct_program(component, DIMS)
    assert direct is not None
    found, wanted = (
        {node.name for node in program.graph.nodes if node.op == "call_function"}
        for program in (direct, export_component(component, DIMS))
    )
    assert {name for name in wanted - found if not name.startswith(("sym_size", "_assert"))} == set()


@BOTH
def test_a_graph_that_differs_in_its_weights_alone_is_walked_once(
    component: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(component, graph=clone_graph(component.graph))
    for parameter in other.graph.parameters():
        parameter.data = parameter.data * 1.25 + 0.01
    monkeypatch.setattr(onnx_direct, "_WALKED", OrderedDict())
    wanted = emit_onnx(other, DIMS, tmp_path / "alone.onnx").path.read_bytes()
    onnx_direct._WALKED.clear()
    emit_onnx(component, DIMS, tmp_path / "first.onnx")
    walk, walked = onnx_direct._walk, []
    monkeypatch.setattr(onnx_direct, "_walk", lambda *given: walked.append(given) or walk(*given))
    assert emit_onnx(other, DIMS, tmp_path / "other.onnx").path.read_bytes() == wanted
    assert not walked
    direct_program(other, {**DIMS, "batch": replace(DIMS["batch"], maximum=DIMS["batch"].maximum - 1)})
    assert walked


def test_only_the_last_few_walks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_direct, "_WALKED", OrderedDict())
    monkeypatch.setattr(onnx_direct, "_MOST_NODES", 12)  # a layer is five: three inputs, a call, an output
    for width in (2, 3, 4):
        assert direct_program(dynamic_component_of(nn.Linear(width, 2), torch.ones(2, width)), DIMS) is not None
    assert len(onnx_direct._WALKED) == 2
    monkeypatch.setattr(onnx_direct, "_MOST_NODES", 1)
    assert direct_program(dynamic_component_of(nn.Linear(5, 2), torch.ones(2, 5)), DIMS) is not None
    assert len(onnx_direct._WALKED) == 1


def test_shapes_come_from_the_specs_and_not_from_stale_metadata(tmp_path: Path) -> None:
    component = image_component()
    stale = replace(component, graph=clone_graph(component.graph))
    for node in stale.graph.graph.nodes:
        node.meta["val"] = torch.zeros(7)
    fresh = emit_onnx(component, DIMS, tmp_path / "fresh.onnx").path.read_bytes()
    assert emit_onnx(stale, DIMS, tmp_path / "stale.onnx").path.read_bytes() == fresh


def test_a_dim_that_the_graph_holds_to_one_size_needs_the_full_export() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x.view(2, 4) * 2,)

    assert direct_program(component_of(Fixed()), {"batch": Dim("batch", 1, 8, 1)}) is None


def test_a_limit_that_the_dim_has_itself_does_not_need_it() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (torch.arange(8.0)[: x.shape[0]] + x[:, 0],)

    batch = torch.export.Dim("batch", min=1, max=8)
    graph = torch.export.export(Cut(), (torch.ones(2, 4),), dynamic_shapes=({0: batch},)).module(check_guards=False)
    component = replace(component_of(nn.Identity()), graph=graph)
    assert direct_program(component, {"batch": Dim("batch", 1, 8, 1)}) is not None
    assert direct_program(component, {"batch": Dim("batch", 1, 16, 1)}) is None


def test_sizes_that_choose_a_kernel_of_a_convolution_restrict_nothing(tmp_path: Path) -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)  # type: ignore[no-any-return]

    sample = torch.linspace(-1, 1, 2 * 4 * 25).reshape(2, 4, 5, 5)
    component = dynamic_component_of(Depthwise(), sample)
    assert direct_program(component, DIMS) is not None
    path = emit_onnx(component, DIMS, tmp_path / "conv.onnx").path
    many = np.concatenate([sample.numpy()] * 10)  # more than the 16 that it asks for
    (found,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": many})
    assert np.allclose(found, component.graph(torch.from_numpy(many))[0].detach().numpy(), atol=1e-5)


def test_a_leaf_that_is_not_known_needs_the_full_export() -> None:
    component = image_component()
    graph = clone_graph(component.graph)
    (path, leaf), *_ = ((path, each) for path, each in graph.named_modules() if type(each) is nn.LayerNorm)
    changed = type("Scaled", (nn.LayerNorm,), {"forward": lambda self, x: nn.LayerNorm.forward(self, x) * 2})
    other = changed(leaf.normalized_shape, eps=leaf.eps)
    graph.set_submodule(path, other)
    assert direct_program(replace(component, graph=graph), DIMS) is None
