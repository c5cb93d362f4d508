"""Branches as pictures: every one of them, what happened to it and why, on one scale, at any width."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from typing import Any

import pytest

from tests.report.sample import branch, report
from vlmopt.report.branch_picture import BranchRow, branch_file, branch_pictures
from vlmopt.report.pictures.branches import COLUMN
from vlmopt.report.pictures.scale import Scale
from vlmopt.report.schema import read_report

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<img src=x onerror="alert(1)">&\x07]]>'


def rows(n_layers: int, *, n_cut: int = 0, name: str = "layers") -> list[dict[str, Any]]:
    """Attention and FFN of every layer, the first ones cut."""
    made = []
    for i in range(2 * n_layers):
        one = branch(f"{name}.{i // 2}.{'ffn' if i % 2 else 'attention'}", kept=i >= n_cut, score=0.01 * i - 0.02)
        one |= {"kind": "ffn" if i % 2 else "attention", "layer": i // 2, "macs": 1000 * (1 + i % 2)}
        one |= {"reason": "not chosen"} if i >= n_cut else {"cut_by": "2 skip-branches"}
        made.append(one)
    return made


def pictures(branches: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = branch_pictures(read_report({**report(), "branches": branches}))
    return [(picture.component, picture.svg) for picture in found]


def groups(svg: str) -> list[ElementTree.Element]:
    return [g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if "data-branch" in g.attrib]


def shape(group: ElementTree.Element) -> ElementTree.Element:
    return next(r for r in group.iter(f"{SVG}rect") if "box" in r.attrib["class"].split())


def test_every_branch_is_drawn_once_and_in_order() -> None:
    ((component, svg),) = pictures(rows(24))
    assert component == "image_encoder"
    assert [g.attrib["data-branch"] for g in groups(svg)] == [row["name"] for row in rows(24)]


def test_components_have_pictures_of_their_own_with_one_scale() -> None:
    both = [*rows(2), *({**row, "component": "text_encoder", "score": 5.0} for row in rows(1))]
    (first, image), (second, text) = pictures(both)
    assert (first, second) == ("image_encoder", "text_encoder")
    assert len(groups(text)) == 2
    for svg in (image, text):
        assert ">5</text>" in svg  # the end of the scale
    assert ElementTree.fromstring(image).attrib["id"] != ElementTree.fromstring(text).attrib["id"]


def test_cut_branches_are_hollow_dashed_crossed_and_say_so() -> None:
    ((_, svg),) = pictures(rows(3, n_cut=2))
    cut = [g for g in groups(svg) if "cut" in g.attrib["class"].split()]
    kept = [g for g in groups(svg) if "kept" in g.attrib["class"].split()]
    assert (len(cut), len(kept)) == (2, 4)
    for group in cut:
        assert shape(group).attrib["fill"] == "none"
        assert shape(group).attrib["stroke-dasharray"]
        assert any("cross" in path.attrib["class"] for path in group.iter(f"{SVG}path"))
        assert "cut" in [text.text for text in group.iter(f"{SVG}text")]
    for group in kept:
        assert shape(group).attrib["fill"] != "none"
        assert "stroke-dasharray" not in shape(group).attrib
        assert not any("cross" in path.attrib["class"] for path in group.iter(f"{SVG}path"))
    assert "6 branches: 4 kept, 2 cut" in svg


def test_the_evidence_is_there_for_hover_focus_and_readers() -> None:
    ((_, svg),) = pictures(rows(3, n_cut=1))
    first, second = groups(svg)[0], groups(svg)[4]
    lines = first.attrib["data-evidence"].split("\n")
    assert lines == [
        "layers.0.attention",
        "attention, layer 0",
        "1 k parameters, 1 k MACs (11\N{NO-BREAK SPACE}% of all branches)",
        "importance −0.02 ± 0.001 (standard error)",
        "cut: by step 2 skip-branches",
    ]
    assert second.attrib["data-evidence"].endswith("importance 0.02 ± 0.001 (standard error)\nkept: not chosen")
    for group in groups(svg):
        title = group.find(f"{SVG}title")
        assert title is not None
        assert title.text == group.attrib["aria-label"] == group.attrib["data-evidence"]
        assert group.attrib["tabindex"] == "0"
        (tip,) = [g for g in group.iter(f"{SVG}g") if g.attrib.get("class") == "tip"]
        assert "".join(tip.itertext()).startswith(group.attrib["data-branch"])


def test_colour_grows_with_importance_and_what_is_not_known_has_none() -> None:
    listed = rows(5)
    for row, score in zip(listed, [None, -1.0, 0.0, 0.001, 0.01, 0.02, 0.1, 0.3, 0.6, 1.0], strict=True):
        row["score"] = score
    ((_, svg),) = pictures(listed)
    steps = [shape(g).attrib["class"].split()[1] for g in groups(svg)]
    assert steps == ["none", "s0", "s0", "s0", "s0", "s1", "s2", "s4", "s6", "s8"]
    assert "importance not measured" in groups(svg)[0].attrib["data-evidence"]
    assert "≤ 0" in svg
    assert "grey: importance not measured" in svg


def test_values_that_are_no_numbers_count_as_not_measured() -> None:
    scale = Scale.over([float("nan"), float("inf"), None, 2.0], is_root=True)
    assert scale.maximum == 2.0
    assert [scale.step(value) for value in (float("nan"), float("inf"), None, 2.0)] == ["none", "none", "none", "s8"]


def test_the_numbers_of_the_legend_are_where_its_colours_begin() -> None:
    for is_root in (True, False):
        scale = Scale.over([0.7], is_root=is_root)
        for i in range(1, 9):
            assert scale.step(scale.bound(i) * 1.0001) == f"s{i}"
            assert scale.step(scale.bound(i) * 0.9999) == f"s{i - 1}"
        assert scale.bound(9) == pytest.approx(0.7)


def test_wider_boxes_have_more_macs() -> None:
    ((_, svg),) = pictures(rows(1))
    narrow, wide = (float(shape(g).attrib["width"]) for g in groups(svg))
    assert narrow < wide


@pytest.mark.parametrize("n_layers", [1, 3, 12, 24, 48])
def test_at_every_width_branches_lie_apart_and_inside_the_picture(n_layers: int) -> None:
    ((_, svg),) = pictures(rows(n_layers))
    places = arrangements(svg)
    assert len(places) == min(3, -(-2 * n_layers // 12))
    for width, height, columns in places:
        found = []
        for name, (dx, dy) in columns.items():
            (column,) = [g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if g.attrib.get("class") == name]
            for rectangle in (r for r in column.iter(f"{SVG}rect") if r.attrib.get("class") == "hit"):
                x, y, w, h = (float(rectangle.attrib[key]) for key in ("x", "y", "width", "height"))
                found.append((x + dx, y + dy, x + dx + w, y + dy + h))
        assert len(found) == 2 * n_layers
        assert all(x >= 0 and right <= width and y > 100 and bottom <= height for x, y, right, bottom in found)
        for a, b in combinations(found, 2):
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    assert places[-1][0] == COLUMN <= 284  # beside the margins of a page on a phone of 360 px


def arrangements(svg: str) -> list[tuple[float, float, dict[str, tuple[float, float]]]]:
    """Width, height and the place of every column, for the widest window first."""
    root = ElementTree.fromstring(svg)
    wide = {
        g.attrib["class"]: tuple(map(float, re.findall(r"[\d.]+", g.attrib["transform"])))
        for g in root.iter(f"{SVG}g")
        if re.fullmatch(r"c\d", g.attrib.get("class", ""))
    }
    found: list[Any] = [(float(root.attrib["width"]), float(root.attrib["height"]), wide)]
    for rule in re.findall(r"@media \(max-width.*", svg):
        width, height = map(float, re.search(r"width:([\d.]+)px;height:([\d.]+)px", rule).groups())  # type: ignore[union-attr]
        moved = {
            name: (float(x), float(y)) for name, x, y in re.findall(r"\.(c\d)\{\S*?\(([\d.]+)px,([\d.]+)px\)", rule)
        }
        found.append((width, height, moved))
    return found


def test_hostile_names_stay_text() -> None:
    listed = rows(1)
    for row in listed:
        row |= {"name": HOSTILE, "kind": HOSTILE, "reason": HOSTILE, "component": HOSTILE}
    ((component, svg),) = pictures(listed)
    assert component == HOSTILE
    root = ElementTree.fromstring(svg)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "style", "g", "text", "rect", "path", "circle", "title"
    }  # fmt: skip
    assert re.fullmatch(r"[\w-]+", root.attrib["id"])
    shown = [BranchRow(HOSTILE, HOSTILE, None, 1, 1)]
    page = branch_file(HOSTILE, {HOSTILE: shown}, form="html")
    assert "<img" not in page
    assert "<script" not in page
    ElementTree.fromstring(branch_file(HOSTILE, {HOSTILE: shown}, form="svg"))


def test_the_same_report_gives_the_same_bytes() -> None:
    assert pictures(rows(12, n_cut=3)) == pictures(rows(12, n_cut=3))


def test_a_report_without_branches_has_no_pictures() -> None:
    assert pictures([]) == []


def test_without_scores_the_colour_is_the_share_of_macs() -> None:
    listed = [BranchRow("a", "attention", 0, 10, 100), BranchRow("b", "ffn", 0, 10, 300)]
    svg = branch_file("model", {"encoder": listed, "empty": []}, form="svg")
    assert [shape(g).attrib["class"].split()[1] for g in groups(svg)] == ["s3", "s8"]
    assert "share of the MACs of all branches" in svg
    assert ["25 %" in "".join(g.itertext()) for g in groups(svg)] == [True, False]
    assert "kept" not in svg.split("</style>")[1]
    assert "importance" not in svg.split("</style>")[1]


def test_as_graphviz_text_every_branch_lies_between_the_stream_and_its_sum() -> None:
    listed = [BranchRow("a", "attention", 0, 1, 1), BranchRow("b", "ffn", 0, 1, 1)]
    text = branch_file("model", {"encoder": listed}, form="dot")
    edges = re.findall(r'"([^"]+)" -> "([^"]+)"', text)
    assert edges == [
        ("stream in", "a"), ("stream in", "a +"), ("a", "a +"),
        ("a +", "b"), ("a +", "b +"), ("b", "b +"), ("b +", "stream out"),
    ]  # fmt: skip
