"""The page in a real browser: narrow and wide, light and dark, without JavaScript, by mouse and keys, on paper."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report import browser as chromium
from tests.report.browser import Browser
from tests.report.looks import problems
from tests.report.sample import full
from tests.report.test_plan_shown import front
from vlmopt.report.html import compare_html, front_html, render_html

SIZES = pytest.mark.parametrize("width", [360, 768, 1280])
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
PAGES = pytest.mark.parametrize("name", ["run", "comparison", "front"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    reason = chromium.missing()
    if reason and os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{reason}, and CI must look at the page")
    if reason:
        pytest.skip(reason)
    with chromium.open_browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def pages(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of a real run, in which sections that it did not write are filled, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    run = json.loads((classifier / "report.json").read_text(encoding="utf-8"))
    filled(run, full())
    other = json.loads(json.dumps(run))
    other["branches"][0]["kept"] = not other["branches"][0]["kept"]
    other["machine"]["processor"] = "Another"
    (folder / "run.html").write_text(render_html(run), encoding="utf-8")
    (folder / "front.html").write_text(front_html(front()), encoding="utf-8")
    labels = ["out/a rather long name of a folder/for-style", "out/b"]
    (folder / "comparison.html").write_text(compare_html([run, other], labels=labels), encoding="utf-8")
    return folder


def filled(run: dict[str, Any], sample: dict[str, Any]) -> None:
    """Takes from the sample what the run left empty."""
    metric, more = run["result"]["metric"], sample["result"]["metric"]
    for section, source, names in (
        (metric, more, ("groups", "changes")),
        (run, sample, ("plan", "machine", "recipe", "warnings")),
    ):
        for name in names:
            section[name] = section.get(name) or source[name]
    if not metric["changes"]["items"]:
        metric["changes"] = more["changes"]


@PAGES
@SCHEMES
@SIZES
def test_nothing_is_wrong_at_any_width_in_light_and_dark(
    browser: Browser, pages: Path, tmp_path: Path, name: str, width: int, scheme: str
) -> None:
    browser.look(width=width, scheme=scheme)
    browser.open(pages / f"{name}.html")
    assert problems(browser, width=width, scheme=scheme) == []
    browser.run("for (const e of document.querySelectorAll('details')) e.open = true;")
    assert problems(browser, width=width, scheme=scheme) == []
    browser.screenshot(tmp_path / f"{name}-{width}-{scheme}.png")
    assert (tmp_path / f"{name}-{width}-{scheme}.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("<style>.note { color: #999; }</style>", "contrast 2."),
        ("<div style='width: 2000px'>wide</div>", "the page is 20"),
        ("<style>h2 { visibility: hidden; }</style>", "not to be seen: Before and after"),
        ("<script>console.error('lost');</script>", "lost"),
        ("<img src='http://127.0.0.1:9/a.png' alt='x'>", "Content Security Policy"),
        ("<svg class='plot' height='30'><text y='20'>one</text><text y='20'>two</text></svg>", "one lies over two"),
    ],
    ids=["contrast", "width", "heading", "console", "network", "overlap"],
)
def test_a_spoiled_page_is_noticed(browser: Browser, pages: Path, tmp_path: Path, spoil: str, expected: str) -> None:
    text = (pages / "run.html").read_text(encoding="utf-8")
    (tmp_path / "spoiled.html").write_text(text.replace("</main>", f"{spoil}</main>"), encoding="utf-8")
    browser.look(width=768)
    browser.open(tmp_path / "spoiled.html")
    assert expected in "\n".join(problems(browser, width=768))


def test_a_line_behind_a_text_is_no_colour_behind_it(browser: Browser, pages: Path, tmp_path: Path) -> None:
    line = "<line x1='40' x2='40' y1='0' y2='30' class='grid'/><text x='40' y='20' text-anchor='middle'>word</text>"
    text = (pages / "run.html").read_text(encoding="utf-8")
    (tmp_path / "lined.html").write_text(text.replace("</main>", f"<svg class='plot' height='30'>{line}</svg></main>"))
    browser.look(width=768)
    browser.open(tmp_path / "lined.html")
    browser.run("document.querySelector('main > svg').scrollIntoView();")
    assert "word" not in "\n".join(problems(browser, width=768))


def test_a_request_is_noticed_where_the_policy_of_the_page_is_taken_away(
    browser: Browser, pages: Path, tmp_path: Path
) -> None:
    text = re.sub(r"<meta http-equiv[^>]*>", "", (pages / "run.html").read_text(encoding="utf-8"))
    (tmp_path / "open.html").write_text(
        text.replace("</main>", "<img src='http://127.0.0.1:9/a.png' alt='x'></main>"), encoding="utf-8"
    )
    browser.look(width=768)
    browser.open(tmp_path / "open.html")
    assert "asked for http://127.0.0.1:9/a.png" in problems(browser, width=768)


_TIP = "const tip = document.getElementById('tip'); return tip.hidden ? '' : tip.textContent;"
_MARK = """
const mark = document.querySelector('#model [data-evidence]');
mark.scrollIntoView({block: 'center'});
const box = mark.getBoundingClientRect();
return [mark.dataset.evidence, box.left + box.width / 2, box.top + box.height / 2];
"""


@pytest.mark.parametrize("width", [360, 1280])
def test_evidence_shows_on_hover_on_focus_and_on_tap(browser: Browser, pages: Path, width: int) -> None:
    browser.look(width=width)
    browser.open(pages / "run.html")
    evidence, x, y = browser.run(_MARK)
    assert evidence
    browser.point_at(x, y)
    assert browser.run(_TIP) == evidence
    box = browser.run("const b = document.getElementById('tip').getBoundingClientRect(); return [b.left, b.right];")
    assert 0 <= box[0] < box[1] <= width
    browser.point_at(2, 500)
    assert browser.run(_TIP) == ""
    browser.run("document.querySelector('#model [data-evidence]').focus();")
    assert browser.run(_TIP) == evidence
    browser.press("Escape")
    assert browser.run(_TIP) == ""
    browser.point_at(x, y, is_click=True)
    assert browser.run(_TIP) == evidence


def test_the_button_switches_between_light_and_dark_whatever_the_system_wants(browser: Browser, pages: Path) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor;"
    found = {}
    for scheme in ("light", "dark"):
        browser.look(width=1280, scheme=scheme)
        browser.open(pages / "run.html")
        found[scheme] = browser.run(colour)
        browser.run("document.getElementById('theme').click();")
        found[f"not {scheme}"] = browser.run(colour)
        browser.run("document.getElementById('theme').click();")
        assert browser.run(colour) == found[scheme]
    assert found["light"] == found["not dark"] == "rgb(255, 255, 255)"
    assert found["dark"] == found["not light"] != found["light"]


def test_everything_is_there_without_javascript(browser: Browser, pages: Path) -> None:
    browser.look(width=768)
    browser.open(pages / "run.html")
    words = "document.getElementById('main').innerText"
    with_script = browser.run(f"return {words}.length;")
    browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(pages / "run.html")
        assert value_of(browser, "document.getElementById('theme').hidden") is True
        assert value_of(browser, f"{words}.length") > 0.95 * with_script
        assert value_of(browser, "[...document.querySelectorAll('h2')].every(e => e.checkVisibility())") is True
        assert value_of(browser, shown_cards()) == ["gained", "lost", "other"]
        click(browser, "document.getElementById('show-lost')")
        assert value_of(browser, shown_cards()) == ["lost"]
    finally:
        browser.devtools("Emulation.setScriptExecutionDisabled", value=False)


def value_of(browser: Browser, expression: str) -> Any:
    """The value of an expression, which the developer tools see even where the page's own scripts are off."""
    return browser.devtools("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]


def click(browser: Browser, element: str) -> None:
    box = f"({element}).getBoundingClientRect()"
    browser.devtools("Runtime.evaluate", expression=f"({element}).scrollIntoView({{block: 'center'}})")
    x, y = value_of(browser, f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]")
    browser.point_at(x, y, is_click=True)


def shown_cards() -> str:
    kinds = "[...e.classList].filter(c => ['lost', 'gained', 'other'].includes(c))[0]"
    cards = "[...document.querySelectorAll('.card')].filter(e => e.checkVisibility())"
    return f"[...new Set({cards}.map(e => {kinds}))].sort()"


def test_keys_reach_every_control(browser: Browser, pages: Path) -> None:
    browser.look(width=1280)
    browser.open(pages / "run.html")
    wanted = browser.run(
        "return document.querySelectorAll('a, button:not([hidden]), summary, .scroll, input:checked, [data-evidence]"
        ":not(.plot *)').length;"
    )
    browser.run("window.reached = new Set(); document.addEventListener('focusin', e => reached.add(e.target));")
    for _ in range(wanted + 15):
        browser.press("Tab")
    missed = browser.run(
        "return [...document.querySelectorAll('a, button:not([hidden]), summary, [tabindex], input:checked')]"
        ".filter(e => !reached.has(e) && e.checkVisibility()).map(e => e.outerHTML.slice(0, 80));"
    )
    assert missed == []


def test_the_command_can_be_copied(browser: Browser, pages: Path) -> None:
    browser.look(width=1280)
    browser.open(pages / "run.html")
    click(browser, "document.querySelector('[data-copies=command]')")
    text = "document.querySelector('[data-copies]').textContent"
    later = f"new Promise(done => setTimeout(() => done({text}), 200))"
    said = browser.devtools("Runtime.evaluate", expression=later, awaitPromise=True, returnByValue=True)
    said = said["result"]["value"]
    assert said in ("Copied", "Selected: press Ctrl+C")


@SCHEMES
def test_the_summary_is_one_sheet_of_paper_in_light_colours(browser: Browser, pages: Path, scheme: str) -> None:
    browser.look(width=1280, scheme=scheme, media="print")
    browser.open(pages / "run.html")
    assert browser.run("return getComputedStyle(document.body).backgroundColor;") == "rgb(255, 255, 255)"
    assert browser.run("return document.querySelector('header.bar').checkVisibility();") is False
    whole = n_sheets(browser.pdf())
    browser.run(
        "for (const e of document.querySelectorAll('section:not(#summary), footer')) e.remove();"
        "document.getElementById('summary').style.breakAfter = 'auto';"
    )
    assert n_sheets(browser.pdf()) == 1
    assert 2 <= whole < 25


def n_sheets(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf))
