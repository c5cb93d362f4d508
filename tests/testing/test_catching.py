"""The tester is tested: for every check there is a bad pass that it catches, and a good one that it lets through."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testing import catching
from tests.testing.catching import BAD, FOLDER
from vlmopt.testing import CHECKS, Settings, Verdict, check_pass
from vlmopt.testing.golden import update_golden
from vlmopt.testing.harness import subject_of
from vlmopt.testing.trial import Memory

GOOD = Path(__file__).parent / "good" / "drop_scaling.py"
EVERY = [check.name for check in CHECKS]
SHARED = Memory()


def test_every_check_has_a_bad_pass_and_every_bad_pass_a_check() -> None:
    assert sorted(BAD) == sorted(EVERY)
    assert sorted(BAD.values()) == sorted(file.stem for file in FOLDER.glob("[!_]*.py"))


@pytest.mark.parametrize("check", EVERY)
def test_a_check_catches_the_pass_that_breaks_its_rule(check: str) -> None:
    report = catching.report_on(check, memory=SHARED, checks=(check,))
    assert report.failed_checks == {check}
    assert not report.passed
    assert all(failure.found for failure in report.failures)


@pytest.mark.slow
@pytest.mark.parametrize("check", EVERY)
def test_no_other_check_blames_that_pass(check: str) -> None:
    assert catching.report_on(check, memory=SHARED).failed_checks == {check}


def test_an_honest_pass_passes_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)  # where it is set, golden texts are not written
    settings = Settings(golden=tmp_path, n_programs=2)
    assert len(update_golden(subject_of(str(GOOD), settings=settings), tmp_path)) == 3
    report = check_pass(str(GOOD), settings=settings, memory=SHARED)
    assert [result.one_line() for result in report.results if not result.is_fine] == []
    assert {result.check for result in report.results if result.verdict is Verdict.PASSED} == set(EVERY)
