"""The gates of the graphs that onnxruntime-genai reads: they pass as emitted, and fail where one was altered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.capture.test_generative import captured_toy
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.emit.genai_graphs import write_genai_graphs
from vlmopt.graph.replay import run_outputs
from vlmopt.verify.parity import Recorded
from vlmopt.workflow.checking_genai import check_genai_graphs
from vlmopt.workflow.samples import sample_shapes

TITLES = ["onnx/genai_embedding.onnx equals the program", "onnx/genai_decoder.onnx equals the program"]


def cases_of(program: Program) -> dict[str, list[Recorded]]:
    shapes = sample_shapes(program, None, seed=0)
    with torch.no_grad():
        return {
            name: [(feed, run_outputs(component, feed)) for feed in shapes[name]]
            for name, component in program.components.items()
        }


def test_the_gates_pass_as_emitted_and_fail_where_a_graph_was_altered(tmp_path: Path) -> None:
    program = captured_toy("gemma3")[1]
    cases = cases_of(program)
    assert check_genai_graphs(program, cases, tmp_path) == []
    emit_program(program, ("onnx",), tmp_path, progress=Silent())
    found = check_genai_graphs(program, cases, tmp_path)
    assert [(gate.name, gate.passed) for gate in found] == [(title, True) for title in TITLES]
    assert max(gate.found for gate in found) < 1e-5
    assert program.generation is not None
    other = replace(program, generation=replace(program.generation, image_token=60))
    write_genai_graphs(other, tmp_path / "onnx")  # another token stands for images
    assert [gate.passed for gate in check_genai_graphs(program, cases, tmp_path)] == [False, False]


def test_programs_of_other_families_have_no_such_gates(tmp_path: Path) -> None:
    program = captured_toy("llava_llama")[1]
    emit_program(program, ("onnx",), tmp_path, progress=Silent())
    assert check_genai_graphs(program, cases_of(program), tmp_path) == []
