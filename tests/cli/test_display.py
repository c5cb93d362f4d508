from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from vlmopt.cli.display import LiveProgress, PlainProgress
from vlmopt.cli.generic import lines_of


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_prints_a_line_when_a_stage_begins_and_ends() -> None:
    stream, clock = StringIO(), Clock()
    with PlainProgress(stream, clock=clock).stage("capture"):
        clock.now = 2.5
    assert stream.getvalue() == "capture ...\ncapture: done in 2.5 s\n"


def test_plain_progress_says_that_a_stage_stopped() -> None:
    stream = StringIO()
    with pytest.raises(ValueError, match="x"), PlainProgress(stream, clock=Clock()).stage("capture"):
        raise ValueError("x")
    assert stream.getvalue().splitlines()[-1] == "capture: stopped after 0.0 s"


def test_plain_progress_prints_at_most_one_line_every_five_seconds() -> None:
    stream, clock = StringIO(), Clock()
    seen = []
    for item in PlainProgress(stream, clock=clock).track(range(100), "samples"):
        seen.append(item)
        clock.now += 1.0
    assert seen == list(range(100))
    assert stream.getvalue().splitlines()[:2] == ["  samples: 5 of 100", "  samples: 10 of 100"]
    assert len(stream.getvalue().splitlines()) == 19


def test_plain_progress_counts_items_of_unknown_number() -> None:
    stream, clock = StringIO(), Clock()
    for _ in PlainProgress(stream, clock=clock).track(iter("abcdefg"), "samples"):
        clock.now += 3.0
    assert stream.getvalue().splitlines() == ["  samples: 2", "  samples: 4", "  samples: 6"]


def test_live_progress_keeps_a_line_for_every_stage_and_hands_on_every_item() -> None:
    stream = StringIO()
    show = LiveProgress(Console(file=stream, force_terminal=True, width=80))
    with show.stage("profile"):
        assert list(show.track([1, 2, 3], "[bold]branches")) == [1, 2, 3]
        show.message("a line that stays")
    assert "✓ profile" in stream.getvalue()
    assert "a line that stays" in stream.getvalue()


def test_live_progress_marks_a_stage_that_failed_and_can_go_on() -> None:
    stream = StringIO()
    show = LiveProgress(Console(file=stream, force_terminal=True, width=80))
    with pytest.raises(ValueError, match="x"), show.stage("profile"):
        raise ValueError("x")
    with show.stage("again"):
        pass
    assert "✗ profile" in stream.getvalue()
    assert "✓ again" in stream.getvalue()


def test_plain_data_becomes_indented_lines() -> None:
    data = {"metric": {"value": 0.75, "interval95": [0.5, 1.0]}, "ok": True, "rows": [{"a": 1, "b": None}, {"a": 2}]}
    assert list(lines_of(data)) == [
        "metric:",
        "  value: 0.75",
        "  interval95: 0.5, 1",
        "ok: yes",
        "rows:",
        "  - a: 1",
        "    b: none",
        "  - a: 2",
    ]
