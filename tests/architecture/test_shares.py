"""Tests are shared out among processes as `tests/shares.py` says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shares import DEAREST, MAKERS, ROOT, TOGETHER, dearest_first, share_of


def test_every_share_that_is_named_exists() -> None:
    assert [name for name in DEAREST if name not in TOGETHER and not (ROOT / name).is_file()] == []
    assert set(MAKERS.values()) <= set(TOGETHER) <= set(DEAREST)
    assert len(set(DEAREST)) == len(DEAREST)
    assert all((ROOT / name).is_file() for name in MAKERS)


@pytest.mark.parametrize("name", TOGETHER)
def test_files_that_read_the_same_captures_share_a_process(name: str) -> None:
    files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert len([file for file in files if share_of(file) == name]) >= 3


def test_the_dearest_come_first_and_a_share_stays_together(request: pytest.FixtureRequest) -> None:
    items = dearest_first(request.session.items)
    assert sorted(item.nodeid for item in items) == sorted(item.nodeid for item in request.session.items)
    shares = [share_of(item.nodeid.split("::", 1)[0]) for item in items]
    runs = [name for i, name in enumerate(shares) if i == 0 or shares[i - 1] != name]
    assert len(runs) == len(set(runs))
    known = [DEAREST.index(name) for name in runs if name in DEAREST]
    assert known == sorted(known)
    assert runs[: len(known)] == [DEAREST[i] for i in known]


def test_a_run_ends_when_a_process_dies_and_loses_only_the_test_that_it_died_of(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("""
import pytest
from xdist.scheduler import LoadFileScheduling
from tests.shares import Shares

class OfFiles(Shares):
    _split_scope = LoadFileScheduling._split_scope

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return OfFiles(config, log)
""")
    for name in "abcdef":
        (tmp_path / f"test_{name}.py").write_text(
            "def test_one(): pass\ndef test_two(): pass\ndef test_three(): pass\n"
        )
    dies = "import os, time\ndef test_one(): pass\ndef test_dies(): time.sleep(1); os._exit(3)\ndef test_last(): pass\n"
    (tmp_path / "test_d.py").write_text(dies)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", "."]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "1 failed, 17 passed" in done.stdout, done.stdout + done.stderr
    assert "crashed while running 'test_d.py::test_dies'" in done.stdout
