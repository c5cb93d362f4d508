"""Pictures in a real browser: the page of a graph and its tools, and branches at every width."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report import browser as chromium
from tests.report.browser import Browser
from tests.report.graphs import transformer
from tests.report.looks import problems
from vlmopt.core.drawing import Mark
from vlmopt.report.branch_picture import BranchRow, branch_file
from vlmopt.report.drawing import drawings_page

SIZES = pytest.mark.parametrize("width", [360, 768, 1280])
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
SHOWN = "return document.querySelector('section.shown').id"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    reason = chromium.missing()
    if reason and os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{reason}, and CI must look at the pictures")
    if reason:
        pytest.skip(reason)
    with chromium.open_browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawing = transformer(6, title="image_encoder")
    marks = list(Mark)
    nodes = tuple(replace(node, mark=marks[i % len(marks)]) for i, node in enumerate(drawing.nodes))
    page = tmp_path_factory.mktemp("graph") / "graph.html"
    drawings = [replace(drawing, nodes=nodes, note="6 layers"), transformer(1, title="text_encoder")]
    page.write_text(drawings_page("a </title> <b>model</b>", drawings), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        BranchRow(f"vision.layers.{i // 2}.{'mlp' if i % 2 else 'attn'}", "ffn" if i % 2 else "cross_attention", i // 2,
                  1000, 1000 * (1 + i % 2), 0.001 * (i - 3) ** 2 - 0.004, 0.001, i % 3 > 0, "not chosen")
        for i in range(48)
    ]  # fmt: skip
    page = tmp_path_factory.mktemp("branches") / "branches.html"
    page.write_text(branch_file("model", {"image_encoder": rows, "text": rows[:6]}, form="html"), encoding="utf-8")
    return page


@SCHEMES
@SIZES
def test_nothing_is_wrong_with_either_page(
    browser: Browser, graph: Path, branches: Path, width: int, scheme: str
) -> None:
    for page in (graph, branches):
        browser.look(width=width, scheme=scheme)
        browser.open(page)
        browser.run("for (const e of document.querySelectorAll('.scripted section:not(.shown)')) e.remove()")
        assert problems(browser, width=width, scheme=scheme) == []


def test_branches_lie_in_as_many_columns_as_there_is_room_for(browser: Browser, branches: Path) -> None:
    browser.open(branches)
    script = """return [...document.querySelectorAll('.panel:first-of-type .branch .hit')].map(e => {
        const box = e.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; });"""
    for width, n_columns in ((360, 1), (768, 2), (1280, 3)):
        browser.look(width=width)
        boxes = browser.run(script)
        assert len(boxes) == 48
        assert len({left for left, *_ in boxes}) == n_columns
        assert all(left >= 0 and right <= width for left, _, right, _ in boxes)
        assert len({(left, top) for left, top, *_ in boxes}) == 48


def test_evidence_is_shown_on_hover_and_on_focus(browser: Browser, branches: Path) -> None:
    browser.look(width=1280)
    browser.open(branches)
    tips = """return [...document.querySelectorAll('.tip')].filter(e => getComputedStyle(e).display !== 'none')
        .map(e => [e.textContent, e.getBoundingClientRect().top])"""
    assert browser.run(tips) == []
    box = "const b = document.querySelectorAll('.branch .hit')[20].getBoundingClientRect();"
    browser.point_at(*browser.run(f"{box} return [b.left + 30, b.top + 8]"))
    ((words, top),) = browser.run(tips)
    assert words.startswith("vision.layers.10.attn")
    assert "importance 0.285 ± 0.001" in words
    assert top >= 0
    browser.point_at(1, 1)
    assert browser.run(tips) == []
    browser.press("Tab")
    ((words, top),) = browser.run(tips)
    assert words.startswith("vision.layers.0.attn")
    assert top >= 0


def test_the_page_of_a_graph_finds_zooms_and_tells(browser: Browser, graph: Path) -> None:
    browser.look(width=1280)
    browser.open(graph)
    assert browser.run(SHOWN) == "v0-operations"
    browser.run(
        "const f = document.getElementById('find'); f.value = 'FC2_5'; f.dispatchEvent(new Event('input')); f.focus()"
    )
    assert browser.run("return document.querySelectorAll('.found').length") == 1
    browser.press("Enter")
    seen = """const n = document.querySelector('.shown [data-key=fc2_5]').getBoundingClientRect();
        const c = document.querySelector('.shown .canvas').getBoundingClientRect();
        return n.top >= c.top && n.bottom <= c.bottom && n.left >= c.left && n.right <= c.right"""
    assert browser.run(seen) is True
    assert "encoder.layers.5.mlp.fc2_5" in browser.run("return document.getElementById('about').innerText")
    browser.press("Escape")
    assert browser.run("return document.getElementById('about').hidden") is True
    width = "return document.querySelector('.shown svg').getBoundingClientRect().width"
    before = browser.run(width)
    browser.run("document.getElementById('in').click()")
    assert browser.run(width) == pytest.approx(1.25 * before)
    browser.run("document.getElementById('fit').click()")
    fits = """const s = document.querySelector('.shown svg').getBoundingClientRect();
        const c = document.querySelector('.shown .canvas').getBoundingClientRect();
        return s.height <= c.height && s.width <= c.width"""
    assert browser.run(fits) is True


def test_a_module_of_the_overview_opens_its_operations(browser: Browser, graph: Path) -> None:
    browser.look(width=1280)
    browser.open(graph)
    choose = "const v = document.getElementById('view'); v.value = arguments[0]; v.dispatchEvent(new Event('change'))"
    browser.run(choose, "v0-modules")
    assert browser.run(SHOWN) == "v0-modules"
    node = "document.querySelector('.shown .n.group:nth-of-type(7)')"
    browser.run(f"{node}.dispatchEvent(new MouseEvent('dblclick', {{bubbles: true}}))")
    assert browser.run(SHOWN) == "v0-operations"
    assert browser.run("return document.querySelector('.shown .canvas').scrollTop") > 500
    browser.run(choose, "v1-operations")
    assert browser.run("return document.querySelectorAll('.shown .n').length") == 23


def test_without_scripts_every_drawing_is_there(browser: Browser, graph: Path) -> None:
    browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(graph)
        browser.devtools("Emulation.setScriptExecutionDisabled", value=False)
        assert browser.run("return document.documentElement.className") == ""
        heights = browser.run("return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height)")
        assert len(heights) == 4
        assert min(heights) > 100
    finally:
        browser.devtools("Emulation.setScriptExecutionDisabled", value=False)
