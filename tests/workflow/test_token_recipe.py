"""Recipes that leave fewer tokens of an image: planned behind it, emitted, verified, judged and answered with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests import toys
from tests.conftest import Workshop
from tests.workflow.answerer import QUESTION, write_answerer
from tests.workflow.test_generative import N_ITEMS
from vlmopt.cli import entry
from vlmopt.core.manifest import read_manifest
from vlmopt.prompting import Prompter
from vlmopt.runtime import load


@pytest.fixture(scope="module")
def task(workshop: Workshop) -> Path:
    return workshop.folder("asked", lambda path: toys.write_task(path, "image-text-to-text", n=N_ITEMS))


@pytest.fixture(scope="module")
def model(workshop: Workshop, task: Path) -> Path:
    return workshop.folder("answerer", lambda path: write_answerer(path, task))


def made(folder: Path, passes: list[Any], model: Path, task: Path, **more: Any) -> Path:
    recipe, out = folder / "recipe.yaml", folder / "out"
    content = {"model": str(model), "task": str(task), "passes": passes, **more}
    recipe.write_text(yaml.safe_dump(content))
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(out)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "budgets"), [("pool", {"max_drop": 20}), ("select-positions", {}), ("merge", {})], ids=str
)
def test_an_artifact_with_fewer_tokens_answers_and_is_verified(
    tmp_path: Path, model: Path, task: Path, method: str, budgets: dict[str, Any]
) -> None:
    pruning: dict[str, Any] = {"prune-tokens": {"keep": 4, "method": method}}
    cut: list[Any] = ["skip-branches"] if budgets else []
    out = made(tmp_path, ["canonicalize", pruning, *cut, "fold-constants"], model, task, budgets=budgets)
    report, manifest = json.loads((out / "report.json").read_text()), read_manifest(out)
    assert manifest.generation is not None
    assert (manifest.generation.image_tokens, manifest.generation.processor_tokens) == (4, 16)
    assert manifest.components["vision_encoder"].outputs[0].shape[1] == 4
    assert all(gate["passed"] for gate in report["gates"])
    assert any("have to write 4 tokens of an image" in line for line in report["warnings"])
    assert report["result"]["metric"]["original"] > 0.9
    answerer = load(out, threads=1)
    answers = [answerer.generate(QUESTION, Image.new("RGB", (32, 32), value)) for value in toys.COLOURS.values()]
    assert len({answer.n_prompt_tokens for answer in answers}) == 1
    whole = Prompter(answerer.preprocessor, manifest.generation.image_token, 16).encode(QUESTION, 1)
    assert answers[0].n_prompt_tokens == len(whole) - 12
    assert entry.run(["verify", "-q", str(out), "-t", str(task)]) == 0
    assert entry.run(["optimize", "-q", "--recipe", str(out / "recipe.yaml"), "-o", str(tmp_path / "again")]) == 0
    for name in manifest.components:
        files = [folder / "onnx" / f"{name}.onnx" for folder in (out, tmp_path / "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_how_many_tokens_is_part_of_one_plan(tmp_path: Path, model: Path, task: Path) -> None:
    """Of several steps for one encoder it takes one; the recipe names what it leaves fewer of, and makes the same."""
    pruning = [{"prune-tokens": {"keep": keep, "method": "pool"}} for keep in (4, 1)]
    passes: list[Any] = ["canonicalize", *pruning, "fold-constants"]
    out = made(tmp_path, passes, model, task, planning="together", budgets={"max_drop": 20})
    report, recipe = json.loads((out / "report.json").read_text()), yaml.safe_load((out / "recipe.yaml").read_text())
    (step,) = (step["prune-tokens"] for step in recipe["passes"] if isinstance(step, dict))
    assert step["tokens"] == ["vision_encoder/tokens"]
    assert step["keep"] == read_manifest(out).generation.image_tokens  # type: ignore[union-attr]
    (kind,) = report["together"]["kinds"]
    assert (kind["name"], kind["n_sites"]) == ("prune-tokens", 1)
    assert 0 < kind["saved_latency"] < report["together"]["whole_us"]
    assert report["together"]["predicted_us"] < report["together"]["whole_us"]
    assert entry.run(["optimize", "-q", "--recipe", str(out / "recipe.yaml"), "-o", str(tmp_path / "again")]) == 0
    for name in read_manifest(out).components:
        files = [folder / "onnx" / f"{name}.onnx" for folder in (out, tmp_path / "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("pattern", ["decoder/*", "vision_encoder/layers"])
def test_tokens_that_there_are_none_of_are_named(
    tmp_path: Path, model: Path, task: Path, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, passes = tmp_path / "recipe.yaml", ["canonicalize", {"prune-tokens": {"keep": 4, "tokens": [pattern]}}]
    recipe.write_text(yaml.safe_dump({"model": str(model), "task": str(task), "passes": passes}))
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) != 0
    error = capsys.readouterr().err.strip()
    assert f"prune-tokens: tokens: {pattern!r} matches nothing" in error
    assert not (tmp_path / "out").exists()
