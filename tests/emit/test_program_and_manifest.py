from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.emit.toy import dual_program
from vlmopt.core.errors import ArtifactError, EmitError
from vlmopt.core.manifest import GateEntry, content_problems, read_manifest, sha256_of, size_problems
from vlmopt.core.progress import Silent
from vlmopt.emit import build_manifest, emit_program, write_manifest


def test_every_component_is_written_in_every_format_asked_for(tmp_path: Path) -> None:
    names = emit_program(dual_program(), ("torchscript", "pt2"), tmp_path, progress=Silent())
    assert names == {
        name: {"torchscript": f"{name}.pt", "pt2": f"{name}.pt2"} for name in ("image_encoder", "text_encoder")
    }
    assert len(list(tmp_path.iterdir())) == 4


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        EmitError, match="emit: unknown format 'tflite'; expected one of onnx, torchscript, pt2, openvino, executorch"
    ):
        emit_program(dual_program(), ("onnx", "tflite"), tmp_path, progress=Silent())
    assert list(tmp_path.iterdir()) == []


def made(folder: Path) -> None:
    for name in ("image_encoder.onnx", "sub/note.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    manifest = build_manifest(
        dual_program(),
        {"image_encoder": {"onnx": "image_encoder.onnx"}},
        folder,
        files=[path for path in folder.rglob("*") if path.is_file()],
        task="image-text-retrieval",
        metric="r@1",
        seed=7,
        gates=[GateEntry(name="artifact = program", passed=True, found=1e-7, allowed=1e-4)],
    )
    write_manifest(manifest, folder)


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    made(tmp_path)
    manifest = read_manifest(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["schema"] == 1
    assert manifest.assembly == "dual"
    assert manifest.similarity is not None
    assert manifest.similarity.scale == 4.0
    assert manifest.components["text_encoder"].inputs[0].shape == ("batch", "text")
    assert manifest.dims["text"].maximum == 16
    assert manifest.seed == 7
    assert manifest.gates[0].allowed == 1e-4
    assert set(manifest.files) == {"image_encoder.onnx", "sub/note.txt"}
    assert manifest.files["sub/note.txt"].sha256 == sha256_of(tmp_path / "sub" / "note.txt")
    assert {"python", "torch", "onnx", "onnxruntime"} <= set(manifest.versions)
    assert manifest.created.endswith("+00:00")
    assert manifest.machine.cores >= 1


def test_one_changed_byte_is_found_by_content_and_a_lost_byte_by_size(tmp_path: Path) -> None:
    made(tmp_path)
    files = read_manifest(tmp_path).files
    assert content_problems(tmp_path, files) == []
    (tmp_path / "image_encoder.onnx").write_bytes(b"Image_encoder.onnx")
    assert size_problems(tmp_path, files) == []
    (line,) = content_problems(tmp_path, files)
    assert line.startswith("image_encoder.onnx: was changed (sha256 ")
    (tmp_path / "image_encoder.onnx").write_bytes(b"mage_encoder.onnx")
    assert size_problems(tmp_path, files) == ["image_encoder.onnx: has 17 bytes, not 18"]
    (tmp_path / "sub" / "note.txt").unlink()
    assert "sub/note.txt: is missing" in content_problems(tmp_path, files)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"manifest\.json: Invalid JSON"),
        ('{"schema": 1}', r"manifest\.json: vlmopt; Field required|manifest\.json: vlmopt: Field required"),
        ('{"schema": 2}', r"manifest\.json: schema: Input should be 1"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_with_its_entry(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no manifest\.json; expected a directory written by"):
        read_manifest(tmp_path)
    with pytest.raises(ArtifactError, match="is no directory"):
        read_manifest(tmp_path / "nowhere")
