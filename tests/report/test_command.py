"""`vlmopt report` writes files: html or what the ending says, never over a file that is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.sample import full, report
from vlmopt.cli import entry


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    paths = []
    for name, found in (("a", full()), ("b", report())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(found), encoding="utf-8")
        paths.append(str(tmp_path / name))
    return paths


def test_one_run_becomes_a_page(runs: list[str], tmp_path: Path) -> None:
    page = tmp_path / "new folder" / "page.html"
    assert entry.run(["report", runs[0], "-o", str(page)]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_several_runs_become_one_page_with_their_folders_as_names(runs: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.out"
    assert entry.run(["report", *runs, "--format", "html", "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "Comparison of 2 runs" in text
    assert all(path in text for path in runs)


def test_a_page_can_go_down_a_pipe(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["report", runs[0], "--format", "html"]) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")


@pytest.mark.parametrize(("ending", "start"), [("md", "# dual for"), ("json", "{"), ("HTML", "<!doctype")])
def test_the_ending_decides_the_format(runs: list[str], tmp_path: Path, ending: str, start: str) -> None:
    file = tmp_path / f"out.{ending}"
    assert entry.run(["report", runs[0], "-o", str(file)]) == 0
    assert file.read_text(encoding="utf-8").startswith(start)


def test_an_ending_that_says_nothing_is_refused(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.run(["report", runs[0], "-o", str(tmp_path / "out.pdf")]) == 2
    assert ".html, .htm, .md, .json" in capsys.readouterr().err


def test_a_file_that_is_there_is_replaced_only_by_force(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.html"
    file.write_text("mine", encoding="utf-8")
    assert entry.run(["report", runs[0], "-o", str(file)]) == 1
    assert "page.html: exists already; choose another path, or --force replaces it" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "mine"
    assert entry.run(["report", runs[0], "-o", str(file), "--force"]) == 0
    assert file.read_text(encoding="utf-8") != "mine"
    assert entry.run(["report", runs[0], "--format", "html", "-o", str(tmp_path), "--force"]) == 1
    assert "is a folder" in capsys.readouterr().err


def test_a_broken_report_among_several_is_named_and_nothing_is_written(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(runs[1]) / "report.json").write_text("{}", encoding="utf-8")
    assert entry.run(["report", *runs, "-o", str(tmp_path / "page.html")]) == 1
    assert f"{runs[1]}/report.json" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
