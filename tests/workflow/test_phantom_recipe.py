"""A recipe with phantom dimensions and a preference: trained, emitted, checked in its own runtime, and its control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import toys
from vlmopt.capture import capture
from vlmopt.cli import entry
from vlmopt.core.errors import ArtifactError
from vlmopt.preprocess import Preprocessor
from vlmopt.prompting import Prompter
from vlmopt.recipe.loading import load_recipe
from vlmopt.runtime import load
from vlmopt.runtime.generation import Decoding, Prompt


@pytest.mark.slow
def test_a_recipe_trains_phantom_dimensions_by_preference_and_reports_the_modules_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, task, out = toys.write_model("llava_llama", tmp_path / "model"), tmp_path / "triples", tmp_path / "out"
    source = toys.write_task(tmp_path / "task", "image-text-to-text", n=9)
    assert entry.run(["triples", "-q", "-m", str(model), "-t", str(source), "-o", str(task)]) == 0
    phantom = {"insert-phantom": {"eta": 0.2, "branches": ["decoder_model_merged/*"]}}
    recovery: dict[str, Any] = {"level": "adapters", "epochs": 1, "preference": 1.0, "learning_rate": 0.01}
    content = {"model": str(model), "task": str(task), "passes": ["canonicalize", phantom], "recovery": recovery}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**content, "emit": ["onnx"]}))
    capsys.readouterr()
    assert entry.run(["optimize", "-q", "--json", "--recipe", str(recipe), "-o", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    metric = report["result"]["metric"]
    assert metric["removed"]["what"] == "phantom modules"
    assert metric["removed"]["drop_points"] == pytest.approx(100 * (metric["optimized"] - metric["removed"]["value"]))
    assert report["recovery"]["n_trainable"] == 3 * (12 * 8**2 + 2 * (8 + 1) + 1)
    assert all(gate["passed"] for gate in report["gates"])
    assert "With the phantom modules removed it is" in (out / "report.html").read_text(encoding="utf-8")
    again = load_recipe(out / "recipe.yaml")
    assert again.recovery.preference == 1.0
    assert again.passes[1].options == phantom["insert-phantom"]
    names = [spec["name"] for spec in json.loads((out / "manifest.json").read_text())["components"][
        "decoder_model_merged"]["inputs"]]  # fmt: skip
    assert [name for name in names if name.endswith("query")] == [f"past_key_values.{i}.query" for i in range(3)]
    assert entry.run(["eval", "-q", "--json", str(out), "-t", str(task)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["value"] == found["recorded"]
    assert entry.run(["verify", "-q", str(out)]) == 0


@pytest.mark.slow
def test_a_recipe_takes_constants_of_the_first_token_and_the_artifact_answers_no_other_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = toys.write_model("llava_llama", tmp_path / "model"), tmp_path / "out"
    task = toys.write_task(tmp_path / "task", "image-text-to-text", n=9)
    generation = capture(str(model)).generation
    assert generation is not None
    prompter = Prompter.of(Preprocessor.load(model), generation)
    token = prompter.encode("what colour is this?", 1)[0]
    phantom = {"insert-phantom": {"eta": 0.2, "branches": ["decoder_model_merged/*"]}}
    passes = ["canonicalize", phantom, {"freeze-first-token": {"token": token}}, "fold-constants"]
    recovery = {"level": "adapters", "epochs": 1, "learning_rate": 0.01}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(model), "task": str(task), "passes": passes, "recovery": recovery}))
    assert entry.run(["optimize", "-q", "--json", "--recipe", str(recipe), "-o", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["n_applied"] for one in report["passes"]][2] == 3
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["generation"]["first_token"] == token
    names = [one["name"] for one in manifest["components"]["decoder_model_merged"]["inputs"]]
    assert not any(name.endswith("query") for name in names)
    assert all(gate["passed"] for gate in report["gates"])
    assert entry.run(["verify", "-q", str(out)]) == 0
    answerer = load(out)
    entered = answerer.manifest.generation
    assert entered is not None
    with pytest.raises(ArtifactError, match=f"begins with token 5; expected token {token}, of which the artifact"):
        Decoding(answerer._session, entered, [Prompt((5, token))], stop_tokens=frozenset())
