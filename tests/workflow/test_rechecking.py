"""`vlmopt recheck`: on data like the old the plan holds; on data that asks for what was cut it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import toys
from vlmopt.cli import entry

Capture = pytest.CaptureFixture[str]


def recheck(capsys: Capture, *words: object) -> tuple[int, dict[str, Any], str]:
    code = entry.run(["recheck", "-q", "--json", *(str(word) for word in words)])
    shown = capsys.readouterr()
    return code, json.loads(shown.out) if shown.out else {}, shown.err


def new_data(folder: Path, *, seed: int = 7) -> Path:
    toys.write_task(folder, "image-classification", n=30, seed=seed)
    return folder


def blind_artifact(clip: Path, task: Path, folder: Path) -> Path:
    """An artifact without attention: the class token never sees the image, so it answers by chance."""
    recipe = {
        "model": str(clip),
        "task": str(task),
        "passes": ["canonicalize", {"skip-branches": {"branches": ["*attn*"]}}, "fold-constants"],
        "budgets": {"max_drop": 5},
        "verify": {"max_drop_gate": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert entry.run(["optimize", "-q", "--recipe", str(folder / "recipe.yaml"), "-o", str(folder / "out")]) == 0
    return folder / "out"


def test_on_data_like_the_old_the_plan_holds(classifier: Path, tmp_path: Path, capsys: Capture) -> None:
    code, found, _ = recheck(capsys, classifier, "-t", new_data(tmp_path / "new data"))
    assert (code, found["holds"]) == (0, True)
    metric = found["metric"]
    assert metric["n"] == 30
    assert metric["drop_points"] == pytest.approx(100 * (metric["original"] - metric["artifact"]), abs=1e-9)
    assert metric["allowed_points"] == 20
    recorded = json.loads((classifier / "report.json").read_text())["result"]["metric"]["drop_points"]
    assert metric["drop_points_when_made"] == recorded
    plan = found["plan"]
    cut = {
        f"{b['component']}/{b['name']}"
        for b in json.loads((classifier / "report.json").read_text())["branches"]
        if not b["kept"]
    }
    assert plan["n_cut"] == len(cut)
    for row in plan["differences"]:
        assert (row["today"] == "kept") == (row["name"] in cut)
    assert plan["n_cut_today"] == len(cut) + sum({"kept": -1, "cut": 1}[row["today"]] for row in plan["differences"])


def test_where_the_drop_is_too_large_it_says_so_and_exits_with_three(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = blind_artifact(clip, colours, tmp_path)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, found, err = recheck(capsys, out, "-t", new_data(tmp_path / "new"))
    assert (code, found["holds"]) == (3, False)
    assert found["metric"]["drop_points"] > 20
    assert "drops by" in err
    assert "compile again: vlmopt optimize" in err
    assert len(err.strip().splitlines()) == 1
    assert any(row["today"] == "kept" for row in found["plan"]["differences"])  # attention is what is needed
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert recheck(capsys, out, "-t", tmp_path / "new", "--max-drop", "100")[0] == 0


def test_without_the_old_task_the_head_is_fitted_on_the_new_data(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    task = new_data(tmp_path / "old", seed=1)
    recipe = {
        "model": str(clip),
        "task": str(task),
        "passes": ["canonicalize", {"skip-branches": {"branches": ["*.1.mlp"]}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert entry.run(["optimize", "-q", "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]) == 0
    shutil.rmtree(task)
    code, found, _ = recheck(capsys, tmp_path / "out", "-t", new_data(tmp_path / "new"))
    assert code == 0
    assert found["head_fitted_on"] == str(tmp_path / "new")
    assert found["holds"] is None  # the recipe allows no drop, so there is nothing to hold
    assert found["metric"]["allowed_points"] is None


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("image-text-retrieval", "is a task of kind image-text-retrieval"),
        ("labels", "labels that the artifact does not know"),
    ],
)
def test_data_of_another_question_is_refused(
    classifier: Path, tmp_path: Path, capsys: Capture, kind: str, said: str
) -> None:
    folder = tmp_path / "new"
    if kind == "labels":
        new_data(folder)
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        rows = [{**row, "colour": "mauve" if row["colour"] == "red" else row["colour"]} for row in rows]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        specification = yaml.safe_load((folder / "task.yaml").read_text())
        specification.pop("labels", None)
        (folder / "task.yaml").write_text(yaml.safe_dump(specification))
    else:
        toys.write_task(folder, kind, n=30)
    code, _, err = recheck(capsys, classifier, "-t", folder)
    assert code == 1
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_an_artifact_without_a_task_and_a_folder_that_is_none_are_refused(
    clip: Path, tmp_path: Path, capsys: Capture
) -> None:
    task = new_data(tmp_path / "new")
    assert entry.run(["optimize", "-q", "-m", str(clip), "-o", str(tmp_path / "out")]) == 0
    code, _, err = recheck(capsys, tmp_path / "out", "-t", task)
    assert (code, "was made without a task" in err) == (1, True)
    code, _, err = recheck(capsys, tmp_path, "-t", task)
    assert code == 1
    assert "manifest.json" in err
