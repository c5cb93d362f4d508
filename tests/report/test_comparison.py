"""Several runs beside each other: one row each, what differs, and what forbids to compare."""

from __future__ import annotations

from typing import Any

import pytest

from tests.report.markup import loaded, parse
from tests.report.sample import full, report
from vlmopt.report.comparing import Comparison, compare, comparison_plot
from vlmopt.report.html import compare_html
from vlmopt.report.schema import read_report


def harder() -> dict[str, Any]:
    """The same model and task under a larger bound: another branch is cut and the metric is lower."""
    found = full()
    found["branches"][2] |= {"kept": False}
    found["result"]["metric"] |= {"optimized": 0.69, "drop_points": 3.0, "drop_interval95": [0.5, 5.5]}
    found["result"]["latency_ms"]["image_encoder"]["optimized"]["median_ms"] = 6.0
    return found


def compared(*reports: dict[str, Any]) -> Comparison:
    return compare([read_report(found) for found in reports])


def test_like_runs_are_compared_without_a_warning_and_with_their_latencies() -> None:
    comparison = compared(full(), harder())
    assert comparison.warnings == ()
    assert comparison.is_one_machine
    assert comparison.is_one_task
    plot = comparison_plot(comparison)
    assert plot is not None
    assert "median latency, ms" in plot
    assert plot.count("<circle") == 2


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("model", "fingerprint"), "ff" * 32, "different models"),
        (("task", "name"), "other", "different tasks"),
        (("task", "fingerprint"), "ff" * 32, "different data"),
        (("task", "n_test"), 7, "different data"),
        (("task", "metric"), "recall@1", "different metrics"),
        (("machine", "processor"), "Another", "different machines"),
        (("machine", "n_threads"), 3, "different machines"),
        (("machine",), None, "on which machine"),
        (("task",), None, "without a task"),
        (
            ("gates",),
            [{"name": "g", "passed": False, "found": 1.0, "allowed": 0.5}],
            "style | drawing (2) failed a check",
        ),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_what_forbids_to_compare_is_said(path: tuple[str, ...], value: object, expected: str) -> None:
    other = harder()
    section = other
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = value
    warnings = compared(full(), other).warnings
    assert len(warnings) == 1
    assert expected in warnings[0].replace("(no task)", "style | drawing (2)")


def test_latencies_of_different_machines_are_not_put_side_by_side() -> None:
    other = harder()
    other["machine"]["processor"] = "Another"
    page = parse(compare_html([full(), other]))
    heads = [e.text for e in page.all("th") if e.attributes["scope"] == "col"]
    assert "latency" not in heads
    assert "speed-up" in heads
    plot = comparison_plot(compared(full(), other))
    assert plot is not None
    assert "MACs for one sample" in plot


def test_metrics_of_different_tasks_are_drawn_as_changes() -> None:
    other = harder()
    other["task"]["name"] = "other"
    plot = comparison_plot(compared(full(), other))
    assert plot is not None
    assert "change of the metric in points" in plot


def test_the_matrix_says_which_branches_each_run_of_a_model_keeps() -> None:
    (matrix,) = compared(full(), harder()).matrices
    assert len(matrix.rows) == 12
    assert matrix.differing == (("image_encoder", "layers.1.attention", (True, False)),)


def test_runs_of_different_models_share_no_matrix() -> None:
    other = harder()
    other["model"]["fingerprint"] = "ff" * 32
    assert compared(full(), other).matrices == ()
    assert len(compared(full(), other, harder()).matrices) == 1


def test_the_page_has_a_row_for_every_run_and_loads_nothing() -> None:
    page = parse(compare_html([full(), harder(), report()], labels=["out/<a>", "out/b", "out/b"]))
    assert page.unclosed == []
    assert loaded(page) == []
    rows = [e.text for e in page.all("th") if e.attributes["scope"] == "row"]
    assert rows[:3] == ["out/<a>", "out/b (1)", "out/b (2)"]
    assert len(page.all("script")) == 1
    assert "1 branch differs" in page.section("branches") or "branches differ" in page.section("branches")
