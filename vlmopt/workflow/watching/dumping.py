"""Writes the graph of every component around every step: text, Graphviz, SVG and a page; and an index of them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlmopt.core.contract import Pass, Plan, Refusal, Site
from vlmopt.core.drawing import Drawing, Mark
from vlmopt.core.errors import OutputExistsError
from vlmopt.core.program import Component, Program
from vlmopt.graph.picture import difference_drawing, node_drawing
from vlmopt.graph.text import component_text
from vlmopt.report.drawing import drawing_dot, drawing_svg, drawings_page
from vlmopt.rewrite.pipeline import Observer, StepResult
from vlmopt.rundir import atomic_write, disk_errors
from vlmopt.workflow.watching.covering import covered, covers_of

INDEX = "index.html"
_TITLE = "vlmopt: graphs of a run"
_KINDS = ("html", "before.txt", "after.txt", "svg", "dot")
_OURS = re.compile(rf"\d{{2,}}-.*\.({'|'.join(map(re.escape, _KINDS))})")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")


@dataclass
class _Row:
    """One line of the index."""

    stem: str
    step: int
    pass_name: str
    component: str
    verdict: str
    kinds: list[str] = field(default_factory=list)


def open_dump(folder: Path, *, force: bool) -> None:
    """Makes the folder of a dump; with `force` an older dump in it is removed, and nothing else ever is.

    Raises:
        OutputExistsError: it holds something.
    """
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(str(folder), "is a file", expected="a new or empty folder for --dump-graph")
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        others = [path.name for path in found if path.name != INDEX and not _OURS.fullmatch(path.name)]
        if others:
            text = f"holds other files ({others[0]}), so no graphs are written there"
            raise OutputExistsError(str(folder), text, remedy="choose another folder for --dump-graph")
        if found and not force:
            remedy = "choose another folder, or --force replaces them"
            raise OutputExistsError(str(folder), "holds the graphs of an earlier run", remedy=remedy)
        folder.mkdir(parents=True, exist_ok=True)
        for path in found:
            path.unlink()


class GraphDump(Observer):
    """Files numbered like `02-skip-branches-image_encoder.before.txt`, written as the run goes, so that they are there
    when a pass fails: then the picture shows what it found, with its candidates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[str, _Row] = {}

    def before(self, step: int, pass_: Pass, program: Program) -> None:
        self._program, self._plan = program, Plan()
        for name, component in program.components.items():
            row = self._row(step, pass_.name, name)
            self._write(row, "before.txt", component_text(component))
        self._write_index()

    def planned(self, step: int, pass_: Pass, program: Program, plan: Plan) -> None:
        self._plan = plan
        sites, refused = _marked(program, plan.sites), _marked(program, plan.refusals)
        for name, component in program.components.items():
            marks = dict.fromkeys(refused.get(name, {}), Mark.REFUSED)
            marks |= dict.fromkeys(sites.get(name, {}), Mark.SITE)
            drawing = node_drawing(component, program.dims, marks=marks, notes=refused.get(name, {}))
            row = self._row(step, pass_.name, name)
            row.verdict = "the step did not finish"
            self._draw(row, drawing)
        self._write_index()

    def after(self, result: StepResult) -> None:
        refused = _marked(self._program, self._plan.refusals)
        left = _marked(self._program, result.left)
        for name in dict.fromkeys((*self._program.components, *result.program.components)):
            row = self._row(result.step, result.name, name)
            before, after = self._program.components.get(name), result.program.components.get(name)
            if after is not None:
                self._write(row, "after.txt", component_text(after))
            drawing = _difference(before, after, self._program, refused.get(name, {}))
            self._draw(row, _with_sites(drawing, left.get(name, {})))
            is_changed = result.text_before.get(name) != result.text_after.get(name)
            row.verdict = ", ".join(_verdicts(result, name, is_changed=is_changed))
        self._write_index()

    def _row(self, step: int, pass_name: str, component: str) -> _Row:
        stem = _UNSAFE.sub("_", f"{step:02d}-{pass_name}-{component}")
        return self._rows.setdefault(stem, _Row(stem, step, pass_name, component, "the step did not finish"))

    def _write(self, row: _Row, kind: str, text: str) -> None:
        atomic_write(self._folder / f"{row.stem}.{kind}", text)
        if kind not in row.kinds:
            row.kinds.append(kind)

    def _draw(self, row: _Row, drawing: Drawing) -> None:
        titled = replace(drawing, title=f"step {row.step} {row.pass_name}: {row.component}")
        self._write(row, "dot", drawing_dot(titled))
        self._write(row, "svg", drawing_svg(titled))
        self._write(row, "html", drawings_page(titled.title, [titled]))

    def _write_index(self) -> None:
        atomic_write(self._folder / INDEX, _index_page(self._rows.values()))


