"""The page as text: what it says, that it needs nothing else, and that nobody's words become markup."""

from __future__ import annotations

import json
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.report.markup import Page, loaded, parse
from tests.report.sample import PICTURE, full, item, report
from vlmopt.core.errors import ArtifactError
from vlmopt.report.charts import chosen_trial
from vlmopt.report.html import render_html
from vlmopt.report.schema import read_report
from vlmopt.report.sections import safe_image

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"


def page_of(found: dict[str, Any]) -> Page:
    return parse(render_html(found))


def without_new_sections() -> dict[str, Any]:
    """What the first version wrote."""
    found = report()
    found["result"]["metric"]["all"] = {"accuracy": [72.0, 71.5], "macro_f1": [70.0, 69.0]}
    return found


def bare() -> dict[str, Any]:
    found = report()
    found |= {"task": None, "passes": [], "branches": [], "gates": [], "stages": [], "warnings": [], "reproduce": ""}
    found["result"] |= {"metric": None, "size_bytes": None, "latency_ms": {}}
    return found


ALL = pytest.mark.parametrize("found", [full(), report(), without_new_sections(), bare()],
                              ids=["full", "small", "first version", "bare"])  # fmt: skip


@ALL
def test_a_page_is_well_formed_and_loads_nothing(found: dict[str, Any]) -> None:
    page = page_of(found)
    assert page.unclosed == []
    assert loaded(page) == []
    policy = next(e.attributes["content"] for e in page.all("meta") if "http-equiv" in e.attributes)
    assert policy.startswith("default-src 'none';")
    assert "url(" not in render_html(found)
    assert "@import" not in render_html(found)


