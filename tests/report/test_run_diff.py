"""Differences between two runs are all named, and nothing is called different that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.report import sample
from vlmopt.cli import entry
from vlmopt.core.errors import ArtifactError
from vlmopt.report.graph_diff import text_diff
from vlmopt.report.run_diff import diff_runs

Capture = pytest.CaptureFixture[str]
Change = Callable[[dict[str, Any]], None]
RECIPE = {
    "model": "m",
    "budgets": {"max_drop": 1.0},
    "passes": ["canonicalize", {"skip-branches": {"branches": ["a"]}}],
}
GRAPH = """component image_encoder
%0: float32[batch, 4] = input x
%1: float32[batch, 4] = linear fc1 (%0)
%2: float32[batch, 4] = relu (%1)
%3: float32[batch, 4] = linear fc2 (%2)
%4: float32[batch, 4] = sigmoid (%3)
%5: float32[batch, 4] = add.Tensor (%4, %0)
return [%5]
"""
CUT = """component image_encoder
%0: float32[batch, 4] = input x
%1: float32[batch, 4] = linear fc2 (%0)
%2: float32[batch, 4] = sigmoid (%1)
%3: float32[batch, 4] = add.Tensor (%2, %0)
return [%3]
"""


def write_run(
    folder: Path, change: Change = lambda report: None, *, recipe: dict[str, Any] = RECIPE, graph: str = ""
) -> Path:
    folder.mkdir()
    report = sample.report()
    change(report)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if graph:
        for number, text in ((1, "component image_encoder\n"), (2, graph)):
            step = folder / ".work" / "20-passes" / f"{number:02d}-pass"
            step.mkdir(parents=True)
            (step / "image_encoder.after.txt").write_text(text)
    return folder


def rows(found: dict[str, Any], section: str) -> list[tuple[Any, ...]]:
    return [(row["what"], row["first"], row["second"]) for row in found["differences"][section]]


def test_equal_runs_have_no_differences(tmp_path: Path, capsys: Capture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    found = diff_runs(a, b, graphs=True)
    assert [name for name, section in found["differences"].items() if section] == []
    assert found["graphs"] == {}
    assert entry.run(["diff", str(a), str(b)]) == 0
    assert "the runs do not differ but in what was measured" in capsys.readouterr().out


def test_two_tasks_differ_in_how_layers_mix_their_experts(tmp_path: Path) -> None:
    def mixed(*shares: float) -> dict[str, Any]:
        own = {"component": "decoder", "is_routed": True, "spread": [0.0, 0.0]}
        return {"mixtures": [{**own, "layer": "up", "shares": shares}, {**own, "layer": "down", "shares": [0.5, 0.5]}]}

    a = write_run(tmp_path / "a", lambda report: report.update(mixed(0.25, 0.75)))
    b = write_run(tmp_path / "b", lambda report: report.update(mixed(1.0, 0.0)))
    assert rows(diff_runs(a, b), "mixtures") == [("decoder/up", "25.0 75.0 %", "100.0 0.0 %")]


def test_every_kind_of_difference_is_named(tmp_path: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        report["passes"][0]["sites"] = [{"name": "image_encoder/layers.1.ffn", "component": "image_encoder"}]
        folded = {**report["passes"][0], "name": "fold-constants"}
        report["passes"].append({**folded, "step": 2, "sites": []})
        report["passes"].append({**folded, "step": 3, "name": "fold-fixed-inputs"})
        report["branches"][0]["kept"], report["branches"][1]["kept"] = True, False
        report["gates"][0]["passed"] = False
        report["result"]["cost"]["optimized"]["macs"] = 7
        report["result"]["size_bytes"]["optimized"] = 11
        report["result"]["metric"]["optimized"] = 0.5
        report["result"]["latency_ms"]["image_encoder"]["optimized"]["median_ms"] = 9.0
        report["vlmopt"] = "9.9"
        report["model"]["fingerprint"] = "ef" * 32

    other = {**RECIPE, "budgets": {"max_drop": 2.0}, "passes": [{"skip-branches": {"branches": ["b"]}}], "seed": 3}
    found = diff_runs(write_run(tmp_path / "a"), write_run(tmp_path / "b", change, recipe=other))
    assert rows(found, "recipe") == [
        ("budgets.max_drop", 1.0, 2.0),
        ("passes.1", "canonicalize", "skip-branches"),
        ("passes.2", "skip-branches", None),
        ("passes.2.branches", ["a"], None),
        ("passes.1.branches", None, ["b"]),
        ("seed", None, 3),
    ]
    assert rows(found, "sites") == [
        ("skip-branches: image_encoder/layers.0.ffn", "applied", None),
        ("skip-branches: image_encoder/layers.1.ffn", None, "applied"),
        ("fold-constants", None, "0 sites"),
        ("fold-fixed-inputs", None, "1 site"),
    ]
    assert rows(found, "branches") == [
        ("image_encoder/layers.0.ffn", "cut", "kept"),
        ("image_encoder/layers.1.ffn", "kept", "cut"),
    ]
    assert rows(found, "gates") == [("max drop", "passed", "FAILED")]
    assert rows(found, "cost") == [("macs", 500_000_000, 7), ("file_bytes", 22_000_000, 11)]
    assert ("vlmopt", sample.report()["vlmopt"], "9.9") in rows(found, "environment")
    assert rows(found, "model and task") == [("weights", "ab" * 6, "ef" * 6)]
    quality = {row["what"]: (row["first"]["value"], row["second"]["value"]) for row in found["quality"]}
    assert quality["accuracy, optimized"] == (0.715, 0.5)
    latency = {row["what"]: (row["first"], row["second"]) for row in found["latency_ms"]}
    assert latency["image_encoder"][1]["median_ms"] == 9.0
    assert latency["text_encoder"] == (None, None)


def test_a_removed_node_does_not_change_the_lines_behind_it(tmp_path: Path, capsys: Capture) -> None:
    lines = text_diff(GRAPH, CUT)
    assert [line for line in lines if line.startswith(("-", "+"))] == [
        "-%1: float32[batch, 4] = linear fc1 (%0)",
        "-%2: float32[batch, 4] = relu (%1)",
        "-%3: float32[batch, 4] = linear fc2 (%2)",
        "+%1: float32[batch, 4] = linear fc2 (%0)",
    ]
    assert text_diff(GRAPH, GRAPH) == []
    a, b = write_run(tmp_path / "a", graph=GRAPH), write_run(tmp_path / "b", graph=CUT)
    assert diff_runs(a, b, graphs=True)["graphs"] == {"image_encoder": lines}
    assert entry.run(["diff", str(a), str(b), "--graphs"]) == 0
    assert "\n-%2: float32[batch, 4] = relu (%1)\n" in capsys.readouterr().out


def test_terminal_and_json_say_the_same(tmp_path: Path, capsys: Capture) -> None:
    def change(report: dict[str, Any]) -> None:
        report["result"]["cost"]["optimized"]["macs"] = 7
        report["result"]["metric"] = None

    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", change)
    assert entry.run(["diff", str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"]["cost"] == [{"what": "macs", "first": 500_000_000, "second": 7}]
    assert entry.run(["diff", str(a), str(b)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "macs 500 M 7" in shown
    assert "accuracy, optimized 71.5 [64.0, 77.0] not measured" in shown
    assert "drop in points 0.5 [-1.2, 2.5] not measured" in shown
    assert "image_encoder 8.00 [7.00, 9.00] 8.00 [7.00, 9.00]" in shown


def test_what_is_no_run_is_refused_with_what_to_do(tmp_path: Path, capsys: Capture) -> None:
    a = write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    broken = write_run(tmp_path / "broken")
    (broken / "report.json").write_text("{")
    failed = write_run(tmp_path / ".b.partial")
    for folder, reason in (("empty", "has no report.json"), ("nowhere", "is no folder"), ("broken", "is not JSON")):
        assert entry.run(["diff", str(a), str(tmp_path / folder)]) == 1
        shown = capsys.readouterr().err
        assert reason in shown
        assert shown.count("\n") == 1
    with pytest.raises(ArtifactError, match=r"the run failed a gate: its report is in .*\.b\.partial"):
        diff_runs(a, tmp_path / "b")
    assert diff_runs(a, failed)["differences"]["recipe"] == []


def test_a_diff_needs_no_torch(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    words = ["diff", str(a), str(a)]
    script = f"import sys; from vlmopt.cli.entry import run; run({words!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_two_real_runs_of_one_model(classifier: Path, zero_shot: Path) -> None:
    found = diff_runs(classifier, zero_shot, graphs=True)
    assert ("kind", "image-classification", "zero-shot-image-classification") in rows(found, "model and task")
    files = {row["what"]: (row["first"], row["second"]) for row in found["differences"]["files"]}
    assert files["image_encoder.onnx"][0] != files["image_encoder.onnx"][1]
    assert "preprocessor_config.json" not in files
    assert list(found["graphs"]) == ["image_encoder"]
    assert diff_runs(classifier, classifier)["differences"]["files"] == []
