"""A choice between two values is a branch in ONNX: what is not taken is not computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.capture.test_generative import captured_toy
from tests.emit import test_generative as generative
from vlmopt.core.contract import Context
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.emit.onnx_file import emit_onnx
from vlmopt.graph.adapters import adapter_parameters
from vlmopt.graph.assembled import DECODER
from vlmopt.graph.example import DIMS, component_of
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step


class Choosing(nn.Module):
    """The sum decides for the whole value, or each number for itself."""

    def __init__(self, *, is_whole: bool) -> None:
        super().__init__()
        self.layer, self.is_whole = nn.Linear(4, 4), is_whole

    def forward(self, x: Tensor) -> Tensor:
        condition = x.sum() > 0 if self.is_whole else x > 0
        return torch.where(condition, torch.tanh(self.layer(x)), x)


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_choice_for_the_whole_value_becomes_a_branch(tmp_path: Path, *, is_whole: bool) -> None:
    component = component_of(Choosing(is_whole=is_whole), torch.ones(2, 4))
    path = tmp_path / "model.onnx"
    emit_onnx(component, DIMS, path)
    nodes = onnx.load(path).graph.node
    outside = [node.op_type for node in nodes]
    assert ("If" in outside, "Where" in outside) == (is_whole, not is_whole)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for sign in (1.0, -1.0):
        x = sign * torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
        (found,) = session.run(None, {component.inputs[0].name: np.asarray(x)})
        with torch.no_grad():
            (wanted,) = component.graph(x)
        assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-6)


def test_a_traversed_decoder_equals_the_program_and_a_step_computes_one_pass(tmp_path: Path) -> None:
    _, program = captured_toy("llava_llama")
    before = run_step(program, make_pass("canonicalize", {}), Context(), step=1).program
    done = run_step(before, make_pass("insert-traversal", {"start": "paper", "times": 2}), Context(), step=2).program
    counts = []
    for number, one in enumerate((before, done)):
        folder = tmp_path / str(number)
        folder.mkdir()
        emitted = generative.Emitted(one, folder, emit_program(one, ("onnx",), folder, progress=Silent()))
        graph = onnx.load(folder / emitted.files[DECODER]["onnx"], load_external_data=False).graph
        counts.append([node.op_type for node in graph.node])
        for n_images, n_padding in (((1,), 0), ((1, 2), 2), ((0,), 0)):
            generative.test_prompt_and_cached_steps_equal_the_program(emitted, n_images, n_padding)
    assert counts[1].count("MatMul") == counts[0].count("MatMul")
    assert (counts[0].count("If"), counts[1].count("If")) == (0, 3)
    assert len(adapter_parameters(done)) == 3 * 2 * 2
