"""How layers mix their experts is drawn, a column a layer and a row an expert, and differs between two runs."""

from __future__ import annotations

from typing import Any

from tests.report.sample import full
from vlmopt.report.html import render_html
from vlmopt.report.markdown import render_markdown


def mixture(layer: str, shares: list[float], *, is_routed: bool = True) -> dict[str, Any]:
    spread = [0.125] * len(shares)
    return {"component": "decoder", "layer": layer, "is_routed": is_routed, "shares": shares, "spread": spread}


MIXTURES = [
    mixture("layers.0.up", [0.25, 0.75]),
    mixture("layers.1.up", [0.5, 0.5]),
    mixture("layers.2.up", [1.0, 0.0]),
    mixture("layers.0.<down>", [0.2, 0.3, 0.5], is_routed=False),
]


def test_layers_that_share_experts_lie_beside_each_other() -> None:
    page = render_html({**full(), "mixtures": MIXTURES})
    section = page.partition('<section id="mixtures"')[2].partition("</section>")[0]
    assert section.count("<rect ") == 3 * 2 + 3
    assert "decoder/layers.N.up: 3 layers, 2 experts, 0 to 100 %" in section
    assert "layers.0.up, expert 2: 75 %" in section
    assert "&lt;down&gt;" in section
    assert "<down>" not in section
    first, second = section.index("layers.2.up, expert 1"), section.index("layers.0.up, expert 2")
    assert first < second  # rows are experts


def test_the_table_names_shares_and_how_they_spread() -> None:
    text = render_markdown({**full(), "mixtures": MIXTURES})
    assert "25.0 75.0 | 12.5 12.5 |" in text
    assert "learned | 20.0 30.0 50.0 |  |" in text


def test_a_run_without_experts_has_no_section() -> None:
    assert 'id="mixtures"' not in render_html(full())
