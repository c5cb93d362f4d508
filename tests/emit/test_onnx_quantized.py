"""Quantized leaves in files: ONNX Runtime computes what the program simulates, and so do the other formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vlmopt.core import integer_products
from vlmopt.core.program import Component
from vlmopt.emit import emit_onnx, emit_pt2, emit_torchscript, onnx_file, onnx_quantized
from vlmopt.graph.example import DIMS, component_of
from vlmopt.graph.modules import get_at, set_at
from vlmopt.graph.quantized import QuantizedLeaf, WeightBytes
from vlmopt.graph.quantizing import blockwise_embedding, blockwise_linear, half_layer, int8_linear
from vlmopt.graph.replay import run_outputs
from vlmopt.verify.parity import difference, open_onnx, open_pt2, open_torchscript

X = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
WORDS = torch.tensor([[1, 2, 7], [0, 3, 3]])
KINDS = ("dynamic", "qdq", "integer", "8 bits", "4 bits", "8 bits exact", "4 bits exact", "float16", "bfloat16")
OPERATIONS = {
    "dynamic": {"DynamicQuantizeLinear", "MatMulInteger"},
    "qdq": {"QuantizeLinear", "DequantizeLinear", "MatMul"},
    "integer": {"QuantizeLinear", "MatMulInteger"},
    "float16": {"Cast", "MatMul"},
    "bfloat16": {"Cast", "MatMul"},
}


class Two(nn.Module):
    """A layer with a bias behind one without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(40, 64, bias=False), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def leaf_of(kind: str, layer: nn.Linear, weights: WeightBytes = "auto") -> QuantizedLeaf:
    if kind[0] in "48":
        exact = kind.endswith("exact")
        return blockwise_linear(layer, int(kind[0]), 32, rounds_input=not exact, moments=None, rounding="nearest")
    if kind.endswith("float16"):
        return half_layer(layer, getattr(torch, kind))
    ranges = None if kind == "dynamic" else (-3.0, 4.0)
    is_qdq = kind == "qdq"
    return int8_linear(layer, input_range=ranges, is_qdq=is_qdq, weights=weights, moments=None, rounding="nearest")


def quantized(kind: str, dtype: torch.dtype = torch.float32, *, weights: WeightBytes = "auto") -> Component:
    component = component_of(Two().to(dtype), X.to(dtype))
    for path in ("first", "second"):
        layer = get_at(component.graph, path)
        assert isinstance(layer, nn.Linear)
        set_at(component.graph, path, leaf_of(kind, layer, weights))
    return component


def weight_bytes(path: Path) -> int:
    """Bytes of the numbers that a file holds, but for the few integers that shapes are made of."""
    tensors = onnx.load(path).graph.initializer
    return sum(onnx.numpy_helper.to_array(one).nbytes for one in tensors if one.data_type != onnx.TensorProto.INT64)


