"""The differences between two runs as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmopt.report.quantities import count
from vlmopt.report.table import Table

_WIDEST = 70


def diff_tables(found: Mapping[str, Any]) -> list[Table]:
    """One table a section that has something to say."""
    titles = ("", *found["runs"])
    tables = [
        Table(title, titles, tuple((row["what"], *_cells(row, title)) for row in rows), n_text_columns=3)
        for title, rows in found["differences"].items()
        if rows
    ]
    if found["quality"]:
        rows = tuple((row["what"], _quality(row, "first"), _quality(row, "second")) for row in found["quality"])
        tables.append(Table("quality on the test split", titles, rows, note="With 95 % intervals."))
    if found["latency_ms"]:
        rows = tuple((row["what"], _latency(row["first"]), _latency(row["second"])) for row in found["latency_ms"])
        tables.append(Table("latency (ms)", titles, rows, note="Median, and the range of the middle 80 %."))
    return tables


def _cells(row: Mapping[str, Any], title: str) -> tuple[str, str]:
    first, second = row["first"], row["second"]
    return (_cell(first, title), _cell(second, title))


def _cell(value: object, title: str) -> str:
    if value is None:
        return "none"
    if title == "cost" and isinstance(value, int):
        return count(value)
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def _quality(row: Mapping[str, Any], side: str) -> str:
    found = row[side]
    if found is None:
        return "not measured"
    scale = 1.0 if row["what"].startswith("drop") else 100.0
    low, high = (scale * bound for bound in found["interval95"])
    return f"{scale * found['value']:.1f} [{low:.1f}, {high:.1f}]"


def _latency(found: Mapping[str, float] | None) -> str:
    return "gone" if found is None else f"{found['median_ms']:.2f} [{found['p10_ms']:.2f}, {found['p90_ms']:.2f}]"
