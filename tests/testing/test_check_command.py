"""`vlmopt passes check`: exit codes, one line a check, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.testing.catching import FOLDER
from tests.testing.test_catching import GOOD
from vlmopt.cli import entry
from vlmopt.testing import CHECKS

QUICK = ["--check", "saves-what-it-predicts", "--check", "keeps-its-options", "--check", "runs-to-the-end"]


def check(*words: object) -> int:
    return entry.run(["passes", "check", *(str(word) for word in words)])


def test_a_pass_that_keeps_its_word_ends_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(GOOD, *QUICK) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        "passed  keeps-its-options",
        "passed  runs-to-the-end  (3 cases)",
        "passed  saves-what-it-predicts  (3 cases)",
    ]
    assert out[3].startswith("drop-scaling keeps its word: 3 checks passed (")


def test_checks_that_do_not_apply_are_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["is-sound-after-every-site", "keeps-its-promise", "matches-its-golden-text"]
    assert check(GOOD, *(word for name in words for word in ("--check", name))) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        "passed  keeps-its-promise  (3 cases)",
        "passed  is-sound-after-every-site  (1 of 3 cases)",
        "-       matches-its-golden-text  (no folder of golden texts was given)",
    ]
    assert out[3].startswith("drop-scaling keeps its word: 2 checks passed, 1 does not apply (")


def test_a_pass_that_does_not_ends_with_three_and_is_told_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(FOLDER / "drop_for_nothing.py", *QUICK) == 3
    out = capsys.readouterr().out
    assert (
        "failed  saves-what-it-predicts\n"
        "        case 'by one': predicted against counted: activation_bytes 0 against 16\n"
        "          expected: the same number\n"
        "          remedy: vlmopt.graph.costing.nodes_cost"
    ) in out
    assert "drop-for-nothing: 1 of 3 checks failed" in out


def test_what_a_pass_prints_does_not_spoil_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(FOLDER / "drop_and_print.py", "--json", "--check", "stays-silent", "--seed", 3) == 3
    data = json.loads(capsys.readouterr().out)
    assert (data["name"], data["passed"]) == ("drop-and-print", False)
    assert [(row["check"], row["case"], row["verdict"]) for row in data["results"]] == [
        ("stays-silent", "by one", "failed")
    ]
    assert data["results"][0]["found"] == "apply model/mul printed 'removed model/mul'"


def test_a_pass_that_never_ends_is_stopped_at_the_time_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        check(FOLDER / "drop_for_ever.py", "--time-limit", 1, "--check", "ends-in-time", "--check", "exports-again")
        == 3
    )
    out = capsys.readouterr().out
    assert "apply model/mul is not done after 1 s" in out
    assert "not run exports-again" in out


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["nothing-there"], 1, "there is no pass of that name"),
        ([FOLDER / "nowhere.py"], 1, "there is no such file"),
        ([FOLDER / "drop_with_unknown_fact.py"], 1, "the unregistered fact"),
        (["canonicalize", "--check", "keeps-its-promises"], 1, "did you mean 'keeps-its-promise'?"),
        ([], 2, "Missing argument 'NAME|FILE'"),
        (["canonicalize", "--update-golden"], 2, "--update-golden needs --golden DIR"),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    words: list[object], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(*words) == code
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""


def test_checks_are_listed_with_what_they_hold_a_pass_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--list-checks") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [made.name for made in CHECKS]
    assert check("--list-checks", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["checks"]
    assert [row["description"] for row in listed] == [made.description for made in CHECKS]


def test_golden_texts_are_written_when_asked_and_then_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    words = [GOOD, "--golden", tmp_path, "--check", "matches-its-golden-text"]
    assert check(*words) == 3
    assert check(*words, "--update-golden") == 0
    assert capsys.readouterr().err.count("golden text written: ") == 3
    assert check(*words) == 0
    monkeypatch.setenv("CI", "true")
    assert check(*words, "--update-golden") == 1
    assert "are not written where CI is set" in capsys.readouterr().err