def _marked(program: Program, candidates: Iterable[Site | Refusal]) -> dict[str, dict[str, str]]:
    """By component the nodes that sites or refusals cover, with what they say; those about a whole component are not
    drawn, since a picture in which everything is marked shows nothing."""
    covers = covers_of(program)
    marked: dict[str, dict[str, str]] = {}
    for candidate in candidates:
        nodes = covered(covers, candidate)
        if candidate.component not in covers or nodes == covers[candidate.component].node_names:
            continue
        said = candidate.reason if isinstance(candidate, Refusal) else candidate.summary
        marked.setdefault(candidate.component, {}).update(dict.fromkeys(nodes, f"{candidate.name}: {said}"))
    return marked


def _difference(
    before: Component | None, after: Component | None, program: Program, refused: Mapping[str, str]
) -> Drawing:
    if before is not None and after is not None:
        return difference_drawing(before, after, program.dims, refused=refused)
    whole, mark = (after, Mark.ADDED) if before is None else (before, Mark.REMOVED)
    assert whole is not None
    names = [node.name for node in whole.graph.graph.nodes]
    return node_drawing(whole, program.dims, marks=dict.fromkeys(names, mark))


def _with_sites(drawing: Drawing, left: Mapping[str, str]) -> Drawing:
    """Candidates that were left are marked as such, as far as nothing else happened to them."""
    nodes = tuple(
        replace(node, mark=Mark.SITE, detail=(*node.detail, f"left: {left[node.key]}"))
        if node.key in left and node.mark is Mark.PLAIN
        else node
        for node in drawing.nodes
    )
    return replace(drawing, nodes=nodes)


def _verdicts(result: StepResult, component: str, *, is_changed: bool) -> Iterator[str]:
    n_applied, n_left = (sum(site.component == component for site in sites) for sites in (result.applied, result.left))
    n_refused = sum(refusal.component == component for refusal in result.refusals)
    if component not in result.text_after:
        yield "removed whole"
    elif component not in result.text_before:
        yield "added"
    elif not is_changed:
        yield "unchanged"
    elif n_applied:
        yield f"{n_applied} site{'s' * (n_applied > 1)} applied"
    else:
        yield "changed by a site of another component"
    if n_left:
        yield f"{n_left} left"
    if n_refused:
        yield f"{n_refused} refused"


def _index_page(rows: Iterable[_Row]) -> str:
    """One row a step and component, with a link to every file."""
    body = "".join(
        f"<tr><td>{row.step}</td><td>{_text(row.pass_name)}</td><td>{_text(row.component)}</td>"
        f"<td>{_text(row.verdict)}</td><td>{_links(row)}</td></tr>\n"
        for row in rows
    )
    style = (
        ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;margin:1rem;max-width:70rem}"
        "div{overflow-x:auto}table{border-collapse:collapse}td,th{text-align:left;padding:.3rem .8rem .3rem 0;"
        "border-bottom:1px solid #8884}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_TITLE}</title>\n'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{style}</style></head>\n'
        f"<body><h1>{_TITLE}</h1><div><table>\n<tr><th>step</th><th>pass</th><th>component</th>"
        f"<th>what happened</th><th>files</th></tr>\n{body}</table></div></body></html>\n"
    )


def _links(row: _Row) -> str:
    links = [f'<a href="{_text(f"{row.stem}.{kind}")}">{_text(kind)}</a>' for kind in _KINDS if kind in row.kinds]
    return " ".join(links)


def _text(value: str) -> str:
    return html.escape(value, quote=True)
