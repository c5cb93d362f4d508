"""`vlmopt verify --worst-nodes`: a fault in a file is traced to its node, and a cut to where it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from vlmopt import workflow
from vlmopt.cli import entry
from vlmopt.core.errors import ArtifactError
from vlmopt.recipe.loading import load_recipe, save_recipe

Capture = pytest.CaptureFixture[str]


def spoil(file: Path, wanted: str) -> None:
    """Scales the stored tensor whose name holds `wanted` by a tenth more."""
    model = onnx.load(str(file))
    (tensor,) = [tensor for tensor in model.graph.initializer if wanted in tensor.name]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.1, tensor.name))
    onnx.save(model, str(file))


@pytest.fixture(scope="module")
def intact(classifier: Path) -> dict[str, Any]:
    return workflow.worst_nodes(classifier, n=5)


def test_an_intact_artifact_departs_by_rounding_alone(intact: dict[str, Any]) -> None:
    found = intact["files"]["image_encoder"]
    assert found["file"] == "image_encoder.onnx"
    assert found["n_compared"] > 20
    assert found["first_jump"] is None
    assert len(found["nodes"]) == 5
    errors = [node["error"] for node in found["nodes"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1e-5
    assert intact["note"] == ""


def test_a_cut_is_where_the_program_departs_from_the_original(intact: dict[str, Any], classifier: Path) -> None:
    report = json.loads((classifier / "report.json").read_text())
    cut = [branch["name"] for branch in report["branches"] if not branch["kept"]]
    assert cut != []
    found = intact["original"]["image_encoder"]
    assert found["first_jump"]["error"] > 1e-3
    assert found["nodes"][0]["error"] >= found["first_jump"]["error"]


def test_a_changed_weight_is_traced_to_its_node_and_the_check_still_fails(
    classifier: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = Path(shutil.copytree(classifier, tmp_path / "out"))
    model = onnx.load(str(out / "image_encoder.onnx"))
    names = [
        tensor.name
        for tensor in model.graph.initializer
        if tensor.name.endswith(".bias") and "embed" not in tensor.name
    ]
    wanted = names[len(names) // 2]
    spoil(out / "image_encoder.onnx", wanted)
    found = workflow.worst_nodes(out)
    jump = found["files"]["image_encoder"]["first_jump"]
    assert wanted.endswith(f"{jump['module']}.bias")
    assert jump["error"] > 1e-4
    assert entry.run(["verify", str(out), "-q", "--worst-nodes", "3"]) == 3
    shown = capsys.readouterr()
    assert f"The first to depart by itself: {jump['name']}" in shown.out
    assert "image_encoder.onnx was changed since it was verified" in shown.err


def test_json_holds_gates_and_nodes(classifier: Path, capsys: Capture) -> None:
    assert entry.run(["verify", str(classifier), "-q", "--json", "--worst-nodes"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(gate["passed"] for gate in found["gates"])
    assert len(found["worst_nodes"]["files"]["image_encoder"]["nodes"]) == 10


def without_model(artifact: Path, folder: Path) -> Path:
    """A copy whose recipe names a model that is not there."""
    out = Path(shutil.copytree(artifact, folder / "out"))
    save_recipe(load_recipe(out).model_copy(update={"model": str(folder / "gone")}), out / "recipe.yaml")
    return out


def test_without_the_model_it_says_so(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone.*; make the artifact with --emit onnx,pt2"):
        workflow.worst_nodes(without_model(classifier, tmp_path))


@pytest.mark.slow
def test_without_the_model_pt2_files_stand_for_the_program(answerer: Path, tmp_path: Path) -> None:
    found = workflow.worst_nodes(without_model(answerer, tmp_path))
    assert found["files"]["model"]["n_compared"] > 20
    assert found["files"]["model"]["first_jump"] is None
    assert found["original"] == {}
    assert "the program cannot be made again from" in found["note"]


def test_what_is_no_artifact_is_refused(tmp_path: Path, classifier: Path, capsys: Capture) -> None:
    assert entry.run(["verify", str(tmp_path), "--worst-nodes"]) == 1
    assert "has no manifest.json" in capsys.readouterr().err
    out = Path(shutil.copytree(classifier, tmp_path / "out"))
    (out / ".work" / "40-verify" / "cases.safetensors").unlink()
    assert entry.run(["verify", str(out), "--worst-nodes"]) == 1
    assert "has no .work/40-verify/cases.safetensors" in capsys.readouterr().err
