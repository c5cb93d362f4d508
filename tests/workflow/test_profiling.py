"""`vlmopt profile` with every estimator on toys: what the file holds, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Workshop
from vlmopt.cli import entry
from vlmopt.core.estimators import ESTIMATORS

Capture = pytest.CaptureFixture[str]
_CHEAP = ["--num-samples", "12", "--sample-size", "8", "--updates", "4"]


def profiled(model: Path, task: Path, file: Path, *options: str) -> Any:
    words = ["profile", "-q", "-m", str(model), "-t", str(task), "-o", str(file), *_CHEAP, *options]
    assert entry.run(words) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_scores_every_branch_and_layer_and_fills_the_totals(
    estimator: str, clip: Path, colours: Path, tmp_path: Path
) -> None:
    found = profiled(clip, colours, tmp_path / "p.json", "--estimator", estimator)
    assert found["estimator"] == estimator
    assert sorted(s["scope"] for s in found["scores"]) == ["branch"] * 6 + ["layer"] * 3
    (total,) = found["totals"]
    assert total["component"] == "image_encoder"
    assert total["macs"] > sum(s["macs"] for s in found["scores"] if s["scope"] == "branch") > 0
    assert total["params_bytes"] == 4 * total["params"]
    has_drops = [s["drop_points"] is not None for s in found["scores"]]
    assert has_drops == [estimator == "leave-one-out"] * 9
    assert len(found["subsets"]) == (12 if estimator in ("das-bandit", "subset-ridge") else 0)
    assert (found["stability"] is not None) == (estimator == "leave-one-out")
    assert 0 < found["cost"]["forward_passes"] < 12 * 10


@pytest.mark.parametrize("estimator", ["das-bandit", "gate-gradient", "compensated-distortion", "leave-one-out"])
def test_both_encoders_of_a_retrieval_task_are_scored(estimator: str, workshop: Workshop, tmp_path: Path) -> None:
    task = workshop.task("image-text-retrieval")
    found = profiled(workshop.model("clip"), task, tmp_path / "p.json", "--estimator", estimator)
    assert {s["component"] for s in found["scores"]} == {"image_encoder", "text_encoder"}
    assert {total["component"] for total in found["totals"]} == {"image_encoder", "text_encoder"}
    assert all(s["score"] is not None for s in found["scores"])


@pytest.mark.parametrize("kind", ["image-text-retrieval", "zero-shot-image-classification"])
def test_stability_is_measured_where_heads_reproduce_the_original(
    kind: str, workshop: Workshop, tmp_path: Path
) -> None:
    model, task = workshop.model("clip"), workshop.task(kind)
    found = profiled(model, task, tmp_path / "p.json", "--num-samples", "30")
    agreement = found["stability"]["agreement"]
    assert {"5% of the labels wrong", "20% of the labels wrong"} <= set(agreement)
    names = [f"{s['component']}/{s['name']}" for s in found["scores"]]
    assert sorted(found["stability"]["ranks"]) == sorted(names)


def test_stability_ranks_every_branch_among_branches_and_can_be_left_out(
    clip: Path, colours: Path, tmp_path: Path
) -> None:
    found = profiled(clip, colours, tmp_path / "p.json", "--num-samples", "24")
    ranks = found["stability"]["ranks"]
    assert len(ranks) == 9
    for score in found["scores"]:
        low, high = ranks[f"image_encoder/{score['name']}"]
        assert 0 <= low <= high <= (5 if score["scope"] == "branch" else 2)
    assert set(found["stability"]["agreement"]) == {
        "5% of the labels wrong",
        "20% of the labels wrong",
        "10% of the items",
    }
    plain = profiled(clip, colours, tmp_path / "plain.json", "--no-stability", "--num-samples", "24")
    assert plain["stability"] is None
    assert plain["scores"] == found["scores"]


def test_layers_as_arms_leave_branches_unscored(clip: Path, colours: Path, tmp_path: Path) -> None:
    found = profiled(clip, colours, tmp_path / "p.json", "--estimator", "das-bandit", "--arms", "layer")
    assert [s["scope"] for s in found["scores"]] == ["layer"] * 3
    assert {len(entry["skipped"]) for entry in found["subsets"]} == {2}  # one layer of two branches


def test_a_profile_split_of_one_class_is_refused(clip: Path, colours: Path, tmp_path: Path, capsys: Capture) -> None:
    task = shutil.copytree(colours, tmp_path / "red only")
    rows = [json.loads(line) for line in (task / "metadata.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["split"] != "profile" or row["colour"] == "red"]
    (task / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    words = ["profile", "-q", "-m", str(clip), "-t", str(task), "-o", str(tmp_path / "p.json")]
    assert entry.run(words) == 1
    error = capsys.readouterr().err.strip()
    assert "all 10 items of the profile split have one answer ('red'); expected items of two classes" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "p.json").exists()


def test_stability_of_another_estimator_than_leave_one_out_is_refused(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["profile", "-q", "-m", str(clip), "-t", str(colours), "-o", str(tmp_path / "p.json"), "--stability"]
    assert entry.run([*words, "--estimator", "fisher"]) == 1
    assert "is not measured by fisher; expected estimator leave-one-out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_subsets_of_all_branches_are_refused_in_one_line(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["profile", "-q", "-m", str(clip), "-t", str(colours), "-o", str(tmp_path / "p.json")]
    assert entry.run([*words, "--estimator", "das-bandit", "--subset-size", "6", "--num-samples", "12"]) == 1
    error = capsys.readouterr().err.strip()
    assert "6 of 6 branches are to be skipped at a time; expected 1 to 5" in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.glob("p.json")) == []


def test_a_recipe_names_the_estimator_and_its_options(clip: Path, colours: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(clip),
        "task": str(colours),
        "budgets": {"max_drop": 20.0},
        "profile": {"estimator": "subset-ridge", "n_updates": 3, "subset_size": 2, "scoring": "raw"},
        "passes": ["canonicalize", "skip-branches"],
        "num_samples": 12,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert entry.run(["optimize", "-q", "--recipe", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")]) in (0, 3)
    profile = json.loads(next(tmp_path.rglob("profile.json")).read_text())
    assert (profile["estimator"], profile["scoring"], len(profile["subsets"])) == ("subset-ridge", "raw", 9)
    assert {len(entry["skipped"]) for entry in profile["subsets"]} == {2}
