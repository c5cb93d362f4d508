"""One plan for cuts, widths and bits: chosen on the task, written into the recipe, told in the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import toys
from vlmopt.cli import entry


@dataclass(frozen=True)
class _Run:
    model: Path
    task: Path
    out: Path
    report: dict[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((self.out / "recipe.yaml").read_text())
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> _Run:
    folder = tmp_path_factory.mktemp("together")
    model, task = toys.write_model("vilt", folder / "model"), folder / "task"
    toys.write_task(task, "visual-question-answering", n=24)
    out = folder / "out"
    words = ["optimize", "-q", "-m", str(model), "-t", str(task), "-o", str(out), "--together", "--max-drop", "40"]
    assert entry.run(words) == 0
    return _Run(model, task, out, json.loads((out / "report.json").read_text()))


@pytest.mark.slow
def test_the_recipe_names_what_was_planned(run: _Run) -> None:
    assert run.recipe["planning"] == "in-turn"
    options = {
        "skip-branches": "branches",
        "prune-heads": "branches",
        "prune-ffn": "branches",
        "quantize-int8": "modules",
    }
    planned = [step for step in run.recipe["passes"] if isinstance(step, dict) and set(step) & set(options)]
    assert planned
    for step in planned:
        ((name, given),) = step.items()
        assert given[options[name]]
    n_named = sum(len(given[options[name]]) for step in planned for name, given in step.items())
    assert n_named == sum(kind["n_sites"] for kind in run.report["together"]["kinds"])


@pytest.mark.slow
def test_the_report_says_what_each_pass_brought(run: _Run) -> None:
    found = run.report["together"]
    assert found["predicted_us"] < found["whole_us"]
    taken = [kind for kind in found["kinds"] if kind["n_sites"]]
    assert all(kind["saved_latency"] > 0 for kind in taken)
    trials = run.report["plan"]["trials"]
    assert [trial["order"] for trial in trials][:2] == ["nothing", "cuts alone"]
    (chosen,) = (trial for trial in trials if trial["is_chosen"])
    assert chosen["is_accepted"]
    alone = next(trial for trial in trials if trial["order"] == "cuts alone")
    assert chosen["saved_latency_us"] >= alone["saved_latency_us"]
    text = (run.out / "report.md").read_text()
    assert "What each kind of saving brought" in text
    assert "One plan for all passes" in (run.out / "report.html").read_text()


@pytest.mark.slow
def test_the_written_recipe_makes_the_same_artifact(run: _Run, tmp_path: Path) -> None:
    assert entry.run(["optimize", "-q", "--recipe", str(run.out / "recipe.yaml"), "-o", str(tmp_path / "again")]) == 0
    first, second = (
        json.loads((folder / "manifest.json").read_text())["components"] for folder in (run.out, tmp_path / "again")
    )
    assert first == second


@pytest.mark.slow
def test_budgets_of_several_resources_are_met_together(run: _Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["optimize", "-q", "-m", str(run.model), "-t", str(run.task), "-o", str(out), "--together"]
    assert entry.run([*words, "--size", "0.7x", "--macs", "0.7x"]) == 0
    report = json.loads((out / "report.json").read_text())
    cost, size = report["result"]["cost"], report["result"]["size_bytes"]
    assert cost["optimized"]["macs"] <= 0.7 * cost["original"]["macs"]
    assert size["optimized"] <= 0.7 * size["original"]


@pytest.mark.slow
def test_budgets_that_cannot_be_met_end_in_one_line(
    run: _Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["optimize", "-q", "-m", str(run.model), "-t", str(run.task), "-o", str(out), "--together"]
    assert entry.run([*words, "--size", "0.001x"]) != 0
    error = capsys.readouterr().err.strip()
    assert "the budgets" in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_without_a_task_there_is_nothing_to_plan_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = toys.write_model("vilt", tmp_path / "model")
    assert entry.run(["optimize", "-q", "-m", str(model), "-o", str(tmp_path / "out"), "--together"]) == 1
    assert "plans on a task, and there is none; pass -t TASK" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_writes_is_planned_with_its_cache(tmp_path: Path) -> None:
    model, out = toys.write_model("llava_llama", tmp_path / "model"), tmp_path / "out"
    task = toys.write_task(tmp_path / "task", "image-text-to-text", n=9)
    words = ["optimize", "-q", "-m", str(model), "-t", str(task), "-o", str(out), "--together", "--size", "0.6x"]
    assert entry.run(words) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["result"]["size_bytes"]["optimized"] <= 0.6 * report["result"]["size_bytes"]["original"]
    assert entry.run(["verify", "-q", str(out)]) == 0


@pytest.mark.slow
def test_a_plan_for_another_device_leaves_out_what_its_profile_does_not_know(run: _Run, tmp_path: Path) -> None:
    profile, out = tmp_path / "device.json", tmp_path / "out"
    assert entry.run(["device", "profile", "-q", "-m", str(run.model), "-o", str(profile), "--threads", "1"]) == 0
    words = ["optimize", "-q", "-m", str(run.model), "-t", str(run.task), "-o", str(out), "--together"]
    assert entry.run([*words, "--latency", "0.6x", "--device-profile", str(profile)]) == 0
    report = json.loads((out / "report.json").read_text())
    left_out = report["together"]["left_out"]
    assert any("quantize-int8" in line and "profile lacks" in line for line in left_out)
    (gate,) = (gate for gate in report["gates"] if gate["name"].startswith("latency"))
    assert "predicted for another device" in gate["name"]
    assert gate["found"] <= gate["allowed"] * 1.05
    assert {kind["name"] for kind in report["together"]["kinds"] if kind["n_sites"]} == {"skip-branches"}


@pytest.mark.slow
def test_a_profile_that_knows_the_edits_leaves_none_out(run: _Run, tmp_path: Path) -> None:
    profile, out = tmp_path / "device.json", tmp_path / "out"
    words = ["device", "profile", "-q", "-m", str(run.model), "-o", str(profile), "--threads", "1", "--rounds", "1"]
    assert entry.run([*words, "--together"]) == 0
    words = ["optimize", "-q", "-m", str(run.model), "-t", str(run.task), "-o", str(out), "--together"]
    assert entry.run([*words, "--latency", "0.6x", "--device-profile", str(profile)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert not any("profile lacks" in line for line in report["together"]["left_out"])


def test_a_search_for_a_fault_wants_the_sites_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: m, task: t, planning: together, budgets: {max_drop: 1}}")
    assert entry.run(["bisect", "-q", str(recipe)]) == 1
    assert "planning: is together" in capsys.readouterr().err


def test_a_device_profile_is_for_one_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: m, task: t, budgets: {max_drop: 1}, device_profile: d.json}")
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 1
    assert "pass --together, or leave it out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_budget_that_is_met_already_edits_nothing(run: _Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["optimize", "-q", "-m", str(run.model), "-t", str(run.task), "-o", str(out), "--together", "--macs", "1x"]
    assert entry.run(words) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["result"]["cost"]["optimized"]["macs"] == report["result"]["cost"]["original"]["macs"]
    assert all(kind["n_sites"] == 0 for kind in report["together"]["kinds"])
