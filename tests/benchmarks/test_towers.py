"""From measured cells to figures and pictures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.benchmarks import picture, towers

PLAN = [("ours", "head"), ("random0", "head"), ("random1", "head")]


def cell(method: str, budget: float, drop: float) -> dict[str, object]:
    return {
        "method": method, "level": "head", "budget": budget, "macs_saved": budget + 0.01, "drop_points": drop,
        "low95": drop - 1, "high95": drop + 1, "original": 60.0, "n_test": 100, "cut": [],
    }  # fmt: skip


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    drops = {"ours": (-1.0, 0.5, 1.0, 1.1, 9.0), "random0": (0.5, 4, 9, 9, 9), "random1": (1.5, 5, 9, 9, 9)}
    cells = [cell(m, b, d) for m, own in drops.items() for b, d in zip(towers.BUDGETS, own, strict=True)]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "toy.json").write_text(json.dumps(cells))
    monkeypatch.setenv("VLMOPT_CACHE", str(tmp_path))
    return towers.figures("toy", PLAN)


def test_the_most_that_is_saved_within_a_point(measured: dict[str, float]) -> None:
    assert measured["toy_macs_saved_at_1pt"] == measured["toy_macs_saved_at_1pt_ours_head"] == pytest.approx(0.66)
    assert measured["toy_macs_saved_at_1pt_random_head"] == pytest.approx(0.31)  # a mean of 1 point over two orders
    assert measured["toy_random_head_50_drop_points"] == pytest.approx(4.5)
    assert measured["toy_n_test"] == 100


def test_a_picture_has_a_curve_a_method(measured: dict[str, float]) -> None:
    curves = picture.curves_of(measured, "toy")
    assert [(curve.name, len(curve.points)) for curve in curves] == [("ours head", 5), ("random head", 5)]
    drawn = ET.fromstring(picture.draw(curves, title="a & b"))
    lines = [node for node in drawn.iter() if node.tag.endswith("polyline")]
    assert len(lines) == 2
    assert all(
        0 <= float(y) <= picture.HEIGHT for line in lines for y in line.attrib["points"].replace(",", " ").split()[1::2]
    )
