"""Emitted ONNX files in another runtime: OpenVINO opens all of them and computes what they say."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.emit.test_onnx_quantized import KINDS, WORDS, X, leaf_of, quantized, table_of
from vlmopt.capture import capture
from vlmopt.core.program import Component, Program
from vlmopt.core.workload import Feed
from vlmopt.emit import emit_onnx
from vlmopt.graph.example import DIMS
from vlmopt.graph.quantizable import exchange, find_layers
from vlmopt.graph.quantized import with_exact_inputs
from vlmopt.graph.replay import run_outputs
from vlmopt.rewrite.pipeline import clone_program
from vlmopt.verify.edge_runtimes import open_openvino
from vlmopt.verify.loading import load_warnings
from vlmopt.verify.parity import difference
from vlmopt.workflow.checking_quantized import quantized_tolerance
from vlmopt.workflow.samples import sample_shapes

EMBEDDED = Path(__file__).parents[2] / "examples" / "embedded" / "model"
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed; pip install 'vlmopt[openvino]'"
)


def in_openvino(path: Path, feed: Feed) -> list[Tensor]:
    """All outputs, in float32 and with no rounding but those that the file asks for."""
    return list(open_openvino(path)(feed))


@needs_openvino
@pytest.mark.parametrize("kind", KINDS)
def test_openvino_computes_what_the_program_simulates(kind: str, tmp_path: Path) -> None:
    """But for the rounding of inputs in blocks, which is a hint to ONNX Runtime that OpenVINO does not take."""
    component = quantized(kind)
    path = emit_onnx(component, DIMS, tmp_path / "m.onnx").path
    simulated = with_exact_inputs(component) if kind in ("8 bits", "4 bits") else component
    (wanted,), (found,) = run_outputs(simulated, {"x": X}), in_openvino(path, {"x": X})
    assert difference(found, wanted) < 2e-6


@needs_openvino
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_openvino_reads_rows_of_tables(bits: int, tmp_path: Path) -> None:
    component = table_of(bits)
    feed = {component.inputs[0].name: WORDS}
    file = emit_onnx(component, DIMS, tmp_path / "m.onnx").path
    (wanted,), (found,) = run_outputs(component, feed), in_openvino(file, feed)
    assert torch.equal(found, wanted)


@cache
def embedded() -> Program:
    return capture(str(EMBEDDED))


def embedded_in(kind: str) -> tuple[Component, Program]:
    program = clone_program(embedded())
    for layer in find_layers(program) if kind != "float32" else ():
        assert isinstance(layer.leaf, nn.Linear)
        exchange(program, layer, leaf_of(kind, layer.leaf))
    (component,) = program.components.values()
    return component, program


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", *KINDS])
def test_every_kind_of_the_embedded_example_opens_everywhere_without_a_warning(kind: str, tmp_path: Path) -> None:
    component, program = embedded_in(kind)
    path = emit_onnx(component, program.dims, tmp_path / "m.onnx").path
    onnx.checker.check_model(str(path), full_check=True)
    assert load_warnings(path) == []
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    cases = [(feed, run_outputs(component, feed)) for feed in sample_shapes(program, None, seed=0)[component.name]]
    allowed = quantized_tolerance(component, cases) or 1e-4
    for feed, wanted in cases:
        for one, other in zip(in_openvino(path, feed), wanted, strict=True):
            assert difference(one, other) <= allowed
