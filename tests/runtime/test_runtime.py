from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vlmopt
from tests.emit.toy import dual_program, image_component, text_component, wanted
from tests.runtime.artifacts import fused_program, plain, prompted_program, publish
from vlmopt.core.errors import ArtifactError, TaskError
from vlmopt.graph.similarity import class_embeddings, similarity_logits
from vlmopt.runtime import Model, check_files, load

PROMPTS = ("a red circle", "red", "a blue circle", "blue")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("artifacts")
    made = {
        "dual": publish(dual_program(), top / "dual"),
        "classifier": publish(fused_program(has_text=False), top / "classifier"),
        "answers": publish(fused_program(has_text=True), top / "answers"),
    }
    made["prompted"] = Path(shutil.copytree(made["dual"], top / "prompted"))
    _restate(made["prompted"])
    return made


def _restate(folder: Path) -> None:
    from vlmopt.emit import build_manifest, write_manifest

    emitted = {name: {"onnx": f"{name}.onnx"} for name in ("image_encoder", "text_encoder")}
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    write_manifest(build_manifest(prompted_program(), emitted, folder, files=files, prompts=PROMPTS), folder)


def expected_similarity(
    model: Model, images: list[object], texts: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(model.preprocessor.images(images)["pixel_values"])  # type: ignore[arg-type]
    arrays = model.preprocessor.texts(texts)
    tokens = tuple(torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask"))
    return wanted(image_component(), (pixels,)), wanted(text_component(), tokens)


def test_similarity_of_two_encoders_is_that_of_the_program(folders: dict[str, Path]) -> None:
    model = load(folders["dual"], threads=1)
    images = [plain("red"), plain("blue"), plain("green")]
    image, text = expected_similarity(model, images, PROMPTS[:2])
    similarity = dual_program().similarity
    assert similarity is not None
    expected = similarity_logits(image, text, similarity).numpy()
    found = model.similarity(images, PROMPTS[:2])
    assert found.shape == (3, 2)
    assert np.abs(found - expected).max() <= 1e-5
    assert np.array_equal(model(images=images, texts=PROMPTS[:2]), found)


def test_one_half_of_two_encoders_gives_its_embeddings(folders: dict[str, Path]) -> None:
    model = load(folders["dual"], threads=1)
    image, text = expected_similarity(model, [plain("red")], PROMPTS)
    assert np.abs(model(images=[plain("red")]) - image.numpy()).max() <= 1e-5
    assert np.abs(model(texts=PROMPTS) - text.numpy()).max() <= 1e-5


def test_more_images_than_a_batch_come_out_in_order(folders: dict[str, Path]) -> None:
    model = load(folders["classifier"], threads=1)
    colours = ["red", "green", "lime", "blue"] * 18
    found = [rows[0][0] for rows in model.classify([plain(colour) for colour in colours])]
    assert found == [{"lime": "green"}.get(colour, colour) for colour in colours]


def test_prompts_classify_where_the_text_encoder_stayed(folders: dict[str, Path]) -> None:
    model = load(folders["prompted"], threads=1)
    images = [plain("red"), plain("navy")]
    image, text = expected_similarity(model, images, PROMPTS)
    similarity = prompted_program().similarity
    assert similarity is not None
    logits = similarity_logits(image, class_embeddings(text, 2), similarity)
    expected = torch.softmax(logits.double(), dim=-1).numpy()
    for row, scores in zip(expected, model.classify(images), strict=True):
        assert dict(scores) == pytest.approx({"red": row[0], "blue": row[1]}, abs=1e-5)
        assert scores[0][1] >= scores[1][1]


def test_labels_come_with_probabilities_the_most_probable_first(folders: dict[str, Path], tmp_path: Path) -> None:
    plain("blue").save(tmp_path / "b.png")
    (scores,) = load(folders["classifier"], threads=1)(images=[tmp_path / "b.png"])
    assert [label for label, _ in scores] == ["blue", "red", "green"]
    assert sum(probability for _, probability in scores) == pytest.approx(1.0, abs=1e-12)
    assert scores[0][1] == pytest.approx(np.exp(1) / (np.exp(1) + 2 * np.exp(-1)), abs=1e-6)


def test_questions_are_answered_one_image_with_several_or_the_other_way_round(folders: dict[str, Path]) -> None:
    model = load(folders["answers"], threads=1)
    both = model.answer([plain("red")], ["what colour", "what colour a circle"])
    assert [rows[0][0] for rows in both] == ["red", "red"]
    assert both[0][0][1] == both[1][0][1]  # padded to one length
    found = model(images=[plain("red"), plain("blue")], texts=["what colour"])
    assert [rows[0][0] for rows in found] == ["red", "blue"]
    with pytest.raises(ArtifactError, match="inputs: 2 images and 3 texts"):
        model.answer([plain("red")] * 2, ["what"] * 3)


def test_raw_outputs_are_named_and_their_inputs_checked(folders: dict[str, Path]) -> None:
    model = load(folders["dual"], threads=1)
    ids = np.ones((2, 5), dtype=np.int64)
    outputs = model.outputs("text_encoder", {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids})
    assert {name: value.shape for name, value in outputs.items()} == {"text_embeds": (2, 8)}
    bad: list[tuple[dict[str, np.ndarray], str]] = [
        ({"input_ids": ids}, r"input attention_mask of text_encoder: is missing \(given: input_ids\)"),
        ({"input_ids": ids, "attention_mask": ids.astype(np.int32)}, "attention_mask .*: is int32; expected int64"),
        ({"input_ids": ids[0], "attention_mask": ids}, r"has shape \[5\]; expected \[batch, text\]"),
        ({"input_ids": ids, "attention_mask": ids[:, :3]}, "has 3 as its text; expected 5, as input_ids"),
        ({name: np.ones((2, 17), dtype=np.int64) for name in ("input_ids", "attention_mask")}, "text from 2 to 16"),
    ]
    for feed, message in bad:
        with pytest.raises(ArtifactError, match=message):
            model.outputs("text_encoder", feed)
    with pytest.raises(ArtifactError, match="has no graph 'decoder'; expected image_encoder, text_encoder"):
        model.outputs("decoder", {})


def test_a_text_shorter_or_longer_than_the_graph_takes_is_fitted(folders: dict[str, Path]) -> None:
    found = load(folders["dual"], threads=1).similarity([plain("red")], ["red " * 40, ""])
    assert np.isfinite(found).all()


def test_calls_that_do_not_fit_the_artifact_say_what_it_takes(folders: dict[str, Path]) -> None:
    with pytest.raises(ArtifactError, match="nothing to run on; expected images, texts, or both"):
        load(folders["dual"])()
    with pytest.raises(ArtifactError, match="no graph takes images alone; expected model: pixel_values, input_ids"):
        load(folders["answers"]).classify([plain("red")])
    with pytest.raises(ArtifactError, match="is fused; expected an artifact of two encoders"):
        load(folders["answers"]).similarity([plain("red")], ["red"])
    with pytest.raises(ArtifactError, match="has no labels"):
        load(folders["dual"]).classify([plain("red")])
    with pytest.raises(TaskError, match=r"gone\.png: does not exist"):
        load(folders["classifier"]).classify(["gone.png"])
    with pytest.raises(ArtifactError, match="NoSuchProvider is not available; expected one of .*CPUExecutionProvider"):
        load(folders["classifier"], providers=["NoSuchProvider"]).classify([plain("red")])


def test_a_missing_a_cut_and_a_changed_file_are_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["classifier"], tmp_path / "a"))
    assert check_files(folder) == []
    graph = folder / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"model\.onnx: has \d+ bytes, not \d+: the artifact is damaged"):
        load(folder)
    graph.write_bytes(bytes(len(content)))
    assert [line.split(":")[0] for line in check_files(folder)] == ["model.onnx"]
    with pytest.raises(ArtifactError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        load(folder).classify([plain("red")])
    graph.unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx: is missing"):
        load(folder)
    with pytest.raises(ArtifactError, match="is no directory"):
        load(tmp_path / "nowhere")


def test_a_graph_that_was_not_emitted_as_onnx_is_explained(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["classifier"], tmp_path / "a"))
    manifest = (folder / "manifest.json").read_text(encoding="utf-8")
    (folder / "manifest.json").write_text(manifest.replace('"onnx": "model.onnx"', '"torchscript": "model.pt"'))
    with pytest.raises(ArtifactError, match="holds model as torchscript only; emit it with --emit onnx"):
        load(folder).classify([plain("red")])


def test_running_an_artifact_on_arrays_needs_neither_torch_nor_transformers(folders: dict[str, Path]) -> None:
    script = f"""
import sys
import vlmopt
assert "onnxruntime" not in sys.modules
model = vlmopt.load({str(folders["dual"])!r}, threads=1)
import numpy as np
model.outputs("image_encoder", {{"pixel_values": np.zeros((1, 3, 16, 16), dtype=np.float32)}})
print(sorted(set(sys.modules) & {{"torch", "transformers", "onnx"}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_load_is_reachable_from_the_package() -> None:
    assert vlmopt.load is load
