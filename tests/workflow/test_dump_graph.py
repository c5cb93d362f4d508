"""`--dump-graph`: numbered files around every step, marked, and nothing of the user's is overwritten."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from vlmopt_passes.canonicalize import Canonicalize
from vlmopt_passes.skip_branches import SkipBranches

from tests.conftest import Workshop
from tests.workflow.steps import EditOutput, blocks, fail, run_all, times
from vlmopt.cli import entry
from vlmopt.core.contract import Context, Pass
from vlmopt.core.drawing import Mark
from vlmopt.core.errors import OutputExistsError, PassError
from vlmopt.graph.text import component_text
from vlmopt.rewrite.pipeline import run_step
from vlmopt.workflow.watching.dumping import INDEX, GraphDump, open_dump
from vlmopt.workflow.watching.observing import Watch, prepare

KINDS = ("before.txt", "after.txt", "dot", "svg", "html")


def dump(folder: Path, *passes: Pass) -> Path:
    open_dump(folder, force=False)
    run_all(blocks(), passes, GraphDump(folder))
    return folder


def marked(svg: Path, mark: Mark) -> set[str]:
    """The nodes of a picture that carry a mark."""
    groups = ElementTree.fromstring(svg.read_text()).iter("{http://www.w3.org/2000/svg}g")
    boxes = [group for group in groups if "data-key" in group.attrib]
    return {box.attrib["data-key"] for box in boxes if mark.value in box.attrib["class"].split()}


def test_every_step_has_its_texts_and_pictures_and_the_index_links_them_all(tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    dump(folder, Canonicalize(), SkipBranches(branches=("layers.0.ffn",)))
    stems = ["01-canonicalize-model", "02-skip-branches-model"]
    expected = {f"{stem}.{kind}" for stem in stems for kind in KINDS} | {INDEX}
    assert {path.name for path in folder.iterdir()} == expected
    before = component_text(blocks().components["model"])
    assert (folder / f"{stems[0]}.before.txt").read_text() == before
    assert (folder / f"{stems[0]}.after.txt").read_text() == (folder / f"{stems[1]}.before.txt").read_text()
    assert "layers.0" not in (folder / f"{stems[1]}.after.txt").read_text()
    for stem in stems:
        ElementTree.fromstring((folder / f"{stem}.svg").read_text())
        assert (folder / f"{stem}.dot").read_text().startswith("digraph")
    index = (folder / INDEX).read_text()
    assert set(re.findall(r'href="([^"]+)"', index)) == expected - {INDEX}
    assert "<td>unchanged</td>" in index
    assert "<td>1 site applied, 1 refused</td>" in index


def test_what_was_removed_refused_and_added_is_marked(tmp_path: Path) -> None:
    cut = dump(tmp_path / "cut", SkipBranches(branches=("layers.0.ffn",))) / "01-skip-branches-model.svg"
    first = {"layers_0_norm", "layers_0_up", "relu", "layers_0_down", "add"}
    assert marked(cut, Mark.REMOVED) == first
    assert marked(cut, Mark.REFUSED) >= {"layers_1_up", "relu_1", "layers_1_down"}
    added = dump(tmp_path / "added", EditOutput(edits=(times(1.0),))) / "01-edit-output-model.svg"
    assert marked(added, Mark.ADDED) == {"mul_tensor"}
    assert marked(added, Mark.REFUSED) == first


def test_a_step_that_fails_leaves_what_it_found_with_its_candidates(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="planted"):
        dump(tmp_path, SkipBranches(branches=("layers.1.ffn",)), EditOutput(edits=(fail,)))
    assert not (tmp_path / "02-edit-output-model.after.txt").exists()
    assert (tmp_path / "02-edit-output-model.before.txt").is_file()
    assert marked(tmp_path / "02-edit-output-model.svg", Mark.REFUSED) >= {"layers_0_up"}
    assert "<td>the step did not finish</td>" in (tmp_path / INDEX).read_text()


def test_candidates_that_the_planner_left_are_marked_as_sites(tmp_path: Path) -> None:
    open_dump(tmp_path, force=False)
    dumping = GraphDump(tmp_path)
    run_step(blocks(), SkipBranches(), Context(), step=1, choose=lambda program, plan: (), observers=[dumping])
    svg = tmp_path / "01-skip-branches-model.svg"
    assert len(marked(svg, Mark.SITE)) == 10
    assert marked(svg, Mark.REMOVED) == set()
    assert "<td>unchanged, 2 left</td>" in (tmp_path / INDEX).read_text()


def test_a_folder_is_never_overwritten_without_force_and_other_files_never(tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    dump(folder, Canonicalize(), SkipBranches(branches=("layers.0.ffn",)))
    with pytest.raises(OutputExistsError, match="--force replaces them"):
        open_dump(folder, force=False)
    open_dump(folder, force=True)
    assert list(folder.iterdir()) == []
    dump(folder, Canonicalize())
    (folder / "letter.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(OutputExistsError, match="letter.txt"):
            open_dump(folder, force=force)
    assert (folder / "01-canonicalize-model.svg").is_file()
    with pytest.raises(OutputExistsError, match="is a file"):
        open_dump(folder / "letter.txt", force=True)


def test_the_folder_must_not_lie_in_the_output(tmp_path: Path) -> None:
    for inside in ("out", "out/graphs", ".out.partial/graphs", "other/../out/graphs"):
        with pytest.raises(OutputExistsError, match="choose a folder beside it"):
            prepare(Watch(dump_graph=tmp_path / inside), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    prepare(Watch(dump_graph=tmp_path / "graphs"), output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["graphs"]


def test_a_component_that_goes_whole_is_drawn_as_removed(
    clip: Path, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "graphs"
    task = workshop.task("zero-shot-image-classification")
    words = ["explain", "-q", "-m", str(clip), "-t", str(task), "--dump-graph", str(folder)]
    assert entry.run(words) == 0, capsys.readouterr().err
    index = (folder / INDEX).read_text()
    assert "<td>3</td><td>fold-fixed-inputs</td><td>text_encoder</td><td>removed whole</td>" in index
    assert "<td>changed by a site of another component, 1 refused</td>" in index
    assert not (folder / "03-fold-fixed-inputs-text_encoder.after.txt").exists()
    assert not list(folder.glob("04-*-text_encoder*"))
    assert entry.run(words) == 1
    assert "holds the graphs of an earlier run" in capsys.readouterr().err
