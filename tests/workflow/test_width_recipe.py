"""Recipes that prune widths: measured on the task, emitted, right in their own runtime, cached decoding included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests import toys
from vlmopt.cli import entry


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["decoder_model_merged/*", "decoder_model_merged/*layers.1.*"])
def test_a_decoder_of_fewer_heads_is_emitted_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], heads: str
) -> None:
    model, out = toys.write_model("llava_llama", tmp_path / "model"), tmp_path / "out"
    task = toys.write_task(tmp_path / "task", "image-text-to-text", n=9)
    passes = ["canonicalize", {"prune-ffn": {"keep": 0.5}}, {"prune-heads": {"keep": 0.5, "branches": [heads]}}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(model), "task": str(task), "passes": passes, "emit": ["onnx"]}))
    assert entry.run(["optimize", "-q", "--json", "--recipe", str(recipe), "-o", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    n_layers = 3 if heads.endswith("merged/*") else 1
    assert [one["n_applied"] for one in report["passes"]] == [report["passes"][0]["n_applied"], 5, n_layers]
    assert all(gate["passed"] for gate in report["gates"])
    shapes = {
        spec["name"]: spec["shape"][1]
        for spec in json.loads((out / "manifest.json").read_text())["components"]["decoder_model_merged"]["inputs"]
        if spec["name"].endswith("key")
    }
    assert list(shapes.values()) == ([1, 1, 1] if n_layers == 3 else [2, 1, 2])
    configuration = json.loads((out / "config.json").read_text())
    assert ("transformers.js_config" in configuration) == (n_layers == 3)
    assert configuration["text_config"]["num_key_value_heads"] == (1 if n_layers == 3 else 2)
    assert entry.run(["verify", "-q", str(out)]) == 0
