"""`vlmopt explain`: what a recipe would do, in order, with nothing measured and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Workshop
from vlmopt.cli import entry

Capture = pytest.CaptureFixture[str]
ATTENTION = "vision_model.encoder.layers.0.self_attn"
BROKEN = '''
"""Breaks.

Before: a; after: b.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class ReplaceOutput(Pass):
    """Plans one site and fails to apply it."""

    name: ClassVar[str] = "replace-output"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        name = next(iter(program.components))
        return Plan((Site(f"{name}/output", name, ("output",)),), (Refusal(f"{name}/input", name, "it is fine"),))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        raise ValueError("planted")

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return ()
'''


def broken_pass(folder: Path) -> Path:
    """A folder with the pass `replace-output`, which fails in `apply`."""
    folder.mkdir(exist_ok=True)
    (folder / "replace_output.py").write_text(BROKEN)
    return folder


def doubling_pass(folder: Path) -> Path:
    """A folder with the pass `replace-output`, which calls itself exact and doubles the output."""
    edit = """graph = program.components[site.component].graph
        (value,) = output_values(graph)
        with graph.graph.inserting_before(output_node(graph)):
            made = graph.graph.call_function(torch.ops.aten.mul.Tensor, (value, 2.0))
        made.meta = dict(value.meta)
        output_node(graph).args = ((made,),)"""
    imports = "import torch\n\nfrom vlmopt.graph.modules import output_node, output_values\n\n\n@dataclass"
    text = BROKEN.replace('raise ValueError("planted")', edit).replace("\n\n@dataclass", f"\n{imports}", 1)
    folder.mkdir()
    (folder / "replace_output.py").write_text(text)
    return folder


def explained(capsys: Capture, *words: object, code: int = 0) -> Any:
    capsys.readouterr()
    assert entry.run(["explain", "-q", "--json", *(str(word) for word in words)]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def recipe_with(clip: Path, folder: Path, *passes: object, **more: object) -> Path:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"model": str(clip), "passes": list(passes), **more}))
    return path


def test_every_step_sees_what_the_steps_before_it_leave(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    named = {"skip-branches": {"branches": ["text_model.*"]}}
    others = {"skip-branches": {"branches": ["vision_model.encoder.layers.[01].*"]}}
    found = explained(capsys, recipe_with(clip, tmp_path, "canonicalize", named, others, "fold-constants"))
    first, second = found["plan"][1:3]
    assert (len(first["sites"]), first["n_applied"], len(first["refusals"])) == (4, 4, 6)
    assert (len(second["sites"]), second["n_applied"], len(second["refusals"])) == (4, 4, 2)  # the four are gone
    assert [step["decision"] for step in found["plan"]] == ["nothing to do", *["all applied"] * 3]
    for key in ("macs", "parameters"):
        assert all(step["predicted"][key] == step["counted"][key] for step in found["plan"])
        saved = sum(step["counted"][key] for step in found["plan"])
        assert found["cost"]["before"][key] - found["cost"]["after"][key] == saved > 0
    assert first["requires"] == ["canonical", "captured"]
    assert (first["produces"], first["breaks"]) == (["stream-cut"], [])
    assert first["facts_before"] == ["canonical", "captured"]
    assert first["facts_after"] == second["facts_before"] == ["canonical", "captured", "stream-cut"]
    assert found["warnings"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_where_the_planner_chooses_candidates_are_shown_and_nothing_is_cut(
    clip: Path, workshop: Workshop, capsys: Capture
) -> None:
    task = workshop.task("zero-shot-image-classification")
    found = explained(capsys, "-m", clip, "-t", task, "--max-drop", "2.5")
    skip, fold = found["plan"][1:3]
    assert (skip["is_chosen"], len(skip["sites"]), skip["n_applied"]) == (False, 10, 0)
    assert skip["decision"] == "6 of the 10 are candidates; the planner chooses up to --max-drop 2.5"
    vision = [site["saving"]["macs"] for site in skip["sites"] if site["component"] == "image_encoder"]
    assert skip["predicted"]["macs"] == sum(vision)  # the text encoder is folded away behind it
    assert skip["counted"]["macs"] == 0
    assert (fold["n_applied"], fold["refusals"][0]["reason"]) == (1, "the task does not fix pixel_values")
    assert found["warnings"] == ["steps behind the planner's choice are shown for the program uncut"]
    assert (
        entry.run(["optimize", "-q", "--json", "-m", str(clip), "-t", str(task), "--max-drop", "2.5", "--dry-run"]) == 0
    )
    assert json.loads(capsys.readouterr().out) == found


def test_a_recipe_that_optimize_refuses_and_a_name_that_is_unknown_are_said_beside_the_plan(
    clip: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = recipe_with(clip, tmp_path, "skip-branches")
    assert entry.run(["explain", "-q", "--json", str(recipe), "--why", ATTENTION.replace("self", "slf")]) == 1
    shown = capsys.readouterr()
    assert "error: --why vision_model.encoder.layers.0.slf_attn: nothing of the program has that name" in shown.err
    assert f"did you mean '{ATTENTION}'?" in shown.err.splitlines()[-1]
    found = json.loads(shown.out)
    assert found["plan"][0]["decision"] == "candidates; there is neither a budget (--max-drop) nor named sites"
    assert found["warnings"][0].startswith("optimize refuses this recipe: the recipe: has a lossy pass with neither")


def test_a_pass_that_fails_is_one_line_and_the_steps_before_it_are_shown(
    clip: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = broken_pass(tmp_path / "mine")
    named = {"skip-branches": {"branches": ["text_model.*"]}}
    recipe = recipe_with(clip, tmp_path, named, "replace-output", "fold-constants", pass_dirs=[str(folder)])
    assert entry.run(["explain", "-q", "--json", str(recipe)]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "error: step 2 replace-output, apply image_encoder/output: raised ValueError: planted" in shown.err
    first, second = json.loads(shown.out)["plan"]
    assert first["n_applied"] == 4
    assert second["decision"].startswith("fails: step 2 replace-output")
    assert [site["name"] for site in second["sites"]] == ["image_encoder/output"]
    assert second["refusals"][0]["reason"] == "it is fine"


def test_verify_each_finds_a_fault_behind_a_head_that_the_task_brings(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = doubling_pass(tmp_path / "mine")
    recipe = recipe_with(clip, tmp_path, "replace-output", task=str(colours), pass_dirs=[str(folder)])
    assert entry.run(["explain", "-q", "--json", str(recipe), "--verify-each"]) == 3
    shown = capsys.readouterr()
    assert "error: step 1 replace-output, site image_encoder/output: changed the result by 1 of the larg" in shown.err
    assert json.loads(shown.out)["plan"][0]["decision"].startswith("fails: step 1 replace-output")


def test_switches_change_the_plan_and_say_so_and_why_answers_in_the_result(
    clip: Path, tmp_path: Path, capsys: Capture
) -> None:
    named = {"skip-branches": {"branches": [f"*{ATTENTION}", "text_model.*"]}}
    recipe = recipe_with(clip, tmp_path, "canonicalize", named, "fold-constants")
    switches = ["--skip", "1", "--stop-after", "skip-branches", "--limit", "3", "--verify-each"]
    found = explained(capsys, recipe, *switches, "--why", ATTENTION)
    (step,) = found["plan"]
    assert (step["step"], step["name"], step["n_applied"]) == (1, "skip-branches", 3)
    assert step["decision"] == "3 applied, 2 left by --limit 3"
    assert found["warnings"] == [
        "--skip left out step 1 (canonicalize)",
        "--stop-after left out step 3 (fold-constants)",
    ]
    (match,) = found["why"][0]["matches"]
    assert match["name"] == f"image_encoder/{ATTENTION}"
    assert match["n_left"] == 0
    assert match["removed_by"] == [f"step 1 skip-branches, site image_encoder/{ATTENTION}"]


def test_tables_name_steps_facts_sites_and_refusals_by_reason(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = recipe_with(clip, tmp_path, {"skip-branches": {"branches": ["text_model.*"]}}, "fold-fixed-inputs")
    words = ["explain", "-q", str(recipe), "--why", ATTENTION, "--print-before", "1"]
    assert entry.run(words) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("# before step 1 skip-branches\ncomponent image_encoder\n%0: ")
    for text in (
        "nothing is measured or written",
        "Before the first step holds: canonical, captured.",
        "ffn of text_model.encoder.layers.1",
        "the task does not fix pixel_values",
        f"refused by step 1 skip-branches: image_encoder/{ATTENTION}: not named in `branches`",
    ):
        assert text in shown.out
    (row,) = [line for line in shown.out.splitlines() if line.startswith(" 1 skip-branches") and "not named in" in line]
    assert row.split()[-1] == "6"


@pytest.mark.parametrize("command", [["explain"], ["optimize", "-o", "never"]], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("switch", "expected"),
    [
        (["--skip", "skip-brnches"], "--skip skip-brnches: the recipe has no step of that name"),
        (["--stop-after", "9"], "--stop-after 9: the recipe has no step of that number; expected a number from 1 to 4"),
        (["--print-before", "canonicalise"], "did you mean 'canonicalize'?"),
        (["--print-after", "fold"], "--print-after fold"),
        (["--print-diff", "2", "--skip", "2"], "step 2 (hoist-token-reads) is left out by --skip or --stop-after"),
    ],
)
def test_a_misspelled_step_is_refused_before_the_model_is_looked_at(
    command: list[str], switch: list[str], expected: str, tmp_path: Path, capsys: Capture
) -> None:
    assert entry.run([*command, "-m", str(tmp_path / "nowhere"), *switch]) == 1
    shown = capsys.readouterr().err
    assert expected in shown
    assert shown.count("\n") == 1
    assert not Path("never").exists()


def test_explain_needs_a_recipe_or_a_model(capsys: Capture) -> None:
    assert entry.run(["explain"]) == 2
    assert "Missing argument 'RECIPE' (or option '-m' / '--model')" in capsys.readouterr().err
