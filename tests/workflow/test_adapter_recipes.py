"""Recipes that skip, insert adapters and fold them run through to files in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from vlmopt.cli import entry

Capture = pytest.CaptureFixture[str]
SKIPPED = {"skip-branches": {"branches": ["vision_model.encoder.layers.[12].self_attn"]}}


def recipe_of(clip: Path, folder: Path, *passes: object, **more: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(clip), "passes": list(passes), **more}))
    return path


@pytest.mark.slow
def test_adapters_are_inserted_and_folded_and_the_fold_error_is_reported(
    clip: Path, tmp_path: Path, capsys: Capture
) -> None:
    eas = {"insert-skip-adapter": {"kind": "eas", "rank": 4, "init": "paper"}}
    beside = {"insert-adaptation-adapter": {"rank": 4, "branches": ["text_encoder/*"]}}
    passes = ("canonicalize", SKIPPED, eas, beside, "fold-skip-adapter")
    recipe = recipe_of(clip, tmp_path, *passes, emit=["onnx", "torchscript", "pt2"])
    out = tmp_path / "out"
    assert entry.run(["optimize", "-q", "--json", "--recipe", str(recipe), "-o", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    gates = {gate["name"]: gate for gate in report["gates"]}
    fold = gates["5 fold-skip-adapter is close"]
    assert fold["passed"]
    assert 0.0 < fold["found"] <= fold["allowed"] == 1e-5
    assert {name for name, gate in gates.items() if not gate["passed"]} == set()
    steps = {step["name"]: step for step in report["passes"]}
    assert steps["insert-skip-adapter"]["counted"]["parameters"] == -2 * (2 * 32 * 4 + 4 + 32)
    assert steps["fold-skip-adapter"]["counted"]["parameters"] == 2 * (2 * 32 * 4 + 4 + 32)
    assert all(step["predicted"] == step["counted"] for step in steps.values())


def test_mixtures_that_were_trained_are_reported_though_they_are_folded_afterwards(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    lily = {"kind": "lily", "rank": 2, "stride": 2, "experts": 3, "modules": ["image_encoder/*fc1"]}
    passes = ("canonicalize", {"insert-low-rank-adapter": lily}, "fold-adapters")
    recovery = {"level": "adapters", "epochs": 2, "batch_items": 8, "learning_rate": 0.05}
    more = {"task": str(colours), "recovery": recovery, "verify": {"max_drop_gate": False}}
    recipe = recipe_of(clip, tmp_path, *passes, **more)
    out = tmp_path / "out"
    assert entry.run(["optimize", "-q", "--json", "--recipe", str(recipe), "-o", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    n = report["passes"][2]["n_applied"]
    mixtures = report["mixtures"]
    assert len(mixtures) == n > 1
    assert not any(one["is_routed"] for one in mixtures)
    assert all(abs(sum(one["shares"]) - 1) < 1e-9 and len(one["shares"]) == 3 for one in mixtures)
    assert all(max(one["shares"]) - min(one["shares"]) > 1e-3 for one in mixtures)


def test_folding_before_inserting_is_refused_before_anything_is_loaded(
    clip: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = recipe_of(clip, tmp_path, "fold-skip-adapter", SKIPPED, "insert-skip-adapter")
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "'fold-skip-adapter' requires 'adapters-inserted'" in shown
    assert not (tmp_path / "out").exists()


def test_a_misspelled_kind_is_refused_in_one_line(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = recipe_of(clip, tmp_path, SKIPPED, {"insert-skip-adapter": {"kind": "bottelneck"}})
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "option 'kind' is 'bottelneck'" in shown
    assert "bottleneck" in shown
