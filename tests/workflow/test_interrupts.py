"""Ctrl-C and kill, as a shell sends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmopt.cli import entry

pytestmark = pytest.mark.slow


class Running:
    """`vlmopt optimize` as a process of its own."""

    def __init__(self, clip: Path, colours: Path, out: Path) -> None:
        self.words = ["optimize", "-m", str(clip), "-t", str(colours), "-o", str(out), "--max-drop", "20"]
        command = [sys.executable, "-c", "from vlmopt.cli import main; main()", *self.words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        assert self.process.stderr is not None
        while text not in self.shown:
            line = self.process.stderr.readline()
            assert line, self.shown
            self.shown += line

    def end(self) -> int:
        out, error = self.process.communicate(timeout=120)
        self.shown += error
        assert out == ""
        return self.process.returncode


def interrupted_line(shown: str) -> str:
    assert "Traceback" not in shown
    assert "Error" not in shown
    lines = [line for line in shown.splitlines() if line.startswith("interrupted: ")]
    assert len(lines) == 1
    assert shown.splitlines()[-1] == lines[0]
    return lines[0]


def test_ctrl_c_says_one_line_and_the_same_command_resumes(
    clip: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my out"
    run = Running(clip, colours, out)
    run.wait_for("emit ...")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    assert interrupted_line(run.shown).endswith("run the same command again to resume")
    assert [path.name for path in tmp_path.iterdir()] == [".my out.partial"]
    assert entry.run(run.words) == 0
    assert "resuming from" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["my out"]
    assert entry.run(["verify", "-q", str(out)]) == 0


def test_ctrl_c_twice_ends_the_same_way(clip: Path, colours: Path, tmp_path: Path) -> None:
    run = Running(clip, colours, tmp_path / "out")
    run.wait_for("pass skip-branches ...")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    interrupted_line(run.shown)
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_no_result_and_the_next_one_finishes(
    clip: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Running(clip, colours, tmp_path / "out")
    run.wait_for("latency ...")
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "image_encoder.onnx").exists()
    assert entry.run(run.words) == 0
    assert "resuming from" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert entry.run(["verify", "-q", str(tmp_path / "out")]) == 0
