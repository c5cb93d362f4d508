"""`vlmopt inspect --graph`: a model as a picture, in the format that the file's ending says."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmopt.capture import capture
from vlmopt.cli import entry
from vlmopt.core.errors import ProfileError, VlmoptError
from vlmopt.core.program import Program
from vlmopt.graph.branches import find_branches
from vlmopt.graph.picture import node_drawing
from vlmopt.profiling.document import Profile
from vlmopt.report.pictures.placing import place
from vlmopt.workflow.inspecting import branch_rows
from vlmopt.workflow.picturing import Picture, check_picture, write_picture

Capture = pytest.CaptureFixture[str]
Draw = Callable[..., str]
SVG = "{http://www.w3.org/2000/svg}"
BRANCHES = {
    "image_encoder": [f"vision_model.encoder.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")],
    "text_encoder": [f"text_model.encoder.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")],
}


def inspect(*words: object) -> int:
    return entry.run(["inspect", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def program(clip: Path) -> Program:
    return capture(str(clip), image=(32, 32), with_weights=False)


@pytest.fixture
def drawn(program: Program, tmp_path: Path) -> Draw:
    """Draws the toy into a file of this name; its text."""
    rows = {name: branch_rows(program, component) for name, component in program.components.items()}

    def draw(name: str, *, has_weights: bool = False, **options: Any) -> str:
        picture = Picture(tmp_path / name, **options)
        check_picture(picture)
        write_picture(program, rows, picture, has_weights=has_weights)
        return picture.path.read_text(encoding="utf-8")

    return draw


def keys(svg: str, attribute: str) -> list[str]:
    return [g.attrib[attribute] for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if attribute in g.attrib]


def profile_file(path: Path, clip: Path, **changed: Any) -> Path:
    """A profile of the toy: every branch of the image encoder scored, the last one highest."""
    scores = [
        {"component": "image_encoder", "name": name, "scope": "branch", "kind": "ffn", "layer": i // 2,
         "branches": [name], "params": 1, "macs": 1, "score": 0.1 * i - 0.1, "stderr": 0.01}
        for i, name in enumerate(BRANCHES["image_encoder"])
    ]  # fmt: skip
    model = {"path": str(clip), "model_type": "clip", "architecture": "CLIPModel", "fingerprint": "ab" * 32}
    data = {
        "vlmopt": "0.1.0", "created": "2026-01-01T00:00:00+00:00", "model": model | changed.pop("model", {}),
        "task": {"name": "colour", "kind": "image-classification", "fingerprint": "cd" * 32, "n_items": 30},
        "estimator": "leave-one-out", "scoring": "refit", "unit": "loss", "seed": 0, "dtype": "float32", "versions": {},
        "cost": {"forward_passes": 1.0, "seconds": 1.0}, "reference_loss": 1.0, "scores": scores,
    }  # fmt: skip
    path.write_text(Profile.model_validate(data | changed).to_json(), encoding="utf-8")
    return path


def test_branches_of_all_components_are_drawn_without_weights(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((clip / "config.json").read_text())
    assert inspect(bare, "--graph", tmp_path / "new" / "branches.svg") == 0
    said = capsys.readouterr()
    assert "vision_model.encoder.layers.0.mlp" in said.out
    assert f"drawn in {tmp_path / 'new' / 'branches.svg'}" in said.err
    svg = (tmp_path / "new" / "branches.svg").read_text()
    assert keys(svg, "data-branch") == [*BRANCHES["image_encoder"], *BRANCHES["text_encoder"]]
    assert "share of the MACs of all branches" in svg
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["branches.svg"]


def test_the_picture_comes_beside_the_json(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    words = (clip, "--level", "node", "--component", "image_encoder", "--json", "-q")
    assert inspect(*words, "--graph", tmp_path / "nodes.dot") == 0
    said = capsys.readouterr()
    assert list(json.loads(said.out)) == ["assembly", "components"]
    assert said.err == ""
    assert (tmp_path / "nodes.dot").read_text().startswith(f'digraph "{clip}: operations" {{\n')


def test_operations_of_one_component_are_drawn(drawn: Draw, program: Program) -> None:
    graph = program.components["image_encoder"].graph.graph
    wanted = [node.name for node in graph.nodes]
    assert keys(drawn("nodes.svg", level="node", component="image_encoder"), "data-key") == wanted
    text = drawn("nodes.dot", level="node", component="image_encoder")
    assert sorted(re.findall(r'^\s*"([^"]*)" \[label=', text, re.MULTILINE)) == sorted(wanted)


@pytest.mark.parametrize("name", ["image_encoder", "text_encoder"])
def test_the_stream_of_a_real_encoder_runs_straight_down_beside_framed_layers(program: Program, name: str) -> None:
    component = program.components[name]
    drawing = node_drawing(component, program.dims)
    places = place(drawing)
    x = {drawing.nodes[box.index].key: box.x for box in places.boxes}
    branches = find_branches(component.graph)
    assert len({x[node.name] for branch in branches for node in (branch.stream, branch.exit)}) == 1
    assert all(x[branch.term.name] > x[branch.exit.name] for branch in branches)
    framed = {frame.group for frame in places.frames}
    assert {branch.name for branch in branches} | {branch.layer_name for branch in branches} <= framed


@pytest.mark.parametrize("level", ["branch", "node"])
def test_both_levels_are_pages_that_need_nothing_else(drawn: Draw, level: str) -> None:
    text = drawn("page.HTML", level=level)
    assert text.startswith("<!doctype html>")
    assert text.rstrip().endswith("</html>")
    assert "default-src 'none'" in text
    assert not re.findall(r'(?:src|href)="|url\(|@import', text)
    assert "image_encoder" in text
    assert "text_encoder" in text


def test_a_profile_colours_the_branches(drawn: Draw, clip: Path, tmp_path: Path) -> None:
    svg = drawn("a.svg", profile=profile_file(tmp_path / "profile.json", clip))
    steps = re.findall(r'class="box (s\d|none)" fill="#\w+" stroke', svg)
    assert steps == ["s0", "s0", "s4", "s6", "s7", "s8", *["none"] * 4]
    assert "importance: increase of the loss without the branch" in svg
    assert "importance 0.4 ± 0.01 (standard error)" in svg
    assert "branches for colour" in svg


def test_a_profile_of_something_else_is_refused(drawn: Draw, program: Program, clip: Path, tmp_path: Path) -> None:
    own = profile_file(tmp_path / "own.json", clip, model={"fingerprint": program.source.fingerprint})
    drawn("own.svg", profile=own, has_weights=True)
    other = profile_file(tmp_path / "weights.json", clip)
    with pytest.raises(ProfileError, match="weights.json: was measured on other weights; profile this model"):
        drawn("a.svg", profile=other, has_weights=True)
    other = profile_file(tmp_path / "model.json", clip, model={"architecture": "SiglipModel"})
    with pytest.raises(ProfileError, match="was measured on a SiglipModel, and this is a CLIPModel"):
        drawn("a.svg", profile=other)
    other.write_text(own.read_text().replace("encoder.layers.1.mlp", "encoder.layers.9.mlp"))
    with pytest.raises(ProfileError, match="scores the branch 'vision_model.encoder.layers.9.mlp', which is not here"):
        drawn("a.svg", profile=other)
    assert not (tmp_path / "a.svg").exists()


def test_an_unknown_component_is_refused_and_nothing_is_replaced(drawn: Draw, tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("old")
    with pytest.raises(VlmoptError, match="the model has no 'visual'; expected image_encoder or text_encoder"):
        drawn("a.svg", component="visual", force=True)
    assert (tmp_path / "a.svg").read_text() == "old"
    assert keys(drawn("a.svg", component="text_encoder", force=True), "data-branch") == BRANCHES["text_encoder"]


def test_what_cannot_be_drawn_is_refused_before_the_model_is_read(tmp_path: Path, capsys: Capture) -> None:
    nothing = tmp_path / "no model"
    assert inspect(nothing, "--graph", tmp_path / "a.png") == 1
    assert "a.png: its ending says no format for a picture; expected .html or .svg or .dot" in capsys.readouterr().err
    (tmp_path / "a.svg").write_text("mine")
    assert inspect(nothing, "--graph", tmp_path / "a.svg") == 1
    assert "a.svg: exists already; choose another path, or --force replaces it" in capsys.readouterr().err
    (tmp_path / "b.html").mkdir()
    assert inspect(nothing, "--graph", tmp_path / "b.html", "--force") == 1
    assert "b.html: is a folder" in capsys.readouterr().err
    assert inspect(nothing, "--graph", tmp_path / "c.svg", "--profile", tmp_path / "none.json") == 1
    assert "none.json: no such file" in capsys.readouterr().err
    assert inspect(nothing, "--graph", tmp_path / "c.svg", "--profile", tmp_path / "p", "--level", "node") == 1
    assert "--profile: colours branches, and --level is node" in capsys.readouterr().err
    assert (tmp_path / "a.svg").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [("--level", "node"), ("--component", "x"), ("--profile", "p.json"), ("--force",)],
    ids=lambda words: words[0],
)
def test_options_of_the_picture_need_a_picture(words: tuple[str, ...], capsys: Capture) -> None:
    assert inspect("model", *words) == 2
    assert f"{words[0]} needs --graph FILE" in capsys.readouterr().err
