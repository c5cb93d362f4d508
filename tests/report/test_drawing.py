"""Graphs as pictures: complete, without overlap, the same every time, safe whatever the names are."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report.graphs import BLOCK, at_random, transformer
from vlmopt.core.drawing import Drawing, DrawnNode, Mark, NodeKind
from vlmopt.core.errors import VlmoptError
from vlmopt.report.drawing import drawing_dot, drawing_svg, drawings_dot, drawings_page, drawings_svg
from vlmopt.report.pictures.folding import folded
from vlmopt.report.pictures.placing import Places, place
from vlmopt.report.pictures.ranking import Graph, rank

HOSTILE = '<script>alert("x")</script>&amp;\'\\N \x00\x1b]]>--> {a|b} \u202e'
SVG = "{http://www.w3.org/2000/svg}"


def boxes_of(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right and bottom of every box, read from the file."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        if "data-key" in group.attrib:
            rectangle = group.find(f"{SVG}rect")
            assert rectangle is not None
            x, y, width, height = (float(rectangle.attrib[name]) for name in ("x", "y", "width", "height"))
            assert group.attrib["data-key"] not in found
            found[group.attrib["data-key"]] = (x, y, x + width, y + height)
    return found


def overlaps(svg: str) -> list[tuple[str, str]]:
    return [
        (a, b)
        for (a, p), (b, q) in combinations(boxes_of(svg).items(), 2)
        if min(p[2], q[2]) > max(p[0], q[0]) and min(p[3], q[3]) > max(p[1], q[1])
    ]


def lines_through_boxes(places: Places) -> list[tuple[int, int, int]]:
    """Edges with the box that they run through."""
    found = []
    for line in places.lines:
        for (ax, ay), (bx, by) in pairwise(line.corners):
            for box in places.boxes:
                is_beside = max(ax, bx) <= box.left or min(ax, bx) >= box.left + box.width
                is_clear = max(ay, by) <= box.top or min(ay, by) >= box.bottom
                if not (is_beside or is_clear):
                    found.append((line.source, line.target, box.index))
    return found


def test_every_node_and_every_edge_is_drawn_once() -> None:
    drawing = transformer(3)
    svg = drawing_svg(drawing)
    assert list(boxes_of(svg)) == [node.key for node in drawing.nodes]
    (edges,) = [g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if g.attrib.get("class") == "edges"]
    assert len(edges) == len(drawing.edges)
    assert overlaps(svg) == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n_nodes=st.integers(1, 45))
def test_in_any_graph_boxes_lie_apart_and_lines_pass_beside_them(seed: int, n_nodes: int) -> None:
    drawing = at_random(seed, n_nodes)
    assert overlaps(drawing_svg(drawing)) == []
    places = place(drawing)
    assert lines_through_boxes(places) == []
    assert len(places.lines) == len(drawing.edges)
    for line in places.lines:
        source, target = places.boxes[line.source], places.boxes[line.target]
        assert line.corners[0] == (source.x, source.bottom)
        assert line.corners[-1][1] == target.top
        assert target.left < line.corners[-1][0] < target.left + target.width
        assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(line.corners))
    assert all(box.left >= 0 and box.left + box.width <= places.width for box in places.boxes)
    assert all(box.bottom <= places.height for box in places.boxes)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n_nodes=st.integers(1, 45))
def test_a_frame_holds_the_boxes_of_its_module_and_no_others(seed: int, n_nodes: int) -> None:
    drawing = at_random(seed, n_nodes)
    places = place(drawing)
    for frame in places.frames:
        for box in places.boxes:
            is_member = f"{drawing.nodes[box.index].group}.".startswith(f"{frame.group}.")
            is_within = (
                frame.x <= box.left and box.left + box.width <= frame.x + frame.width
                and frame.y <= box.top and box.bottom <= frame.y + frame.height
            )  # fmt: skip
            is_apart = (
                box.left >= frame.x + frame.width or box.left + box.width <= frame.x
                or box.top >= frame.y + frame.height or box.bottom <= frame.y
            )  # fmt: skip
            assert is_within if is_member else is_apart


def test_the_check_for_lines_through_boxes_finds_one() -> None:
    places = place(transformer(1))
    victim, line = places.boxes[4], places.lines[0]
    through = replace(line, corners=((victim.x, victim.top - 5), (victim.x, victim.bottom + 5)))
    assert (line.source, line.target, 4) in lines_through_boxes(replace(places, lines=(through,)))


def test_the_stream_runs_straight_down_and_branches_lie_beside_it() -> None:
    drawing = transformer(4)
    places = place(drawing)
    x = {drawing.nodes[box.index].key: box.x for box in places.boxes}
    stream = ["x", *(f"{name}_{i}" for i in range(4) for name in ("add1", "add2")), "output"]
    assert {x[key] for key in stream} == {x["x"]}
    assert all(x[node.key] > x["x"] for node in drawing.nodes if node.key not in stream)
    assert x["q_proj_2"] == x["q_turn_2"] == x["attention_2"] == x["out_proj_2"]
    straight = [line for line in places.lines if line.is_stream]
    assert [len(line.corners) for line in straight] == [2] * (len(stream) - 1)


def test_layers_and_their_parts_are_framed_and_nested() -> None:
    frames = {frame.group: frame for frame in place(transformer(3)).frames}
    assert set(frames) == {f"encoder.layers.{i}{part}" for i in range(3) for part in ("", ".attn", ".mlp")}
    outer, inner = frames["encoder.layers.1"], frames["encoder.layers.1.attn"]
    assert outer.x < inner.x
    assert outer.y < inner.y
    assert inner.x + inner.width < outer.x + outer.width


def test_the_same_drawing_gives_the_same_bytes() -> None:
    def made() -> tuple[str, ...]:
        drawing = transformer(3)
        return drawing_svg(drawing), drawing_dot(drawing), drawings_page("t", [drawing])

    assert made() == made()


def test_hostile_names_stay_text() -> None:
    nodes = (
        DrawnNode("a" + HOSTILE, HOSTILE, HOSTILE.replace(".", ""), (HOSTILE,)),
        DrawnNode("b", HOSTILE + "\n" + HOSTILE, "", (HOSTILE,), Mark.ADDED),
    )
    drawing = Drawing(HOSTILE, nodes, (("a" + HOSTILE, "b"),), HOSTILE)
    svg = drawing_svg(drawing)
    root = ElementTree.fromstring(svg)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "style", "g", "text", "rect", "path", "circle", "title"
    }  # fmt: skip
    titles = [element.text for element in root.iter(f"{SVG}title")]
    assert '<script>alert("x")</script>&amp;' in (titles[0] or "")
    page = drawings_page(HOSTILE, [drawing])
    assert page.count("<script") == 1
    assert "http-equiv" in page
    statements = dot_statements(drawing_dot(drawing))
    assert sum(statement.count('"->') or statement.count("->") for statement in unquoted(statements)) == 1


def test_marks_are_classes_and_shapes_and_are_explained() -> None:
    drawing = transformer(1)
    marks = dict(
        zip([node.key for node in drawing.nodes], [mark for mark in Mark if mark is not Mark.PLAIN], strict=False)
    )
    marked = replace(drawing, nodes=tuple(replace(n, mark=marks.get(n.key, Mark.PLAIN)) for n in drawing.nodes))
    root = ElementTree.fromstring(drawing_svg(marked))
    groups = {g.attrib["data-key"]: g for g in root.iter(f"{SVG}g") if "data-key" in g.attrib}
    for key, mark in marks.items():
        assert mark.value in groups[key].attrib["class"].split()
        assert groups[key].find(f"{SVG}circle") is not None  # not by colour alone
    assert groups["output"].find(f"{SVG}circle") is None
    words = "".join(root.itertext())
    assert all(word in words for word in ("added", "removed", "changed", "refused", "may be edited"))
    assert "added" not in "".join(t.text or "" for t in ElementTree.fromstring(drawing_svg(drawing)).iter(f"{SVG}text"))


def test_edges_of_what_is_gone_and_of_what_is_new_are_marked() -> None:
    drawing = replace(transformer(1), edge_marks={("x", "norm1_0"): Mark.ADDED, ("add2_0", "output"): Mark.REMOVED})
    classes = re.findall(r'<path class="(\w+)"', drawing_svg(drawing))
    assert (classes.count("added"), classes.count("removed")) == (1, 1)
    assert drawing_dot(drawing).count('style="dashed"') == 1


def test_two_thousand_nodes_take_less_than_two_seconds() -> None:
    drawing = transformer(100)
    assert len(drawing.nodes) > 2000
    begin = time.process_time()
    page = drawings_page("large", [drawing])
    assert time.process_time() - begin < 2
    assert page.count("data-key=") > 2000
    assert len(page) < 3_000_000


def test_an_edge_against_the_order_is_an_error_and_not_left_out() -> None:
    drawing = Drawing("d", (DrawnNode("a", "a"), DrawnNode("b", "b")), (("b", "a"),))
    with pytest.raises(VlmoptError, match="'b' to 'a' does not run along the order"):
        drawing_svg(drawing)
    with pytest.raises(VlmoptError, match="'a' to 'c'"):
        drawing_svg(replace(drawing, edges=(("a", "c"),)))


def test_a_drawing_of_nothing_is_still_a_file() -> None:
    assert boxes_of(drawing_svg(Drawing("nothing", (), ()))) == {}
    assert dot_statements(drawing_dot(Drawing("nothing", (), ())))


def test_the_overview_shows_a_module_as_one_box_that_keeps_its_edges() -> None:
    overview = folded(transformer(3))
    keys = [node.key for node in overview.nodes]
    assert keys == ["x", "size", *(f"module encoder.layers.{i}" for i in range(3)), "output"]
    layers = keys[2:5]
    assert set(overview.edges) >= {*pairwise(["x", *layers, "output"])}
    assert [node.kind for node in overview.nodes[2:5]] == [NodeKind.GROUP] * 3
    assert overview.nodes[2].label.startswith(f"layers.0 ({BLOCK})")
    assert len({box.x for box in place(overview).boxes if keys[box.index] != "size"}) == 1


def test_the_overview_tells_what_changed_in_a_module() -> None:
    drawing = transformer(2)
    marks = {"fc1_1": Mark.REMOVED, "fc2_1": Mark.REMOVED, "add2_1": Mark.ADDED}
    nodes = tuple(replace(n, mark=marks.get(n.key, Mark.PLAIN)) for n in drawing.nodes)
    overview = {node.key: node for node in folded(replace(drawing, nodes=nodes)).nodes}
    assert overview["module encoder.layers.0"].mark is Mark.PLAIN
    assert overview["module encoder.layers.1"].mark is Mark.CHANGED
    assert "2 removed, 1 added" in overview["module encoder.layers.1"].label


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n_nodes=st.integers(1, 45))
def test_any_overview_can_be_drawn(seed: int, n_nodes: int) -> None:
    overview = folded(at_random(seed, n_nodes))
    rank(Graph.of(overview))  # refuses edges against the order, which a circle would have
    assert overlaps(drawing_svg(overview)) == []


def test_several_drawings_lie_beside_each_other_in_one_file() -> None:
    svg = drawings_svg([transformer(1, title="image_encoder"), transformer(2, title="text_encoder")])
    root = ElementTree.fromstring(svg)
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"image_encoder", "text_encoder"} <= set(words)
    assert sum("data-key" in group.attrib for group in root.iter(f"{SVG}g")) == 2 * 3 + 3 * BLOCK


def dot_statements(text: str) -> list[str]:
    """The statements of a graph, after a check that strings are closed and brackets match."""
    plain = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    assert '"' not in plain.replace('""', "")
    for opening, closing in ("{}", "[]"):
        assert plain.count(opening) == plain.count(closing)
    return text.splitlines()


def unquoted(lines: list[str]) -> list[str]:
    return [re.sub(r'"(?:[^"\\]|\\.)*"', '""', line) for line in lines]


def test_graphviz_text_has_every_node_and_edge_and_a_cluster_for_every_module() -> None:
    drawing = transformer(2)
    lines = dot_statements(drawing_dot(drawing))
    bare = unquoted(lines)
    assert sum("->" in line for line in bare) == len(drawing.edges)
    assert sum(line.strip().startswith('"" [') for line in bare) == len(drawing.nodes)
    clusters = [line.strip() for line in lines if line.strip().startswith("subgraph")]
    assert clusters[:3] == [
        f'subgraph "cluster_0.{path}" {{' for path in ("encoder", "encoder.layers", "encoder.layers.0")
    ]
    both = drawings_dot("both", [drawing, replace(drawing, title="other")])
    assert len(set(re.findall(r'^\s*("[^"]*") \[label=', both, re.MULTILINE))) == 2 * len(drawing.nodes)


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_draws_it() -> None:
    hostile = Drawing(HOSTILE, (DrawnNode(HOSTILE, HOSTILE, HOSTILE), DrawnNode("b", "b")), ((HOSTILE, "b"),))
    for drawing in (transformer(2), hostile):
        done = subprocess.run(["dot", "-Tsvg"], input=drawing_dot(drawing), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        root = ElementTree.fromstring(done.stdout)
        nodes = [g for g in root.iter(f"{SVG}g") if g.attrib.get("class") == "node"]
        assert len(nodes) == len(drawing.nodes)
