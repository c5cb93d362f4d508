"""Profiles of devices: measured here, or by the runner elsewhere; predictions for plans of cuts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices.graphs import profile
from tests.workflow.test_branch_timing import Stack
from vlmopt.core.errors import OutputExistsError, ProfileError, VlmoptError
from vlmopt.core.progress import Silent
from vlmopt.devices import measure
from vlmopt.devices.document import read_device_profile
from vlmopt.devices.operations import operations_of
from vlmopt.graph.branches import find_branches
from vlmopt.graph.example import program_of
from vlmopt.workflow import export_operations, import_results, predict_model, profile_device
from vlmopt.workflow.cutting import cut_program
from vlmopt.workflow.device_graphs import graphs_of
from vlmopt.workflow.device_predicting import branch_costs, predict_program
from vlmopt.workflow.device_profiling import measure_operations

IMAGES = {"components": ["image_encoder"], "threads": 1, "rounds": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers matter little here, and every operation takes its turns."""
    monkeypatch.setattr(measure, "_MOST_RUNS", 6)


def test_a_file_is_never_overwritten_and_update_adds_only_what_is_missing(clip: Path, tmp_path: Path) -> None:
    output = tmp_path / "here.json"
    found = profile_device(str(clip), output, **IMAGES)  # type: ignore[arg-type]
    first = read_device_profile(output)
    assert [check["component"] for check in found["checks"]] == ["image_encoder"]
    assert first.runtime.threads == 1
    with pytest.raises(OutputExistsError, match="exists already"):
        profile_device(str(clip), output, **IMAGES)  # type: ignore[arg-type]
    profile_device(str(clip), output, components=["text_encoder"], rounds=1, update=True)
    both = read_device_profile(output)
    assert both.operations.items() > first.operations.items()
    assert [check.component for check in both.checks] == ["image_encoder", "text_encoder"]
    with pytest.raises(ProfileError, match="the file was measured on 1 threads; use another file"):
        profile_device(str(clip), output, threads=2, update=True)
    assert read_device_profile(output) == both


def test_an_artifact_is_profiled_as_it_lies_there(classifier: Path, tmp_path: Path) -> None:
    found = profile_device(str(classifier), tmp_path / "here.json", threads=1, rounds=1)
    assert found["checks"]
    assert all(check["measured_us"] > 0 for check in found["checks"])
    with pytest.raises(VlmoptError, match="an artifact has the size it was made for"):
        profile_device(str(classifier), tmp_path / "other.json", image_size=(32, 32))
    with pytest.raises(VlmoptError, match="'nose' is not there; expected one of"):
        profile_device(str(classifier), tmp_path / "other.json", components=["nose"])


def test_operations_of_edits_are_known_before_there_is_a_plan(clip: Path, classifier: Path, tmp_path: Path) -> None:
    """Of int8 and of every width, in both precisions."""
    plain, folder = tmp_path / "plain", tmp_path / "folder"
    export_operations(str(clip), plain, components=["image_encoder"])
    export_operations(str(clip), folder, components=["image_encoder"], together=True)
    alone, more = ({entry["signature"] for entry in _plan(one)["entries"]} for one in (plain, folder))
    assert alone < more
    products = [name for name in more - alone if "MatMulIntegerToFloat" in name or "DynamicQuantizeMatMul" in name]
    for size in ("uint8[32,32]", "uint8[32,16]", "uint8[16,32]"):  # whole, and narrower in front and behind
        assert any(f"constant {size}" in name for name in products), size
    with pytest.raises(VlmoptError, match="an artifact holds its plan already; pass the model"):
        export_operations(str(classifier), tmp_path / "other", together=True)
    with pytest.raises(VlmoptError, match="'nose' is not there"):
        export_operations(str(clip), tmp_path / "other", components=["nose"], together=True)
    assert not (tmp_path / "other").exists()


def _plan(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / measure.PLAN).read_text(encoding="utf-8"))
    return found


def test_what_a_device_measured_predicts_the_model_there(clip: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "folder", tmp_path / "board.json"
    exported = export_operations(str(clip), folder, components=["image_encoder", "text_encoder"])
    assert exported["left_out"] == []
    with pytest.raises(OutputExistsError):
        export_operations(str(clip), folder)
    options = ["--threads", "1", "--rounds", "1", "--seconds", "0.001"]
    subprocess.run([sys.executable, str(folder / "measure.py"), *options], check=True, capture_output=True)
    made = import_results(folder / "results.json", output)
    assert len(made["operations"]) == exported["operations"]
    whole = predict_model(str(clip), output)["components"]
    assert list(whole) == ["image_encoder", "text_encoder"]
    branch = "image_encoder/vision_model.encoder.layers.1.mlp"
    cut = predict_model(str(clip), output, skipped=[branch])["components"]
    assert cut["image_encoder"]["sum_us"] < whole["image_encoder"]["sum_us"]
    assert cut["text_encoder"] == whole["text_encoder"]
    with pytest.raises(VlmoptError, match="image_encoder has no branch 'nose' to skip"):
        predict_model(str(clip), output, skipped=["image_encoder/nose"])


def test_results_of_another_runtime_version_are_taken_only_when_asked_for(tmp_path: Path) -> None:
    results, output = tmp_path / "results.json", tmp_path / "board.json"
    data = json.loads(profile({"Relu": 1.0}, version="1.2.3").to_json())
    names = ("machine", "runtime", "clock", "rotated_bytes", "call_us", "operations", "failed")
    kept = {key: data[key] for key in names}
    results.write_text(json.dumps({"schema": 1, "date": "2026-01-01", **kept}), encoding="utf-8")
    with pytest.raises(ProfileError, match=r"ONNX Runtime 1\.2\.3"):
        import_results(results, output)
    assert not output.exists()
    import_results(results, output, allow_other_runtime=True)
    with pytest.raises(ProfileError, match=r"ONNX Runtime 1\.2\.3"):
        read_device_profile(output)


def test_plans_are_predicted_from_branches_as_from_their_own_graphs(tmp_path: Path) -> None:
    program = program_of(Stack(), torch.ones(2, 64, 256))
    (name,) = program.components
    (graph,) = graphs_of(program, tmp_path, progress=Silent())
    operations = operations_of(graph.path, graph.feed)
    known = measure_operations(operations.examples, threads=1, progress=Silent(), rounds=2)
    costs = branch_costs(program, name, known, place="here", progress=Silent())
    wide, other, narrow, _ = (branch.name for branch in find_branches(program.components[name].graph))
    assert costs.branches_us[wide] == costs.branches_us[other] > costs.branches_us[narrow] > 0.0
    cut = predict_program(cut_program(program, {name: [wide, narrow]}), known, place="here", progress=Silent())
    assert costs.without([wide, narrow]) == pytest.approx(cut[name].us, rel=0.05)
