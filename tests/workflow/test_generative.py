"""The whole pipeline on a model that writes its answers: profile, plan, cut, train, emit, judge, and what follows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests import toys
from tests.conftest import Workshop
from tests.workflow.answerer import QUESTION, write_answerer
from vlmopt.cli import entry
from vlmopt.core.manifest import read_manifest
from vlmopt.runtime import load

N_ITEMS = 48  # of every split
ATTENTION = "decoder_model_merged/model.language_model.layers.1.self_attn"


@pytest.fixture(scope="module")
def task(workshop: Workshop) -> Path:
    return workshop.folder("asked", lambda path: toys.write_task(path, "image-text-to-text", n=N_ITEMS))


@pytest.fixture(scope="module")
def model(workshop: Workshop, task: Path) -> Path:
    return workshop.folder("answerer", lambda path: write_answerer(path, task))


@pytest.fixture(scope="module")
def artifact(workshop: Workshop, model: Path, task: Path) -> Path:
    """Cut as far as five points of drop allow."""

    def make(path: Path) -> None:
        given = ["-m", str(model), "-t", str(task), "-o", str(path), "--max-drop", "5"]
        assert entry.run(["optimize", "-q", *given]) == 0

    return workshop.folder("answers cut", make)


def report_of(artifact: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((artifact / "report.json").read_text())
    return found


def test_answers_are_written_and_judged_as_texts(artifact: Path) -> None:
    metric = report_of(artifact)["result"]["metric"]
    assert metric["name"] == "exact-match"
    assert metric["n"] == N_ITEMS
    assert metric["original"] > 0.9
    assert metric["optimized"] >= metric["original"] - 0.05
    assert {"anls", "token-f1"} <= metric["all"].keys()


def test_branches_of_tower_and_decoder_are_profiled_and_cut(artifact: Path) -> None:
    branches = report_of(artifact)["branches"]
    assert {branch["component"] for branch in branches} == {"vision_encoder", "decoder_model_merged"}
    assert len(branches) == 10
    cut = [branch for branch in branches if not branch["kept"]]
    assert cut
    profile = json.loads((artifact / "profile.json").read_text())
    assert {score["component"] for score in profile["scores"]} == {"vision_encoder", "decoder_model_merged"}
    gone = {
        branch["name"] for branch in cut if branch["kind"] == "attention" and branch["component"] != "vision_encoder"
    }
    manifest = read_manifest(artifact)
    assert manifest.generation is not None
    assert {f"model.language_model.layers.{layer}.self_attn" for layer in range(3)} - gone == {
        f"model.language_model.layers.{layer}.self_attn" for layer in manifest.generation.cache_layers
    }


def test_what_a_token_costs_is_reported(artifact: Path) -> None:
    result = report_of(artifact)["result"]
    entries = {side: result["cost"][side]["kv_cache_bytes_per_token"] for side in ("original", "optimized")}
    manifest = read_manifest(artifact)
    assert manifest.generation is not None
    of_a_layer = 2 * 2 * 8 * 4  # keys and values, heads, width of a head, bytes
    assert entries == {"original": 3 * of_a_layer, "optimized": len(manifest.generation.cache_layers) * of_a_layer}
    assert result["latency_ms"].keys() == {"vision_encoder", "embed_tokens", "decoder_model_merged", "next_token"}


def test_the_artifact_answers(artifact: Path) -> None:
    for colour, value in toys.COLOURS.items():
        assert load(artifact, threads=1).generate(QUESTION, Image.new("RGB", (32, 32), value)).text == colour


def test_it_is_verified_again_evaluated_and_rechecked(
    artifact: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.run(["verify", "-q", str(artifact), "-t", str(task)]) == 0
    capsys.readouterr()
    assert entry.run(["eval", "-q", str(artifact), "-t", str(task), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["value"] == report_of(artifact)["result"]["metric"]["optimized"]
    assert entry.run(["recheck", "-q", str(artifact), "-t", str(task), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metric"]["drop_points"] == pytest.approx(again["metric"]["drop_points_when_made"])


@pytest.mark.slow
def test_the_recipe_of_the_run_makes_the_same_graphs(artifact: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert entry.run(["optimize", "-q", "--recipe", str(artifact / "recipe.yaml"), "-o", str(again)]) == 0
    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        file = f"onnx/{name}.onnx"
        assert (again / file).read_bytes() == (artifact / file).read_bytes()


def test_weights_are_trained_on_the_answers(model: Path, task: Path, tmp_path: Path) -> None:
    cuts = ["model.language_model.layers.0.self_attn", "model.language_model.layers.0.mlp"]
    recipe = {
        "model": str(model),
        "task": str(task),
        "passes": ["canonicalize", {"skip-branches": {"branches": [f"decoder_model_merged/{name}" for name in cuts]}}],
        "recovery": {"level": "weights", "epochs": 3, "learning_rate": 3e-3, "batch_items": 16},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    assert entry.run(["optimize", "-q", "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(out)]) == 0
    history = report_of(out)["recovery"]["epochs"]
    assert history[0]["validation_score"] < 0.6  # what the cut lost
    assert report_of(out)["result"]["metric"]["optimized"] > history[0]["validation_score"] + 0.2


@pytest.mark.parametrize("kind", ["image-captioning", "image-classification"])
def test_other_tasks_of_such_a_model(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"prompt": QUESTION} if kind == "image-captioning" else {}
    task = toys.write_task(tmp_path / "other", kind, n=6, **fields)
    code = entry.run(["eval", "-q", str(model), "-t", str(task), "--json"])
    shown = capsys.readouterr()
    if kind == "image-captioning":
        assert code == 0
        assert {"cider-d", "corpus_bleu-4"} <= json.loads(shown.out)["all"].keys()
    else:
        assert code == 1
        assert "writes text" in shown.err or "image-text-to-text" in shown.err


def test_a_recovery_that_it_has_no_head_for_is_refused_at_once(
    model: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["optimize", "-q", "-m", str(model), "-t", str(task), "-o", str(tmp_path / "out"), "--max-drop", "5"]
    assert entry.run([*given, "--recover", "closed-form"]) == 1
    shown = capsys.readouterr().err
    assert (
        "closed-form fits a head to the task, and LlavaForConditionalGeneration, which writes text, has none" in shown
    )
    assert not (tmp_path / "out").exists()


def test_an_artifact_without_onnx_says_that_it_cannot_answer(
    artifact: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    content = json.loads((copy / "manifest.json").read_text())
    for entry_ in content["components"].values():
        entry_["files"] = {"pt2": "gone.pt2"}
    (copy / "manifest.json").write_text(json.dumps(content))
    assert entry.run(["eval", "-q", str(copy), "-t", str(task)]) == 1
    assert "as pt2 only, and answers are written by ONNX Runtime; emit it with --emit onnx" in capsys.readouterr().err


def test_a_faulty_site_is_found(model: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"model": str(model), "task": str(task), "passes": [{"skip-branches": {"branches": [ATTENTION]}}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert entry.run(["bisect", "-q", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "found")]) == 0
    assert "nothing is bad" in capsys.readouterr().out
