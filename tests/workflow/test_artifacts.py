"""The main job end to end on toys: what it writes, and what the other commands say about it afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper
from PIL import Image

from tests.conftest import N_IMAGES, Workshop
from tests.toys import COLOURS
from vlmopt.cli import entry
from vlmopt.core.energy import COVERS
from vlmopt.core.manifest import read_manifest
from vlmopt.preprocess import Preprocessor
from vlmopt.recipe.schema import DEFAULT_PASSES
from vlmopt.verify.parity import open_onnx, open_pt2, open_torchscript

Capture = pytest.CaptureFixture[str]


def run_json(capsys: Capture, *words: object) -> Any:
    capsys.readouterr()
    assert entry.run([*(str(word) for word in words), "--json", "-q"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def report_of(artifact: Path) -> Any:
    return json.loads((artifact / "report.json").read_text())


def test_a_classifier_is_smaller_and_its_evidence_complete(classifier: Path) -> None:
    report = report_of(classifier)
    metric, cost = report["result"]["metric"], report["result"]["cost"]
    assert (metric["name"], metric["n"]) == ("accuracy", N_IMAGES)
    assert metric["original"] == 1.0
    assert metric["drop_points"] <= 20
    assert cost["optimized"]["macs"] < cost["original"]["macs"]
    assert all(gate["passed"] for gate in report["gates"])
    assert {gate["name"].split()[0] for gate in report["gates"]} >= {"1", "image_encoder.onnx", "drop"}
    assert [p["verdict"] for p in report["passes"]] == ["saves what it predicted"] * len(DEFAULT_PASSES)
    kept = {branch["name"]: branch["kept"] for branch in report["branches"]}
    assert len(kept) == 6
    applied = {site["name"] for p in report["passes"] if p["name"] == "skip-branches" for site in p["sites"]}
    assert applied == {f"image_encoder/{name}" for name, is_kept in kept.items() if not is_kept}
    names = {path.name for path in classifier.iterdir()}
    assert names >= {"image_encoder.onnx", "recipe.yaml", "report.md", "profile.json", "preprocessor_config.json"}
    assert not (classifier / ".work" / "10-profile").exists()
    assert not list(classifier.rglob("*.tmp"))


def test_the_text_encoder_of_fixed_prompts_is_gone(zero_shot: Path, clip: Path) -> None:
    assert sorted(path.name for path in zero_shot.glob("*.onnx*")) == ["image_encoder.onnx"]
    manifest = read_manifest(zero_shot)
    assert manifest.assembly == "fused"
    assert list(manifest.components) == ["image_encoder"]
    assert manifest.labels == ("blue", "green", "red")
    assert manifest.similarity is None
    shapes = [tuple(tensor.dims) for tensor in onnx.load(str(zero_shot / "image_encoder.onnx")).graph.initializer]
    assert (64, 32) not in shapes  # the token table
    assert (24, 32) not in shapes  # the text's positions
    text_weights = {name for p in report_of(zero_shot)["passes"] for name in (s["name"] for s in p["sites"])}
    assert "text_encoder" in text_weights
    cut = [name for name in text_weights if name.startswith("text_encoder/")]
    assert cut == []  # cutting what is folded away would cost accuracy and save nothing


def test_retrieval_keeps_two_encoders_and_their_similarity(retriever: Path) -> None:
    manifest = read_manifest(retriever)
    assert manifest.assembly == "dual"
    assert list(manifest.components) == ["image_encoder", "text_encoder"]
    assert manifest.similarity is not None
    metric = report_of(retriever)["result"]["metric"]
    assert metric["name"] == "recall@1"
    assert {"recall@1", "recall@5", "recall@10", "image_to_text_recall@1", "text_to_image_recall@10"} <= set(
        metric["all"]
    )


def test_all_formats_of_a_fused_model_agree(answerer: Path) -> None:
    entry_of = read_manifest(answerer).components["model"]
    assert entry_of.files == {"onnx": "model.onnx", "torchscript": "model.pt", "pt2": "model.pt2"}
    gates = {gate["name"]: gate for gate in report_of(answerer)["gates"]}
    for file in entry_of.files.values():
        assert gates[f"{file} equals the program"]["passed"]
    preprocessor = Preprocessor.load(answerer)
    arrays = preprocessor.images([Image.new("RGB", (32, 32), COLOURS["red"])] * 2)
    arrays |= preprocessor.texts(["what colour is it ?", "is it red ?"])
    feed = {spec.name: torch.from_numpy(np.asarray(arrays[spec.name])) for spec in entry_of.inputs}
    found = [
        open_(answerer / file)(feed)[0]
        for open_, file in zip((open_onnx, open_torchscript, open_pt2), entry_of.files.values(), strict=True)
    ]
    assert found[0].shape == (2, 4)
    assert float((found[0] - found[1]).abs().max()) < 1e-5
    assert torch.equal(found[1], found[2])


def test_the_saved_recipe_makes_the_same_files_again(zero_shot: Path, tmp_path: Path) -> None:
    artifact = zero_shot
    recipe = yaml.safe_load((artifact / "recipe.yaml").read_text())
    assert "skip-branches" not in recipe["passes"]  # the choice is spelled out, so nothing is searched again
    assert Path(recipe["model"]).is_absolute()
    assert entry.run(["optimize", "-q", "--recipe", str(artifact / "recipe.yaml"), "-o", str(tmp_path / "again")]) == 0
    for name in ("image_encoder.onnx", "recipe.yaml", ".work/40-verify/cases.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (artifact / name).read_bytes()
    assert not (tmp_path / "again" / "profile.json").exists()


@pytest.mark.parametrize("fixture", ["classifier", "zero_shot", "answerer"])
def test_run_gives_the_label_that_the_evaluation_counted(
    fixture: str, workshop: Workshop, request: pytest.FixtureRequest, capsys: Capture
) -> None:
    artifact: Path = request.getfixturevalue(fixture)
    kind = read_manifest(artifact).task
    assert kind is not None
    task = workshop.task(kind)
    rows = [json.loads(line) for line in (task / "metadata.jsonl").read_text().splitlines()]
    test = [row for row in rows if row["split"] == "test"]
    words: list[object] = ["run", artifact]
    for row in test:
        words += ["--image", task / row["file_name"]]
        words += ["--text", row["question"]] if fixture == "answerer" else []
    found = run_json(capsys, *words)["results"]
    hits = [result["labels"][0]["label"] == row["colour"] for result, row in zip(found, test, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(report_of(artifact)["result"]["metric"]["optimized"])


def test_run_compares_images_with_texts(retriever: Path, workshop: Workshop, capsys: Capture) -> None:
    image = workshop.task("image-text-retrieval") / "images" / "0060.png"
    found = run_json(capsys, "run", retriever, "--image", image, "--text", "a red square", "--text", "a blue square")
    assert [pair["text"] for pair in found["results"][0]["texts"]] == ["a red square", "a blue square"]


@pytest.mark.parametrize("fixture", ["classifier", "answerer", "retriever"])
def test_verify_passes_on_what_was_just_made(fixture: str, request: pytest.FixtureRequest, capsys: Capture) -> None:
    artifact: Path = request.getfixturevalue(fixture)
    gates = run_json(capsys, "verify", artifact)["gates"]
    assert all(gate["passed"] for gate in gates)
    files = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
    named = {gate["name"].removesuffix(" is unchanged") for gate in gates if gate["name"].endswith(" is unchanged")}
    assert files - named == {"manifest.json", "manifest.sha256"}
    graphs = [gate["name"] for gate in gates if gate["name"].endswith("computes what was recorded")]
    assert len(graphs) == {"classifier": 1, "answerer": 3, "retriever": 2}[fixture]


def test_verify_names_any_file_of_which_one_byte_changed(classifier: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "a copy"
    shutil.copytree(classifier, copy)
    files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    assert len(files) > 12
    for file in files:
        original = file.read_bytes()
        for position in {0, len(original) // 2, len(original) - 1}:
            file.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
            assert entry.run(["verify", "-q", str(copy)]) == 3, file
            shown = capsys.readouterr().err
            assert file.name in shown
            assert shown.count("\n") == 1
        file.write_bytes(original)
    (copy / "report.md").unlink()
    assert entry.run(["verify", "-q", str(copy)]) == 3
    assert "report.md is missing" in capsys.readouterr().err


def test_verify_notices_a_graph_that_computes_something_else(classifier: Path, tmp_path: Path, capsys: Capture) -> None:
    """Even where all hashes were made to fit."""
    copy = tmp_path / "copy"
    shutil.copytree(classifier, copy)
    path = copy / "image_encoder.onnx"
    model = onnx.load(str(path))
    largest = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    largest.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(largest), largest.name))
    onnx.save(model, str(path))
    manifest = json.loads((copy / "manifest.json").read_text())
    data = path.read_bytes()
    manifest["files"][path.name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((copy / "manifest.json").read_bytes()).hexdigest()
    (copy / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    assert entry.run(["verify", "-q", str(copy)]) == 3
    assert "image_encoder.onnx computes what was recorded: found" in capsys.readouterr().err


def test_verify_repeats_the_metric_on_the_task(classifier: Path, colours: Path, capsys: Capture) -> None:
    gates = run_json(capsys, "verify", classifier, "-t", colours)["gates"]
    assert gates[-1] == {
        "name": "accuracy on the test split is as reported, in points",
        "passed": True,
        "found": 0.0,
        "allowed": 0.05,
    }


def test_verify_refuses_a_task_of_another_kind(classifier: Path, workshop: Workshop, capsys: Capture) -> None:
    assert entry.run(["verify", "-q", str(classifier), "-t", str(workshop.task("image-text-retrieval"))]) == 1
    assert "expected image-classification, which the artifact was made for" in capsys.readouterr().err


def test_eval_of_model_and_artifact_are_the_two_numbers_of_the_report(
    clip: Path, classifier: Path, colours: Path, capsys: Capture
) -> None:
    metric = report_of(classifier)["result"]["metric"]
    model = run_json(capsys, "eval", clip, "-t", colours)
    artifact = run_json(capsys, "eval", classifier, "-t", colours)
    assert (model["metric"], model["value"], model["n"]) == ("accuracy", metric["original"], N_IMAGES)
    assert artifact["value"] == artifact["recorded"] == metric["optimized"]
    assert artifact["interval95"] == metric["optimized_interval95"]


def test_bench_measures_every_graph(retriever: Path, capsys: Capture) -> None:
    found = run_json(capsys, "bench", retriever, "--runs", 3, "--threads", 1)
    rows = found["components"]
    is_said = [row["joules"] is not None for row in rows.values()]
    assert is_said == [found["energy"] == COVERS] * 2
    assert report_of(retriever)["result"]["energy"] == found["energy"]
    assert entry.run(["bench", "-q", str(retriever), "--runs", "2"]) == 0
    assert f"{found['energy'][0].upper()}{found['energy'][1:18]}" in capsys.readouterr().out
    assert list(rows) == ["image_encoder", "text_encoder"]
    for name, row in rows.items():
        assert row["runs"] == 3
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["size_bytes"] == (retriever / f"{name}.onnx").stat().st_size


def test_report_prints_one_artifact_or_compares_two(classifier: Path, retriever: Path, capsys: Capture) -> None:
    assert entry.run(["report", str(classifier)]) == 0
    shown = capsys.readouterr().out
    assert "accuracy (%)" in shown
    assert "image_encoder.onnx equals the program" in shown
    assert entry.run(["report", str(classifier), str(retriever)]) == 0
    assert "recall@1" in capsys.readouterr().out
    assert (classifier / "report.md").read_text().startswith("# model clip for colour\n")


def test_inspect_prints_exactly_assembly_components_and_branches(clip: Path, capsys: Capture) -> None:
    found = run_json(capsys, "inspect", clip)
    assert list(found) == ["assembly", "components"]
    assert found["assembly"] == "dual"
    counts = {name: len(part["branches"]) for name, part in found["components"].items()}
    assert counts == {"image_encoder": 6, "text_encoder": 4}
    for component in found["components"].values():
        assert list(component) == ["branches"]
        for branch in component["branches"]:
            assert list(branch) == ["name", "kind", "layer", "params", "macs"]
    first = found["components"]["image_encoder"]["branches"][1]
    assert first["kind"] == "ffn"
    assert first["params"] == 2 * 32 * 64 + 64 + 32 + 2 * 32
    assert first["macs"] == 17 * 2 * 32 * 64


def test_inspect_with_a_task_shows_what_the_task_needs(clip: Path, colours: Path, capsys: Capture) -> None:
    found = run_json(capsys, "inspect", clip, "-t", colours)
    assert (found["assembly"], list(found["components"])) == ("fused", ["image_encoder"])
