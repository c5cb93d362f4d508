from __future__ import annotations

from typing import Any

from tests.report.sample import full
from vlmopt.report import read_report, render_markdown
from vlmopt.report.html import render_html
from vlmopt.report.sections import cost_rows, facts


def measured(original: float | None, optimized: float | None, note: str) -> dict[str, Any]:
    found = full()
    pair = found["result"]["latency_ms"]["image_encoder"]
    pair["original"]["joules"], pair["optimized"]["joules"] = original, optimized
    found["result"]["energy"] = note
    return found


def test_energy_stands_beside_latency_and_says_what_it_includes() -> None:
    found = measured(1.5, 0.375, "package energy, other processes included")
    text = render_markdown(found)
    assert "| image_encoder energy | 1.5 J | 375 mJ | 4.00 times smaller |" in text
    assert "Package energy, other processes included." in text
    rows = {row.label: row for row in cost_rows(read_report(found))}
    row = rows["energy of image_encoder (mean)"]
    assert (row.before, row.after, row.change, row.tone) == ("1.5 J", "375 mJ", "4.00× smaller", "good")
    assert "energy of text_encoder (mean)" not in rows
    assert "375 mJ" in render_html(found)


def test_where_energy_is_unavailable_the_report_says_so_and_shows_no_number() -> None:
    note = "energy is unavailable: no package in /sys/class/powercap; no perf event power/energy-pkg/"
    found = measured(None, None, note)
    assert f"E{note[1:]}." in render_markdown(found)
    assert " energy |" not in render_markdown(found)
    assert ("energy", note) in facts(read_report(found))
    assert not any("energy" in row.label for row in cost_rows(read_report(found)))
