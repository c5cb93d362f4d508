"""A result appears whole under its name or not at all, and what was there before is never lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from vlmopt import workflow
from vlmopt.cli import entry
from vlmopt.core.errors import VlmoptError
from vlmopt.core.progress import Silent
from vlmopt.recipe import default_recipe, load_recipe
from vlmopt.recipe.schema import DEFAULT_PASSES, Recipe

Capture = pytest.CaptureFixture[str]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def ruinous(clip: Path, colours: Path, folder: Path) -> Path:
    """A recipe that cuts everything, renders the image by its class token alone, and allows no drop."""
    content = {
        "model": str(clip),
        "task": str(colours),
        "budgets": {"max_drop": 0.0},
        "passes": ["canonicalize", {"skip-branches": {"branches": ["vision_model.*"]}}],
    }
    path = folder / "ruin.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def recipe_of(clip: Path, colours: Path) -> Recipe:
    return default_recipe(str(clip), str(colours), {"budgets.max_drop": 20.0})


def test_a_failed_gate_exits_with_3_and_publishes_nothing(
    clip: Path, colours: Path, classifier: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = ruinous(clip, colours, tmp_path)
    out = tmp_path / "out"
    shutil.copytree(classifier, out)
    before = snapshot(out)
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(out), "--force"]) == 3
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "gate 'drop of accuracy on the test split, in points': found" in shown
    assert "expected at most 0; nothing was published" in shown
    assert snapshot(out) == before
    partial = tmp_path / ".out.partial"
    assert str(partial) in shown
    report = json.loads((partial / "report.json").read_text())
    assert [gate["passed"] for gate in report["gates"]][-1] is False
    assert not (tmp_path / ".out.lock").exists()


def test_an_output_is_replaced_only_with_force_and_only_by_something_whole(
    clip: Path, colours: Path, classifier: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "my out"
    shutil.copytree(classifier, out)
    (out / "mark").write_text("old")
    before = snapshot(tmp_path)
    words = ["optimize", "-q", "-m", str(clip), "-t", str(colours), "-o", str(out), "--max-drop", "20"]
    assert entry.run(words) == 1
    assert "exists already; choose another path, or --force replaces it" in capsys.readouterr().err
    assert entry.run([*words, "--force", "--profile", str(tmp_path / "nowhere.json")]) == 1
    assert snapshot(tmp_path) == before
    assert entry.run([*words, "--force", "--profile", str(classifier / "profile.json"), "--emit", "pt2"]) == 0
    assert not (out / "mark").exists()
    assert (out / "image_encoder.pt2").is_file()
    assert (out / "profile.json").read_bytes() == (classifier / "profile.json").read_bytes()
    assert not (out / "image_encoder.onnx").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["my out"]
    assert entry.run(["verify", "-q", str(out), "-t", str(colours)]) == 0


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["optimize", "-q", "-m", str(clip), "-t", str(colours), "--max-drop", "1", "--dry-run", "--json"]
    assert entry.run([*words, "-o", str(tmp_path / "out")]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [step["name"] for step in plan] == list(DEFAULT_PASSES)
    assert len(plan[1]["sites"]) == 6
    assert plan[1]["is_chosen"] is False
    assert list(tmp_path.iterdir()) == []


def test_named_branches_are_cut_without_a_task(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "r.yaml"
    named = {"branches": ["text_encoder/*", "*.layers.2.mlp"]}
    passes = ["canonicalize", {"skip-branches": named}]
    recipe.write_text(yaml.safe_dump({"model": str(clip), "passes": passes}))
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kept = [f"{b['component']}/{b['name']}" for b in report["branches"] if b["kept"]]
    assert len(kept) == 5
    assert all(name.startswith("image_encoder/") for name in kept)
    assert report["task"] is None
    assert report["result"]["metric"] is None
    assert entry.run(["verify", "-q", str(tmp_path / "out")]) == 0
    assert entry.run(["verify", "-q", str(tmp_path / "out"), "-t", str(tmp_path)]) == 1
    capsys.readouterr()


def test_a_profile_is_written_compared_and_accepted_by_optimize(
    clip: Path, colours: Path, classifier: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "a profile.json"
    words = ["profile", "-q", "-m", str(clip), "-t", str(colours), "-o", str(file), "--num-samples", "12"]
    assert entry.run(words) == 0
    found = json.loads(file.read_text())
    assert found["task"]["n_items"] == 12
    assert [s["scope"] for s in found["scores"]] == ["branch"] * 6 + ["layer"] * 3
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    capsys.readouterr()
    assert entry.run(["profile", "diff", str(file), str(classifier / "profile.json"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 6
    recipe = default_recipe(str(clip), str(colours), {"budgets.max_drop": 20.0, "profile.file": str(file)})
    with pytest.raises(KeyboardInterrupt):  # so it has been accepted, though it was measured on fewer samples
        workflow.optimize(recipe, tmp_path / "out", progress=Watching(stops_at("original")))


class Watching(Silent):
    """Calls `on_stage` with the name of every stage that begins, and keeps the messages."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self.on_stage, self.messages = on_stage, list[str]()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:  # type: ignore[override]
        self.on_stage(name)
        yield

    def message(self, text: str) -> None:
        self.messages.append(text)


