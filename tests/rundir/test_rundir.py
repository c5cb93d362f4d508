from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vlmopt.core.errors import OutputExistsError, VlmoptError
from vlmopt.rundir import MANIFEST, RunDirectory, RunFile, atomic_write, disk_errors, partial_path


def published(out: Path, text: str, *, force: bool = False) -> Path:
    with RunDirectory(out, key="k", force=force) as run:
        atomic_write(run.path(MANIFEST), "{}")
        atomic_write(run.path("onnx/model.onnx"), text)
        return run.publish()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_run_publishes_all_files_and_leaves_nothing_beside_them(tmp_path: Path) -> None:
    out = published(tmp_path / "deep" / "out", "graph")
    assert (out / "onnx" / "model.onnx").read_text() == "graph"
    assert hidden(out.parent) == []


def test_before_publishing_nothing_has_the_final_name(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "out", key="k") as run:
        atomic_write(run.path("model.onnx"), b"x")
        assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(OutputExistsError, match="out: exists already; .*--force"),
        RunDirectory(tmp_path / "out", key="k"),
    ):
        pytest.fail("the run began")
    assert hidden(tmp_path) == []


def test_force_replaces_an_artifact_only_after_success(tmp_path: Path) -> None:
    out = published(tmp_path / "out", "old")
    with RunDirectory(out, key="k2", force=True) as run:
        atomic_write(run.path(MANIFEST), "{}")
        assert (out / "onnx" / "model.onnx").read_text() == "old"
        run.publish()
    assert not (out / "onnx").exists()
    assert hidden(tmp_path) == []


def test_force_keeps_the_old_artifact_when_the_run_fails(tmp_path: Path) -> None:
    out = published(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), RunDirectory(out, key="k2", force=True):
        raise RuntimeError("gate")
    assert (out / "onnx" / "model.onnx").read_text() == "old"


@pytest.mark.parametrize("content", ["notes.txt", ".git"])
def test_force_never_replaces_what_is_no_artifact(tmp_path: Path, content: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / content).write_text("precious")
    with pytest.raises(OutputExistsError, match=r"holds no manifest\.json"):
        published(tmp_path / "work", "new", force=True)
    assert (tmp_path / "work" / content).read_text() == "precious"


def test_force_replaces_no_file_and_no_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    real = published(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(real)
    for name in ("file", "link"):
        with pytest.raises(OutputExistsError):
            published(tmp_path / name, "new", force=True)
    assert (real / "onnx" / "model.onnx").read_text() == "old"


def test_a_replacement_that_a_crash_cut_in_half_is_undone(tmp_path: Path) -> None:
    out = published(tmp_path / "out", "old")
    out.rename(tmp_path / ".out.old")
    with pytest.raises(OutputExistsError), RunDirectory(out, key="k"):
        pytest.fail("the run began")
    assert (out / "onnx" / "model.onnx").read_text() == "old"


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError), RunDirectory(tmp_path / "out", key="k") as run:
        (tmp_path / "out").mkdir()
        run.publish()


def test_finished_steps_are_found_again_under_the_same_key(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunDirectory(tmp_path / "out", key="k") as run:
        (run.work("10-profile") / "scores.json").write_text("[1]")
        run.finish("10-profile", {"scores": [1, 2.5]})
        raise KeyboardInterrupt
    with RunDirectory(tmp_path / "out", key="k") as run:
        assert run.has_resumed
        assert run.finished("10-profile") == {"scores": [1, 2.5]}
        assert run.finished("20-passes") is None
        assert (run.work("10-profile") / "scores.json").read_text() == "[1]"


def test_another_key_starts_afresh(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "out", key="k") as run:
        run.finish("00-capture")
    with RunDirectory(tmp_path / "out", key="other") as run:
        assert not run.has_resumed
        assert run.finished("00-capture") is None


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), RunDirectory(tmp_path / "out", key="k"):
        raise ValueError("x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_step_wrote_before_it_was_stopped_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunDirectory(tmp_path / "out", key="k") as run:
        atomic_write(run.work("10-profile") / "batch-0.json", "[]")
        raise KeyboardInterrupt
    assert (tmp_path / ".out.partial" / ".work" / "10-profile" / "batch-0.json").read_text() == "[]"


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path / "out", key="k"),
        pytest.raises(VlmoptError, match=rf"another run writes it \(process {os.getpid()}\)"),
        RunDirectory(tmp_path / "out", key="k"),
    ):
        pytest.fail("the second run began")
    with RunDirectory(tmp_path / "out", key="k"):
        pass  # the refused run left the lock in order


def test_a_killed_run_leaves_its_steps_and_no_lock_that_stops_the_next(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from vlmopt.rundir import RunDirectory
        with RunDirectory(Path({str(tmp_path / "out")!r}), key="k") as run:
            run.finish("00-capture", {{"n": 1}})
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".out.lock").exists()
    with RunDirectory(tmp_path / "out", key="k") as run:
        assert run.finished("00-capture") == {"n": 1}
    assert not (tmp_path / ".out.lock").exists()


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    atomic_write(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VlmoptError, match=r"report\.json: there is no space left on the disk; free some space"):
        atomic_write(path, "new" * 1000)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_really_full_is_named() -> None:
    with pytest.raises(VlmoptError, match="no space left on the disk"), disk_errors("/dev/full"):
        with Path("/dev/full").open("w") as stream:
            stream.write("x" * 100_000)


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VlmoptError, match="file.*cannot be written"), RunDirectory(tmp_path / "file" / "out", key="k"):
        pytest.fail("the run began")


def test_a_file_run_publishes_one_file_and_removes_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "style.json"
    with RunFile(path, key="k") as run:
        run.finish("branch-0", {"score": 0.5})
        run.publish("{}")
    assert path.read_text() == "{}"
    assert not partial_path(path).exists()
    with pytest.raises(OutputExistsError, match="--force replaces it"), RunFile(path, key="k"):
        pytest.fail("the run began")
    with RunFile(path, key="k", force=True) as run:
        assert run.finished("branch-0") is None
        run.publish("[]")
    assert path.read_text() == "[]"


def test_a_file_run_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="is a folder"), RunFile(tmp_path, key="k", force=True):
        pytest.fail("the run began")
