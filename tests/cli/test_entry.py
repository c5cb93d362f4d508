"""Failures become one line and an exit code; help says what a command does before anything is imported."""

from __future__ import annotations

import errno
import importlib
import re
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from vlmopt.cli import entry, options
from vlmopt.core.errors import GateError, ModelError
from vlmopt.rundir import RunDirectory

Plant = Callable[[Callable[[], None]], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Adds a command `planted` that does what the test wants a command to do."""

    def add(action: Callable[[], None]) -> None:
        @click.command("planted")
        @options.output("where", is_required=False)
        @options.common
        def command(output: Path | None) -> None:
            action()

        module = types.ModuleType("vlmopt.cli.commands.planted")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(entry.COMMANDS, "planted", "Planted.")

    return add


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ModelError("models/x", "there is no config.json", expected="a model folder", remedy="check -m"),
            1,
            "error: models/x: there is no config.json; expected a model folder; check -m",
        ),
        (GateError("gate 'parity'", "found 0.1", expected="at most 0.0001"), 3, "error: gate 'parity': found 0.1"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            1,
            "error: out/x: there is no space left on the disk",
        ),
        (MemoryError(), 1, "error: there is not enough memory"),
        (KeyError("x\ny"), 70, "error: internal: KeyError: 'x\\ny'; --debug shows the traceback"),
        (RuntimeError("a\nb"), 70, "error: internal: RuntimeError: a b; --debug shows the traceback"),
        (OSError(errno.EIO, "broken"), 70, "error: internal: OSError: [Errno 5] broken"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was written"),
    ],
)
def test_every_failure_is_one_line_on_stderr_and_an_exit_code(
    plant: Plant, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    plant(raising(error))
    assert entry.run(["planted"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    message = shown.err.lstrip()  # click ends the line on which the terminal shows ^C
    assert message.startswith(line)
    assert message.count("\n") == 1


def test_debug_shows_the_traceback(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant(raising(RuntimeError("deep")))
    assert entry.run(["planted", "--debug"]) == 70
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.strip().splitlines()[-1] == "error: internal: RuntimeError: deep"


def test_an_interruption_says_what_is_kept_and_how_to_resume(
    plant: Plant, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def work_and_stop() -> None:
        with RunDirectory(tmp_path / "out", key="k") as run:
            run.finish("00-capture")
            raise KeyboardInterrupt

    plant(work_and_stop)
    assert entry.run(["planted", "-o", str(tmp_path / "out")]) == 130
    kept = tmp_path / ".out.partial"
    assert f"interrupted: finished steps are kept in {kept}; run the same command" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_command_that_succeeds_exits_with_zero(plant: Plant) -> None:
    plant(lambda: None)
    assert entry.run(["planted"]) == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["optimise"], "Did you mean 'optimize'"),
        (["optimize", "--max-drp", "1"], "--max-drop"),
        (["optimize"], "Missing option '-m' / '--model'"),
        (["optimize", "-m", "x"], "Missing option '-o' / '--output'"),
        (["optimize", "-m", "x", "-o", "y", "--max-drop", "101"], "--max-drop"),
        (
            ["optimize", "-m", "x", "-o", "y", "--emit", "tflite"],
            "'onnx', 'torchscript', 'pt2', 'openvino', 'executorch'",
        ),
        (["profile", "-m", "x"], "Missing option '-t' / '--task'"),
        (["profile", "-m", "x", "-t", "y"], "Missing option '-o' / '--output'"),
        (["profile", "diff", "x"], "Missing argument 'B'"),
        (["eval", "x"], "Missing option '-t' / '--task'"),
        (["run", "x"], "Missing option '--image', '--text' or '--prompt'"),
        (["run", "x", "--text", "y", "--threads", "0"], "--threads"),
        (["passes", "show"], "Missing argument 'NAME|FILE'"),
        (["passes", "new"], "Missing argument 'NAME'"),
        (["report"], "Missing argument 'OUT...'"),
        (["passes", "list", "--pass-dir", "no-such-folder"], "no-such-folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_two_and_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], args: list[str], expected: str
) -> None:
    assert entry.run(args) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", list(entry.COMMANDS))
def test_every_command_has_one_sentence_an_example_and_options_with_help(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.run([name, "--help"]) == 0
    text = capsys.readouterr().out
    command = importlib.import_module(f"vlmopt.cli.commands.{name}").command
    assert command.short_help == entry.COMMANDS[name]
    assert command.help.startswith(entry.COMMANDS[name])
    assert re.search(rf"Examples?: vlmopt {re.escape(name)}\b", text)
    undocumented = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert undocumented == []


def test_every_command_file_is_a_command() -> None:
    folder = Path(entry.__file__).parent / "commands"
    stems = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    assert {stem for stem in stems if "_" not in stem} == set(entry.COMMANDS)
    parts = [stem.split("_") for stem in stems if "_" in stem]  # passes_new.py holds `vlmopt passes new`
    groups = {name: importlib.import_module(f"vlmopt.cli.commands.{name}").command for name, _ in parts}
    assert all(part in groups[name].commands for name, part in parts)


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        script = "from vlmopt.cli import main; main()"
        subprocess.run([sys.executable, "-c", script, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time, which other processes on the machine change less than the clock on the wall, in a quiet moment.
    assert any(seconds() < 0.3 for _ in range(10))


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["--version"]) == 0
    assert capsys.readouterr().out == "vlmopt, version 0.1.0\n"