def stops_at(stage: str) -> Callable[[str], None]:
    def on_stage(name: str) -> None:
        if name == stage:
            raise KeyboardInterrupt

    return on_stage


def test_a_run_stopped_before_anything_was_measured_leaves_nothing(clip: Path, colours: Path, tmp_path: Path) -> None:
    progress = Watching(stops_at("pass skip-branches"))
    with pytest.raises(KeyboardInterrupt):
        workflow.optimize(recipe_of(clip, colours), tmp_path / "out", progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_keeps_its_measurements_and_the_next_one_takes_them_up(
    clip: Path, colours: Path, classifier: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = load_recipe(classifier).model_copy(update={"passes": recipe_of(clip, colours).passes})
    with pytest.raises(KeyboardInterrupt):
        workflow.optimize(recipe, out, progress=Watching(stops_at("verify")))
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(re.sub("[0-9a-f]{16}", "KEY", name) for name in left) == [
        ".out.partial/.work/10-profile/KEY/batches/image_encoder-00000.safetensors",
        ".out.partial/.work/10-profile/KEY/profile.json",
        ".out.partial/.work/15-choice/KEY.json",
        ".out.partial/.work/key",
        ".out.partial/.work/ledger.jsonl",
    ]
    (tmp_path / ".out.partial" / ".image_encoder.onnx.123.tmp").write_bytes(b"half of a graph")
    again = Watching(lambda name: None)
    workflow.optimize(recipe, out, progress=again)
    assert again.messages[0] == f"resuming from {tmp_path / '.out.partial'}"
    assert [message.split(" (")[0] for message in again.messages[1:]] == [
        "profile: taken up from an earlier run",
        "plan: taken up from an earlier run",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(out.rglob("*.tmp"))
    for name in ("image_encoder.onnx", "recipe.yaml"):
        assert (out / name).read_bytes() == (classifier / name).read_bytes()


def test_a_full_disk_is_one_line_and_keeps_the_old_result(
    clip: Path, colours: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(classifier, out)
    before = snapshot(out)
    real = os.fsync

    def full(descriptor: int) -> None:
        if "report" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    words = ["--recipe", str(classifier / "recipe.yaml"), "-o", str(out), "--force"]
    assert entry.run(["optimize", "-q", *words]) == 1
    shown = capsys.readouterr().err
    assert "report.json: there is no space left on the disk; free some space and run the same command again" in shown
    assert shown.count("\n") == 1
    assert snapshot(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_for_one_output_do_not_meet(clip: Path, colours: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    second: list[str] = []

    def on_stage(name: str) -> None:
        if name == "original":
            with pytest.raises(VlmoptError, match="another run writes it"):
                workflow.optimize(recipe_of(clip, colours), out)
            second.append(name)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workflow.optimize(recipe_of(clip, colours), out, progress=Watching(on_stage))
    assert second == ["original"]
