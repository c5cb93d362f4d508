"""What was measured outlives a change of the recipe; everything else of an unfinished run does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmopt.rundir import CHOICE_WORK, PROFILE_WORK, RunDirectory


def leave(out: Path, key: str) -> None:
    """An unfinished run that had measured something and written more."""
    with pytest.raises(KeyboardInterrupt), RunDirectory(out, key=key) as run:
        for step in (f"{PROFILE_WORK}/a", CHOICE_WORK, "20-passes/01-x"):
            (run.work(step) / "found.json").write_text(step)
        run.path("graphs/model.onnx").write_text("half")
        raise KeyboardInterrupt


def files_of(run: RunDirectory) -> set[str]:
    return {path.relative_to(run.partial).as_posix() for path in run.partial.rglob("*") if path.is_file()}


def test_a_run_under_another_key_finds_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    leave(tmp_path / "out", "first")
    with RunDirectory(tmp_path / "out", key="second") as run:
        assert not run.has_resumed
        measured = {f".work/{PROFILE_WORK}/a/found.json", f".work/{CHOICE_WORK}/found.json"}
        assert files_of(run) == {".work/key", *measured}
        assert (run.partial / ".work" / "key").read_text() == "second"
        assert not (run.partial / "graphs").exists()


def test_a_run_under_the_same_key_finds_everything(tmp_path: Path) -> None:
    leave(tmp_path / "out", "first")
    with RunDirectory(tmp_path / "out", key="first") as run:
        assert run.has_resumed
        assert {"graphs/model.onnx", ".work/20-passes/01-x/found.json"} < files_of(run)
