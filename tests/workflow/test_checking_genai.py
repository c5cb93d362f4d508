"""The gates of the graphs that onnxruntime-genai reads: they pass as emitted, and fail where one was altered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from tests.capture.test_generative import captured_toy
from tests.conftest import Workshop
from tests.runtime.test_generation import compiled
from vlmopt.cli import entry
from vlmopt.core.manifest import sha256_of
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.emit.genai_graphs import write_genai_graphs
from vlmopt.emit.manifest import component_entry, generation_entry
from vlmopt.graph.replay import run_outputs
from vlmopt.rundir import CHECKSUM
from vlmopt.verify.parity import Gate, Recorded
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


def checked(program: Program, cases: Mapping[str, Sequence[Recorded]], folder: Path) -> list[Gate]:
    return check_genai_graphs(program.generation, program.components, cases, folder, claim="equals the program")


def test_the_gates_pass_as_emitted_and_fail_where_a_graph_was_altered(tmp_path: Path) -> None:
    program = captured_toy("gemma3")[1]
    cases = cases_of(program)
    assert checked(program, cases, tmp_path) == []
    emit_program(program, ("onnx",), tmp_path, progress=Silent())
    found = checked(program, cases, tmp_path)
    assert [(gate.name, gate.passed) for gate in found] == [(title, True) for title in TITLES]
    assert max(gate.found for gate in found) < 1e-5
    assert program.generation is not None
    other = replace(program, generation=replace(program.generation, image_token=60))
    write_genai_graphs(other, tmp_path / "onnx")  # another token stands for images
    assert [gate.passed for gate in checked(program, cases, tmp_path)] == [False, False]


def test_what_the_manifest_says_of_the_components_is_enough(tmp_path: Path) -> None:
    program = captured_toy("gemma3")[1]
    emit_program(program, ("onnx",), tmp_path, progress=Silent())
    entries = {name: component_entry(component, {}) for name, component in program.components.items()}
    named = {}
    for name, cases in cases_of(program).items():
        in_files = {spec.name: spec.name_in_files for spec in program.components[name].inputs}
        named[name] = [({in_files[key]: value for key, value in feed.items()}, wanted) for feed, wanted in cases]
    found = check_genai_graphs(generation_entry(program), entries, named, tmp_path, claim="equals the program")
    assert [(gate.name, gate.passed) for gate in found] == [(title, True) for title in TITLES]


@pytest.mark.slow
def test_they_are_verified_again_with_the_artifact(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = compiled(workshop, "gemma3", [])
    capsys.readouterr()
    assert entry.run(["verify", "-q", "--json", str(artifact)]) == 0
    names = [gate["name"] for gate in json.loads(capsys.readouterr().out)["gates"]]
    assert {f"onnx/genai_{part}.onnx computes what was recorded" for part in ("embedding", "decoder")} <= set(names)
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    file = copy / "onnx" / "genai_embedding.onnx"
    graph = onnx.load(file, load_external_data=False)
    (mark,) = (node for node in graph.graph.node if node.output[0] == "placing_mark")
    mark.attribute[0].i = 60  # another token stands for images
    file.write_bytes(graph.SerializeToString())
    sign(copy, "onnx/genai_embedding.onnx")
    assert entry.run(["verify", "-q", str(copy)]) == 3
    assert "onnx/genai_embedding.onnx computes what was recorded: found" in capsys.readouterr().err


def sign(artifact: Path, name: str) -> None:
    """Notes what the file is now, as if it had been verified."""
    manifest = artifact / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] |= {"sha256": sha256_of(artifact / name), "bytes": (artifact / name).stat().st_size}
    manifest.write_text(json.dumps(content))
    (artifact / CHECKSUM).write_text(f"{sha256_of(manifest)}  manifest.json\n")


def test_programs_of_other_families_have_no_such_gates(tmp_path: Path) -> None:
    program = captured_toy("llava_llama")[1]
    emit_program(program, ("onnx",), tmp_path, progress=Silent())
    assert checked(program, cases_of(program), tmp_path) == []
