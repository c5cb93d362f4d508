"""One program for two tasks, from the command line: planned, checked and answered for each of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests import toys
from vlmopt.cli import entry
from vlmopt.runtime import load

Capture = pytest.CaptureFixture[str]


def two_tasks(folder: Path, **fields: object) -> Path:
    """Colour, and whether it is red, asked of the same images; returns the task of both."""
    colour = toys.write_task(folder / "colour", "image-classification", n=30)
    rows = [json.loads(line) for line in (colour / "metadata.jsonl").read_text().splitlines()]
    rows = [{**row, "is_red": row["colour"] == "red"} for row in rows]
    (colour / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    red = {
        "kind": "image-classification",
        "name": "red",
        "data": "../colour",
        "columns": {"image": "file_name", "label": "is_red", "split": "split"},
    }
    (folder / "red").mkdir()
    (folder / "red" / "task.yaml").write_text(yaml.safe_dump(red))
    both = {"kind": "multi-task", "name": "both", "tasks": ["colour", "red"], **fields}
    (folder / "both.yaml").write_text(yaml.safe_dump(both))
    return folder / "both.yaml"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_tasks(tmp_path_factory.mktemp("two tasks"))


@pytest.fixture(scope="module")
def artifact(clip: Path, both: Path) -> Path:
    out = both.parent / "out"
    words = ["optimize", "-q", "-m", str(clip), "-t", str(both), "-o", str(out), "--max-drop", "20"]
    assert entry.run(words) == 0
    return out


def test_each_task_is_held_to_the_bound_by_itself(artifact: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())
    gates = {gate["name"]: gate for gate in report["gates"] if gate["name"].startswith("drop")}
    assert list(gates) == [
        "drop of accuracy on the test split, in points (colour)",
        "drop of accuracy on the test split, in points (red)",
    ]
    groups = {group["name"]: group for group in report["result"]["metric"]["groups"]}
    for name, gate in zip(("colour", "red"), gates.values(), strict=True):
        assert gate["found"] == groups[name]["drop_points"]
        assert groups[name]["n"] == 30
    assert {"colour: red", "red: true"} <= groups.keys()
    assert any(not branch["kept"] for branch in report["branches"])


def test_the_artifact_answers_every_task(artifact: Path, capsys: Capture) -> None:
    model = load(artifact)
    images = sorted((artifact.parent / "colour" / "images").glob("*.png"))[60:72]
    answers = model.classify(images)
    blocks = {"colour": 3, "red": 2}
    for ranked in answers:
        assert [label.partition(":")[0] for label, _ in ranked] == ["colour", "red", "colour", "red", "colour"]
        for task in blocks:
            assert sum(p for label, p in ranked if label.startswith(f"{task}: ")) == pytest.approx(1)
    is_red = [dict(ranked[:2]).keys() >= {"colour: red", "red: true"} for ranked in answers]
    assert sum(is_red) >= 2  # four of the twelve are
    assert entry.run(["run", str(artifact), "--image", str(images[0])]) == 0
    assert "red: " in capsys.readouterr().out
    assert entry.run(["eval", "-q", str(artifact), "-t", str(artifact.parent / "both.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["value"] == pytest.approx(found["recorded"])
    assert {"accuracy", "accuracy of colour", "accuracy of red"} == found["all"].keys()


def test_recheck_judges_the_task_that_loses_most(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    new = tmp_path / "new"
    shutil.copytree(artifact.parent, new, ignore=shutil.ignore_patterns("out", ".*"))
    rows = [json.loads(line) for line in (new / "colour" / "metadata.jsonl").read_text().splitlines()]
    for row in rows:  # weeks later nobody agrees on what is red
        row["is_red"] = not row["is_red"] if row["split"] == "test" else row["is_red"]
    (new / "colour" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry.run(["recheck", "-q", "--json", str(artifact), "-t", str(new / "both.yaml")])
    metric = json.loads(capsys.readouterr().out)["metric"]
    assert metric["name"] in ("accuracy of colour", "accuracy of red")
    assert metric["n"] == 30
    assert metric["drop_points"] == pytest.approx(100 * (metric["original"] - metric["artifact"]), abs=1e-9)


def test_weighted_tasks_share_one_bound(clip: Path, tmp_path: Path) -> None:
    task, out = two_tasks(tmp_path / "a b", combine="weighted", weights=[3, 1]), tmp_path / "out"
    assert entry.run(["optimize", "-q", "-m", str(clip), "-t", str(task), "-o", str(out), "--max-drop", "20"]) == 0
    report = json.loads((out / "report.json").read_text())
    metric = report["result"]["metric"]
    assert [g["name"] for g in report["gates"] if g["name"].startswith("drop")] == [
        "drop of accuracy on the test split, in points"
    ]
    parts = {group["name"]: group["optimized"] for group in metric["groups"]}
    assert metric["optimized"] == pytest.approx((3 * parts["colour"] + parts["red"]) / 4)
