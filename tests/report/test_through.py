"""What a cross-modal adapter lets through is drawn: a tile for each place of an image, a row for each word."""

from __future__ import annotations

from tests.report.sample import full
from vlmopt.report.html import render_html

THROUGH = {
    "places": [0.01, 0.02, 0.04, 0.0],
    "words": [{"text": "colour", "n": 7, "share": 0.125}, {"text": "<b>", "n": 3, "share": 0.5}],
}


def test_places_and_words_are_drawn_with_their_numbers() -> None:
    page = render_html({**full(), "through": THROUGH})
    section = page.partition('<section id="through"')[2].partition("</section>")[0]
    assert section.count("<rect ") == 4
    assert [f"{i}: {share} %" in section for i, share in ((1, 1), (2, 2), (3, 4), (4, 0))] == [True] * 4
    assert 'fill-opacity="1.0"' in section
    assert "from 0 to 4 % of an image" in section
    assert "12.5 %, 7 times" in section
    assert "&lt;b&gt;" in section
    assert "<b>" not in section


def test_a_run_without_such_an_adapter_has_no_section() -> None:
    assert 'id="through"' not in render_html(full())
