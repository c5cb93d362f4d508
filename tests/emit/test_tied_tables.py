from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from tests.capture.test_generative import captured_toy
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.graph.assembled import DECODER, EMBEDDING
from vlmopt.graph.modules import get_at
from vlmopt.graph.quantizable import exchange, find_layers
from vlmopt.graph.quantized import BlockwiseLinear
from vlmopt.graph.replay import run_outputs
from vlmopt.graph.weight_forms import WeightForm
from vlmopt.rewrite.pipeline import clone_program
from vlmopt.verify.loading import load_warnings
from vlmopt.verify.parity import difference, open_onnx
from vlmopt.workflow.checking_quantized import quantized_tolerance
from vlmopt.workflow.samples import sample_shapes

ROWS, WIDTH = 64, 32  # of the toy's table


def quantized(bits: int) -> Program:
    """The toy, its table and the output layer that is tied to it in blocks of 32."""
    program = clone_program(captured_toy("llava_tied")[1])
    form = WeightForm(bits, torch.float16, 32, rounds_input=True, rounding="nearest")
    layers = find_layers(program, (nn.Linear, nn.Embedding))
    (table,) = (layer for layer in layers if isinstance(layer.leaf, nn.Embedding) and layer.component == EMBEDDING)
    for layer in [layer for layer in layers if layer.leaf.weight is table.leaf.weight]:
        exchange(program, layer, form.made(layer.leaf, None))
    return program


def placed(path: Path, n_bytes: int) -> list[tuple[str, str]]:
    """Where the weights of so many bytes lie that a graph reads from a data file."""
    found = []
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        keys = {entry.key: entry.value for entry in tensor.external_data}
        if keys.get("length") == str(n_bytes):
            found.append((keys["location"], keys.get("offset", "0")))
    return found


@pytest.mark.parametrize("bits", [8, 4])
def test_a_tied_table_of_few_bits_is_written_once_and_read_by_both(bits: int, tmp_path: Path) -> None:
    program = quantized(bits)
    files = emit_program(program, ("onnx",), tmp_path, progress=Silent())
    embedding, decoder = (tmp_path / files[name]["onnx"] for name in (EMBEDDING, DECODER))
    n_bytes = ROWS * WIDTH * bits // 8
    assert placed(embedding, n_bytes) == placed(decoder, n_bytes) == [("embed_tokens.onnx_data", "0")]
    assert (tmp_path / "onnx" / "embed_tokens.onnx_data").stat().st_size == n_bytes
    shapes = sample_shapes(program, None, seed=0)
    for name, path in ((EMBEDDING, embedding), (DECODER, decoder)):
        assert load_warnings(path) == []
        component = program.components[name]
        cases = [(feed, run_outputs(component, feed)) for feed in shapes[name]]
        allowed = quantized_tolerance(component, cases) or 1e-4  # an input between two levels falls to either
        for feed, wanted in cases:
            found = open_onnx(path)(feed)
            assert max(difference(one, other) for one, other in zip(found, wanted, strict=True)) <= allowed


def test_tables_that_were_rounded_otherwise_stay_apart(tmp_path: Path) -> None:
    program = quantized(8)
    graph = program.components[DECODER].graph
    (head,) = (module for module in graph.modules() if isinstance(module, BlockwiseLinear))
    head.weight[0, 0, 0] += 1  # as where the output layer's rounding looks at what it reads
    files = emit_program(program, ("onnx",), tmp_path, progress=Silent())
    assert placed(tmp_path / files[DECODER]["onnx"], ROWS * WIDTH) == []
    assert get_at(graph, "lm_head") is head  # the program itself is as it was
