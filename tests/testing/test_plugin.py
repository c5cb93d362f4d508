"""The pytest plugin, in a run of pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testing.catching import FOLDER
from tests.testing.test_catching import GOOD

ROOT = Path(__file__).parents[2]


def run_pytest(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, started in `folder`."""
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--rootdir", str(folder), *arguments]
    wanted = {**os.environ, "PYTHONPATH": str(ROOT), "CI": "", **environment}
    return subprocess.run(words, cwd=folder, env=wanted, capture_output=True, text=True)


def test_loading_it_loads_no_torch() -> None:
    script = "import sys, vlmopt.testing, vlmopt.testing.plugin; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run_of_pytest_that_names_no_pass_is_as_ever(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("import sys\ndef test_own():\n    assert 'torch' not in sys.modules\n")
    done = run_pytest(tmp_path)
    assert done.returncode == 0
    assert "1 passed" in done.stdout


FILE = f"""
from pathlib import Path
from vlmopt.testing import contract_tests
test_name = contract_tests("drop-scaling", pass_dirs=[Path({str(GOOD.parent)!r})], checks=["saves-what-it-predicts"])
test_file = contract_tests({str(GOOD)!r}, checks=["keeps-its-options"])
"""


def test_passes_are_checked_when_they_are_named_and_by_files_of_tests(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(FILE)
    bad = FOLDER / "drop_for_nothing.py"
    passes = ["--vlmopt-pass", str(GOOD), "--vlmopt-pass", str(bad), "--vlmopt-pass", "nothing-there"]
    done = run_pytest(tmp_path, *passes, "-k", "saves-what-it-predicts or can-be-loaded or keeps-its-options")
    outcomes = {line.partition(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED"))}
    assert done.returncode == 1
    assert outcomes == {
        "PASSED test_it.py::test_name[drop-scaling-by one-saves-what-it-predicts]",
        "PASSED test_it.py::test_name[drop-scaling-twice-saves-what-it-predicts]",
        "PASSED test_it.py::test_name[drop-scaling-by two-saves-what-it-predicts]",
        "PASSED test_it.py::test_file[drop-scaling-keeps-its-options]",
        "PASSED vlmopt-passes::drop-scaling::keeps-its-options",
        "PASSED vlmopt-passes::drop-scaling::by one::saves-what-it-predicts",
        "PASSED vlmopt-passes::drop-scaling::twice::saves-what-it-predicts",
        "PASSED vlmopt-passes::drop-scaling::by two::saves-what-it-predicts",
        "PASSED vlmopt-passes::drop-for-nothing::keeps-its-options",
        "FAILED vlmopt-passes::drop-for-nothing::by one::saves-what-it-predicts",
        "FAILED vlmopt-passes::nothing-there::can-be-loaded",
    }
    assert "'by one', saves-what-it-predicts: predicted against counted: activation_bytes 0 against 16" in done.stdout
    assert "there is no pass of that name" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_folder_and_golden_texts_can_be_named_in_the_ini_file(tmp_path: Path) -> None:
    (tmp_path / "own passes").mkdir()
    (tmp_path / "own passes" / "drop_scaling.py").write_text(GOOD.read_text())
    (tmp_path / "own passes" / "drop_broken.py").write_text("nothing here\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nvlmopt_pass_dirs =\n    'own passes'\nvlmopt_golden = texts\n")
    chosen = ("-k", "golden or can-be-loaded")
    refused = run_pytest(tmp_path, *chosen, "--vlmopt-update-golden", CI="true")
    assert refused.returncode == 4
    assert "are not written where CI is set" in refused.stderr
    written = run_pytest(tmp_path, *chosen, "--vlmopt-update-golden")
    assert written.stdout.count("golden text written: ") == 3
    compared = run_pytest(tmp_path, *chosen)
    assert "4 passed" in compared.stdout
    assert "1 failed" in compared.stdout
    assert "drop_broken.py" in compared.stdout
    assert "golden text written" not in compared.stdout


def test_a_folder_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--vlmopt-pass-dir", "nowhere")
    assert done.returncode == 4
    assert "nowhere: is no folder" in done.stderr
