"""Drawings as one page that needs nothing else: search, zoom, an outline of the modules, a key of the marks."""

from __future__ import annotations

from collections.abc import Sequence

from vlmopt.core.drawing import Drawing, Mark
from vlmopt.report.pictures.folding import folded
from vlmopt.report.pictures.graph_svg import badge, inner_svg, meaning, style
from vlmopt.report.pictures.markup import asset, text

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_LARGE = 400  # nodes; larger graphs open folded


def drawings_page(title: str, drawings: Sequence[Drawing]) -> str:
    """One page of all drawings. Without scripts everything is there to be scrolled."""
    views = [view for i, drawing in enumerate(drawings) for view in _views(i, drawing)]
    sheet = f"{asset('page.css')}\n{style()}"
    marks = [mark for mark in Mark if badge(mark) and any(n.mark is mark for d in drawings for n in d.nodes)]
    key = "".join(f'<li class="{mark.value}"><b>{badge(mark)}</b> {text(meaning(mark))}</li>' for mark in marks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>
{sheet}
</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<div id="tools" hidden>
<label>Show <select id="view">{"".join(option for option, _ in views)}</select></label>
<label>Go to <select id="outline"></select></label>
<label>Find <input id="find" type="search" size="14" placeholder="name, shape, step" autocomplete="off"></label>
<output id="hits" aria-live="polite"></output>
<span class="zoom"><button id="out" aria-label="Zoom out">−</button><button id="fit">Fit</button>
<button id="full">100 %</button><button id="in" aria-label="Zoom in">+</button></span>
</div>
{f'<ul class="key" aria-label="Marks">{key}</ul>' if key else ""}
</header>
<main>
{"".join(markup for _, markup in views)}
</main>
<aside id="about" hidden aria-live="polite"><button id="close" aria-label="Close">×</button><pre></pre></aside>
<script>
{asset("page.js")}
</script>
</body>
</html>
"""


def _views(number: int, drawing: Drawing) -> list[tuple[str, str]]:
    """The drawing, and where it says more than the drawing, the drawing by modules: a choice and a section of each."""
    overview = folded(drawing)
    views = [("operations", drawing)]
    if len(overview.nodes) < len(drawing.nodes):
        views.append(("modules", overview))
    opens = views[-1][0] if len(drawing.nodes) > _LARGE else views[0][0]
    return [_view(f"v{number}-{name}", name, shown, opens=number == 0 and name == opens) for name, shown in views]


def _view(place: str, name: str, drawing: Drawing, *, opens: bool) -> tuple[str, str]:
    heading = f"{drawing.title}: {name}"
    selected = " selected" if opens else ""
    note = f"<p>{text(drawing.note)}</p>" if drawing.note else ""
    section = (
        f'<section id="{place}" aria-label="{text(heading)}"><h2>{text(heading)}</h2>{note}'
        f'<div class="canvas" tabindex="0">{inner_svg(drawing)}</div></section>\n'
    )
    return f'<option value="{place}"{selected}>{text(heading)}</option>', section


def branches_page(title: str, parts: Sequence[tuple[str, str]]) -> str:
    """Pictures of branches, (component, SVG), on one page that needs no script."""
    panels = "".join(
        f'<section class="panel" aria-label="{text(name)}"><h2>{text(name)}</h2>{svg}</section>\n'
        for name, svg in parts
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>
{asset("page.css")}
</style>
</head>
<body>
<header><h1>{text(title)}</h1></header>
<main>
<p>Point at a branch, tap it or reach it with Tab to see what lies behind it.</p>
{panels}</main>
</body>
</html>
"""
