"""Golden texts are compared both ways and are never written in silence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from tests.testing import honest
from tests.testing.good.drop_scaling import DropScaling
from vlmopt.core.contract import Case
from vlmopt.core.errors import OutputExistsError
from vlmopt.testing import Settings, check_pass
from vlmopt.testing.golden import golden_path, update_golden
from vlmopt.testing.harness import subject_of

CHECKS = ["matches-its-golden-text", "has-no-orphaned-golden-text"]


def found_in(folder: Path) -> list[str]:
    report = check_pass(DropScaling, checks=CHECKS, settings=Settings(golden=folder))
    return [failure.found for failure in report.failures]


def test_texts_are_missing_then_written_then_equal_then_stale_then_orphaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    folder = tmp_path / "golden texts"
    assert [text.rpartition("/")[2] for text in found_in(folder)] == ["by-one.txt", "twice.txt", "by-two.txt"]
    assert not folder.exists()
    subject = subject_of(DropScaling)
    assert len(update_golden(subject, folder)) == 3
    assert update_golden(subject, folder) == []
    assert found_in(folder) == []
    path = golden_path(folder, "drop-scaling", "by one")
    path.write_text(path.read_text().replace("relu", "tanh"))
    assert [text.partition(", ")[2] for text in found_in(folder)] == [
        "line 7: '%2: float32[batch, 4] = relu (%1)' instead of '%2: float32[batch, 4] = tanh (%1)'"
    ]
    path.rename(path.with_name("old.txt"))
    assert [text.partition(str(folder))[2] for text in found_in(folder)] == [
        "/drop-scaling/by-one.txt",
        "/drop-scaling/old.txt belongs to no case",
    ]
    assert sorted(touched.name for touched in update_golden(subject, folder)) == ["by-one.txt", "old.txt"]
    assert found_in(folder) == []


def test_nothing_is_written_where_ci_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(OutputExistsError, match="not written where CI is set"):
        update_golden(subject_of(DropScaling), tmp_path)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class DropAlike(DropScaling):
    name: ClassVar[str] = "drop-alike"

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("by one", lambda: honest.scaled(1.0), n_sites=1)
        yield Case("by  One!", lambda: honest.scaled(1.0), n_sites=1)


def test_two_cases_of_one_file_are_refused(tmp_path: Path) -> None:
    report = check_pass(DropAlike, checks=CHECKS, settings=Settings(golden=tmp_path))
    assert [failure.found for failure in report.failures] == [
        "shares by-one.txt with the case 'by  One!'",
        "shares by-one.txt with the case 'by one'",
    ]