@pytest.mark.parametrize("way", ["direct", "exported"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_runtime_computes_what_is_simulated(
    kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "exported":
        monkeypatch.setattr(onnx_file, "direct_program", lambda *_: None)
    component = quantized(kind)
    path = emit_onnx(component, DIMS, tmp_path / "m.onnx").path
    used = {node.op_type for node in onnx.load(path).graph.node}
    assert OPERATIONS.get(kind, {"MatMulNBits"}) <= used
    for batch in (X, X[:1]):
        (wanted,), (found,) = run_outputs(component, {"x": batch}), open_onnx(path)({"x": batch})
        assert difference(found, wanted) < 2e-6


@pytest.mark.parametrize("way", ["direct", "exported"])
@pytest.mark.parametrize("kind", ["dynamic", "qdq", "integer"])
def test_unsigned_weights_are_exact_on_every_processor(
    kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large values next to each other, whose sums of two products do not fit into 16 bits."""
    monkeypatch.setattr(onnx_quantized, "saturates", lambda: True)
    if way == "exported":
        monkeypatch.setattr(onnx_file, "direct_program", lambda *_: None)
    component = quantized(kind)
    path = emit_onnx(component, DIMS, tmp_path / "m.onnx").path
    stored = {one.data_type for one in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.UINT8 in stored
    assert onnx.TensorProto.INT8 not in stored
    large = X.abs().sqrt()
    for batch in (X, large, X[:1]):
        (wanted,), (found,) = run_outputs(component, {"x": batch}), open_onnx(path)({"x": batch})
        assert difference(found, wanted) < 2e-6


def test_signed_weights_are_right_where_products_do_not_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the question that is asked of the runtime is for: it answers as products of a layer come out."""
    saturating = integer_products.saturates()
    monkeypatch.setattr(onnx_quantized, "saturates", lambda: False)
    component = quantized("dynamic")
    path = emit_onnx(component, DIMS, tmp_path / "m.onnx").path
    large = X.abs().sqrt()
    (wanted,), (found,) = run_outputs(component, {"x": large}), open_onnx(path)({"x": large})
    assert (difference(found, wanted) > 2e-6) == saturating


@pytest.mark.parametrize("weights", ["signed", "unsigned"])
def test_the_form_of_weights_that_is_asked_for_is_written_on_any_processor(
    weights: WeightBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_quantized, "saturates", lambda: weights == "signed")
    path = emit_onnx(quantized("dynamic", weights=weights), DIMS, tmp_path / "m.onnx").path
    stored = {one.data_type for one in onnx.load(path).graph.initializer if len(one.dims) == 2}
    assert stored == {onnx.TensorProto.INT8 if weights == "signed" else onnx.TensorProto.UINT8}


@pytest.mark.parametrize("kind", ["dynamic", "8 bits"])
def test_a_program_in_bfloat16_is_quantized_too(kind: str, tmp_path: Path) -> None:
    component = quantized(kind, torch.bfloat16)
    path = emit_onnx(component, DIMS, tmp_path / "m.onnx").path
    onnx.checker.check_model(onnx.load(path))
    (wanted,) = run_outputs(component, {"x": X.bfloat16()})
    assert wanted.dtype == torch.bfloat16


@pytest.mark.parametrize("is_unsigned", [False, True])
def test_weights_take_the_bytes_that_their_bits_say(
    is_unsigned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_quantized, "saturates", lambda: is_unsigned)
    sizes = {}
    for kind in KINDS:
        path = emit_onnx(quantized(kind), DIMS, tmp_path / f"{kind}.onnx").path
        sizes[kind] = weight_bytes(path)
        assert sizes[kind] < path.stat().st_size < sizes[kind] + 4_000  # the graph itself, and nothing twice
    first, second, bias = 64, 8, 4 * 8  # outputs; 40 inputs are two blocks of 32, 64 are two as well
    signed = first * 40 + second * 64 + 4 * (first + second) + bias
    assert sizes["dynamic"] == signed + is_unsigned  # a zero point for both weights
    # A scale of four bytes and a zero point of one: one range here, written once; QDQ has zero points by output.
    assert sizes["integer"] == signed + 5 + is_unsigned
    assert sizes["qdq"] == signed + 5 + is_unsigned * (first + second)
    for kind in ("float16", "bfloat16"):
        assert sizes[kind] == 2 * (first * 40 + second * 64) + bias
    for kind in KINDS[3:7]:
        assert sizes[kind] == (first + second) * (64 * int(kind[0]) // 8 + 2 * 4) + bias


def table_of(bits: int) -> Component:
    """A table of 9 words of 64 numbers, rounded to so many bits."""
    torch.manual_seed(0)
    component = component_of(nn.Sequential(nn.Embedding(9, 64), nn.ReLU()), WORDS)
    (path,) = {str(node.target) for node in component.graph.graph.nodes if node.op == "call_module"}
    table = get_at(component.graph, path)
    assert isinstance(table, nn.Embedding)
    leaf = half_layer(table, torch.float16) if bits == 16 else blockwise_embedding(table, bits, 32)
    set_at(component.graph, path, leaf)
    return component


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_embeddings_are_read_by_row(bits: int, tmp_path: Path) -> None:
    component = table_of(bits)
    file = emit_onnx(component, DIMS, tmp_path / "m.onnx").path
    feed = {component.inputs[0].name: WORDS}
    assert torch.equal(open_onnx(file)(feed)[0], run_outputs(component, feed)[0])
    scales = 0 if bits == 16 else 9 * 2 * 4
    assert weight_bytes(file) == 9 * 64 * bits // 8 + scales


@pytest.mark.parametrize("kind", ["dynamic", "qdq", "4 bits", "float16"])
def test_other_formats_hold_the_simulation(kind: str, tmp_path: Path) -> None:
    component = quantized(kind)
    wanted = run_outputs(component, {"x": X})[0]
    script = emit_torchscript(component, tmp_path / "m.pt").path
    assert torch.equal(open_torchscript(script)({"x": X})[0], wanted)
    assert torch.equal(open_pt2(emit_pt2(component, DIMS, tmp_path / "m.pt2").path)({"x": X})[0], wanted)
    assert script.stat().st_size < 40_000


@pytest.mark.parametrize("kind", KINDS)
def test_files_load_without_a_warning_and_pass_the_checker(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = emit_onnx(quantized(kind), DIMS, tmp_path / "m.onnx").path
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    session.run(None, {"x": X.numpy().astype(np.float32)})
    assert capfd.readouterr() == ("", "")