@ALL
def test_headings_come_in_order_and_ids_are_unique(found: dict[str, Any]) -> None:
    page = page_of(found)
    levels = [int(e.tag[1]) for e in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    targets = [e.attributes["href"][1:] for e in page.all("a")]
    assert set(targets) <= set(ids)


@ALL
def test_tables_name_their_columns_and_pictures_have_words(found: dict[str, Any]) -> None:
    page = page_of(found)
    assert all(e.attributes.get("scope") in ("col", "row", "colgroup") for e in page.all("th"))
    assert all(e.attributes.get("alt") for e in page.all("img"))
    pictures = [e for e in page.all("svg") if "svg" not in e.parents]
    assert all(e.attributes.get("aria-label") or e.attributes.get("aria-hidden") or e.attributes.get("role")
               for e in pictures)  # fmt: skip


def test_the_page_shows_every_section_of_a_full_report() -> None:
    page = page_of(full())
    ids = {e.attributes["id"] for e in page.all("section")}
    assert ids == {
        "summary", "before-after", "model", "choice", "passes", "items", "groups", "checks", "reproduce",
    }  # fmt: skip
    assert "72.0 % [65.0 to 78.0]" in page.section("before-after")
    assert "0.5 [−1.2 to 2.5] points" in page.section("before-after")
    assert "macro_f170.0 %69.0 %−1.0 points" in page.section("before-after").replace("\N{NO-BREAK SPACE}", " ")
    assert "32 ms (31 to 33)" in page.section("before-after")
    assert "latency of text_encoder (median)5 msgone" in page.section("before-after").replace(" gone", "gone")
    assert "8 cuts measured on 150 items" in page.section("choice")
    assert "2 k2.01 k differs" in page.section("passes")
    assert "Refused: read behind it (2)" in page.section("passes")
    assert "3 were right and are wrong now (lost), 2 were wrong and are right now (gained), 1" in page.section("items")
    assert "how many yellow crosses are there?12100.097.03.0too few items" in page.section("groups")
    assert "Warning: the test split is small" in page.section("checks")
    assert "seed7" in page.section("reproduce").replace(" ", "")
    assert "vlmopt optimize --recipe out/recipe.yaml -o again" in page.section("command")


def test_sections_without_data_are_left_out() -> None:
    ids = {e.attributes["id"] for e in page_of(bare()).all("section")}
    assert ids == {"summary", "before-after", "reproduce"}
    assert {e.attributes["href"] for e in page_of(bare()).all("a")} == {"#main", *(f"#{id_}" for id_ in ids)}


def test_metrics_of_the_first_version_in_percent_are_not_taken_for_fractions() -> None:
    assert page_of(without_new_sections()).section("before-after") == page_of(report()).section("before-after")


def poisoned(value: Any) -> Any:
    """Every text of a report but those of a closed set replaced by one that tries to leave its place."""
    if isinstance(value, dict):
        closed = ("promise", "image", "schema", "certainty")
        return {key: entry if key in closed else poisoned(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [poisoned(entry) for entry in value]
    return HOSTILE if isinstance(value, str) else value


def test_no_text_of_a_report_becomes_markup() -> None:
    found = full()
    found["result"]["metric"]["all"] = {HOSTILE: [0.7, 0.6]}
    found["result"]["latency_ms"] = {HOSTILE: found["result"]["latency_ms"]["image_encoder"]}
    found["machine"]["versions"] = {HOSTILE: HOSTILE}
    clean, page = page_of(full()), page_of(poisoned(found))
    assert page.unclosed == []
    assert len(page.all("script")) == len(clean.all("script")) == 1
    assert not [e for e in page.elements if any(name.startswith("on") for name in e.attributes)]
    assert [e.attributes["src"] for e in page.all("img")] == [PICTURE] * 3
    assert "alert(1)" in page.section("command")
    assert "49" not in page.section("title")


@pytest.mark.parametrize(
    "source",
    [
        "https://example.org/a.png",
        "javascript:alert(1)",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        'data:image/png;base64,AAAA" onload="alert(1)',
        "data:image/png;base64,AAAA\n",
        "file:///etc/passwd",
        " " + PICTURE,
    ],
)
def test_only_small_pictures_inside_the_file_are_shown(source: str) -> None:
    assert safe_image(source) == ""
    found = full()
    found["result"]["metric"]["changes"]["items"] = [item("lost", 0, image=source), item("lost", 1)]
    assert [e.attributes["src"] for e in page_of(found).all("img")] == [PICTURE]


def test_the_chosen_cut_is_the_accepted_one_that_saves_most() -> None:
    found = full()
    assert chosen_trial(read_report(found)) == 2  # 0.02 * 3**3 points are accepted, 0.02 * 4**3 are not
    found["plan"]["trials"] = [trial | {"is_accepted": False} for trial in found["plan"]["trials"]]
    assert chosen_trial(read_report(found)) is None


def test_a_report_that_breaks_the_schema_is_refused() -> None:
    with pytest.raises(ArtifactError, match="result.metric.n"):
        found = full()
        found["result"]["metric"]["n"] = "many"
        render_html(found)


def test_the_same_report_gives_the_same_bytes() -> None:
    assert render_html(full()) == render_html(json.loads(json.dumps(full())))


def test_templates_styles_and_scripts_are_part_of_the_package() -> None:
    root = Path(__file__).resolve().parents[2]
    package = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    packed = {path for pattern in package["vlmopt"] for path in (root / "vlmopt").glob(pattern)}
    needed = {path for path in (root / "vlmopt" / "report").rglob("*.*") if path.suffix in (".html", ".css", ".js")}
    assert len(needed) > 5
    assert needed <= packed


def test_the_report_of_a_run_is_shown_with_its_own_numbers(classifier: Path) -> None:
    found = json.loads((classifier / "report.json").read_text(encoding="utf-8"))
    page = page_of(found)
    metric = found["result"]["metric"]
    assert page.unclosed == []
    assert f"{100 * metric['original']:.1f} % [" in page.section("before-after")
    n_cut = sum(not branch["kept"] for branch in found["branches"])
    assert f"{n_cut} of {len(found['branches'])}" in page.section("summary")
    assert found["model"]["fingerprint"] in page.section("reproduce")
