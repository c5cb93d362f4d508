"""Commands that need no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.registry.test_registry import GOOD, folder_with
from tests.report.sample import report
from vlmopt.cli import entry

FIRST_PARTY = [
    "canonicalize", "drop-phantom", "drop-traversal", "fold-adapters", "fold-channel-scales", "fold-constants",
    "fold-cross-modal-adapter",
    "fold-fixed-inputs", "fold-keys-values", "fold-routers", "fold-skip-adapter", "freeze-first-token",
    "hoist-token-reads", "insert-adaptation-adapter",
    "insert-cross-modal-adapter", "insert-low-rank-adapter", "insert-phantom", "insert-skip-adapter",
    "insert-traversal", "prune-ffn", "prune-heads", "prune-tokens", "quantize-int8", "quantize-weights",
    "replace-adapter-gate", "skip-branches", "skip-layers",
]  # fmt: skip


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text(json.dumps(report()), encoding="utf-8")
    return out


def test_passes_list_prints_name_promise_and_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert entry.run(["passes", "list", "--pass-dir", str(folder_with(tmp_path))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted([*FIRST_PARTY, "drop-nothing"])
    assert f"{'drop-nothing':26}  exact  Drops nothing at all." in lines


def test_passes_list_as_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["passes", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["passes"]
    assert [entry["name"] for entry in found] == FIRST_PARTY
    assert found[0]["promise"] == "exact"


def test_passes_show_prints_options_with_types_and_defaults(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert entry.run(["passes", "show", "drop-nothing", "--pass-dir", str(folder_with(tmp_path))]) == 0
    text = capsys.readouterr().out
    for line in ("promise   exact", "breaks    none", "  ratio: float  [default 0.5]"):
        assert line in text.splitlines()
    for fact in ("requires  captured: components are flat graphs", "produces  canonical: no dead nodes"):
        assert f"\n{fact}" in text
    assert "Before: anything; after: the same." in text


def test_passes_show_with_a_misspelled_name_suggests_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["passes", "show", "skip-brnches"]) == 1
    assert "did you mean 'skip-branches'?" in capsys.readouterr().err


def test_a_broken_pass_in_a_folder_names_file_and_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = folder_with(tmp_path, GOOD.replace("Promise.EXACT", "Promise.MAYBE"))
    assert entry.run(["passes", "list", "--pass-dir", str(folder)]) == 1
    assert "drop_nothing.py: the pass makes no promise" in capsys.readouterr().err


def test_report_prints_one_or_compares_several(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    assert entry.run(["report", str(artifact)]) == 0
    assert "Before and after" in capsys.readouterr().out
    assert entry.run(["report", "--format", "markdown", str(artifact / "report.json")]) == 0
    assert capsys.readouterr().out.startswith("# dual for style")
    assert entry.run(["report", str(artifact), str(artifact)]) == 0
    assert "Comparison" in capsys.readouterr().out
    assert entry.run(["report", "--format", "json", str(artifact)]) == 0
    assert json.loads(capsys.readouterr().out) == report()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("{}", "expected a report of schema 1"),
        ("[]", "expected a report"),
    ],
)
def test_a_report_that_cannot_be_read_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="utf-8")
    assert entry.run(["report", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert expected in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "no such file"), ("{", "is not a profile"), ("{}", "is not a profile")]
)
def test_a_profile_that_cannot_be_read_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, expected: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert entry.run(["profile", "diff", str(path), str(path)]) == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", [["run", "--text", "x"], ["verify"], ["bench"]], ids=lambda words: words[0])
def test_what_is_no_artifact_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]) -> None:
    assert entry.run([command[0], str(tmp_path), *command[1:]]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {tmp_path}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("model: m\npases: []\n", "pases: is no key of a recipe; did you mean 'passes'?"),
        ("model: m\npasses: [skip-branchs]\n", "there is no pass 'skip-branchs'; did you mean 'skip-branches'?"),
        ("model: m\n  task: t\n", "line 2"),
    ],
)
def test_a_misspelled_recipe_stops_optimize_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: str, expected: str
) -> None:
    (tmp_path / "r.yaml").write_text(recipe, encoding="utf-8")
    assert entry.run(["optimize", "--recipe", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert expected in shown
    assert shown.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_an_output_that_exists_stops_optimize_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert entry.run(["optimize", "-m", "no/model", "-o", str(tmp_path / "out")]) == 1
    assert "exists already; choose another path, or --force replaces it" in capsys.readouterr().err


def test_force_does_not_replace_a_folder_of_something_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
    assert entry.run(["optimize", "-m", "no/model", "-o", str(tmp_path), "--force"]) == 1
    assert "holds no manifest.json" in capsys.readouterr().err
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_doctor_finds_this_installation_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"python", "torch", "transformers", "onnxruntime", "cores", "free disk", "ONNX Runtime"} <= set(checks)
    assert [name for name, check in checks.items() if check["is_fine"] is False] == []
