"""Switches of `vlmopt optimize`, and what is left of a run that a pass made fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.workflow.test_explain import broken_pass
from vlmopt import workflow
from vlmopt.cli import entry
from vlmopt.core.errors import PassError
from vlmopt.core.progress import Silent
from vlmopt.planning.choice import Choice, Measurement, Trial
from vlmopt.recipe import Recipe, load_recipe
from vlmopt.recipe.schema import DEFAULT_PASSES, PassStep
from vlmopt.rundir import CHOICE_WORK, RunDirectory
from vlmopt.workflow.remembering import MeasuredChoice, keep_choice, kept_choice

Capture = pytest.CaptureFixture[str]
MLP = "vision_model.encoder.layers.0.mlp"
PLAN = ("canonicalize", "skip-branches", "fold-constants")


class Recorder(Silent):
    """Keeps the names of stages and the messages."""

    def __init__(self) -> None:
        self.stages, self.messages = list[str](), list[str]()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:  # type: ignore[override]
        self.stages.append(name)
        yield

    def message(self, text: str) -> None:
        self.messages.append(text)


def planned(clip: Path, colours: Path, *passes: str, max_drop: float = 20.0, **more: Any) -> Recipe:
    steps = tuple(PassStep(name=name) for name in passes or PLAN)
    recipe = Recipe(model=str(clip), task=str(colours), passes=steps, **more)
    return recipe.model_copy(update={"budgets": recipe.budgets.model_copy(update={"max_drop": max_drop})})


def test_watching_changes_nothing_about_the_artifact(classifier: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    watch = [
        "--print-before",
        "all",
        "--print-diff",
        "2",
        "--verify-each",
        "--why",
        "vision_model.encoder.layers.0.mlp",
    ]
    words = ["optimize", "-q", "--json", "--recipe", str(classifier / "recipe.yaml"), "-o", str(out), *watch]
    assert entry.run(words) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["warnings"] == []
    assert shown.err.count("# before step") == len(DEFAULT_PASSES)
    assert "# step 2 skip-branches\n--- image_encoder before\n" in shown.err
    assert f"  removed by step 2 skip-branches, site image_encoder/{MLP}" in shown.err
    for name in ("image_encoder.onnx", "recipe.yaml", ".work/40-verify/cases.safetensors"):
        assert (out / name).read_bytes() == (classifier / name).read_bytes()


@pytest.mark.slow
def test_a_limit_is_part_of_the_recipe_and_its_replay_gives_the_same_files(
    clip: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = tmp_path / "r.yaml"
    named = {"skip-branches": {"branches": ["text_model.*"]}}
    recipe.write_text(yaml.safe_dump({"model": str(clip), "passes": ["canonicalize", named, "fold-constants"]}))
    first, again = tmp_path / "first", tmp_path / "again"
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(first), "--limit", "3", "--skip", "1"]) == 0
    report = json.loads((first / "report.json").read_text())
    assert [(step["name"], step["n_applied"]) for step in report["passes"]] == [
        ("skip-branches", 3),
        ("fold-constants", 0),
    ]
    assert report["warnings"] == [
        "--skip left out step 1 (canonicalize)",
        "--limit 3 was reached: no further site was applied",
    ]
    saved = yaml.safe_load((first / "recipe.yaml").read_text())
    assert (saved["max_sites"], len(saved["passes"])) == (3, 2)
    assert entry.run(["optimize", "-q", "--recipe", str(first), "-o", str(again)]) == 0
    for name in ("text_encoder.onnx", "image_encoder.onnx", "recipe.yaml"):
        assert (again / name).read_bytes() == (first / name).read_bytes()
    capsys.readouterr()


def test_a_faulty_pass_is_one_line_and_what_was_measured_before_it_is_not_measured_again(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, folder = tmp_path / "out", broken_pass(tmp_path / "mine")
    failing = planned(clip, colours, *PLAN, "replace-output", pass_dirs=(str(folder),))
    first = Recorder()
    with pytest.raises(PassError) as error:
        workflow.optimize(failing, out, progress=first)
    assert {"profile", "plan"} <= set(first.stages)
    line, partial = error.value.one_line(), tmp_path / ".out.partial"
    assert line.startswith("step 4 replace-output, apply image_encoder/output: raised ValueError: planted")
    assert f"what was finished is kept in {partial}; `vlmopt bisect {partial / 'recipe.yaml'}` finds the site" in line
    assert not out.exists()
    done = sorted(path.name for path in (partial / ".work" / "20-passes").iterdir())
    assert done == ["01-canonicalize", "02-skip-branches", "03-fold-constants"]
    choice = json.loads(next((partial / ".work" / "15-choice").glob("*.json")).read_text())
    saved = load_recipe(partial / "recipe.yaml")
    assert saved.passes[1].options == {"branches": choice["choice"]["names"]}  # nothing is searched while bisecting
    assert [step.name for step in saved.passes] == [*PLAN, "replace-output"]

    second = Recorder()
    report = workflow.optimize(planned(clip, colours), out, progress=second)
    assert not {"profile", "plan"} & set(second.stages)
    n_sites = len(choice["choice"]["names"])
    assert second.messages == [
        "profile: taken up from an earlier run",
        f"plan: taken up from an earlier run ({n_sites} sites)",
    ]
    assert report["passes"][1]["n_applied"] == n_sites > 0
    assert not partial.exists()
    assert not (out / ".work" / "15-choice").exists()


@pytest.mark.slow
def test_another_budget_takes_up_the_profile_but_not_the_choice(clip: Path, colours: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", broken_pass(tmp_path / "mine")
    for max_drop, measured in ((20.0, {"profile", "plan"}), (30.0, {"plan"}), (20.0, set[str]())):
        show = Recorder()
        with pytest.raises(PassError):
            workflow.optimize(
                planned(clip, colours, *PLAN, "replace-output", max_drop=max_drop, pass_dirs=(str(folder),)),
                out,
                progress=show,
            )
        assert {"profile", "plan"} & set(show.stages) == measured
    show = Recorder()
    with pytest.raises(PassError):
        other = planned(clip, colours, *PLAN, "replace-output", pass_dirs=(str(folder),), seed=1)
        workflow.optimize(other, out, progress=show)
    assert {"profile", "plan"} <= set(show.stages)  # other folds, another profile
    assert len(list((tmp_path / ".out.partial" / ".work" / "10-profile").iterdir())) == 1


def test_a_choice_is_read_as_it_was_kept_and_a_damaged_one_counts_as_none(tmp_path: Path) -> None:
    found = Measurement(0.1, 1 / 3)
    trials = (Trial("depth", 2, 7, Measurement(float("nan"), float("inf")), False), Trial("depth", 1, 5, found, True))
    measured = MeasuredChoice(Choice(("model/a",), found, trials), 12)
    with RunDirectory(tmp_path / "out", key="k") as run:
        assert kept_choice(run, "0") is None
        keep_choice(run, "0", measured)
        assert repr(kept_choice(run, "0")) == repr(measured)  # NaN is not equal to itself
        file = run.work(CHOICE_WORK) / "0.json"
        whole = file.read_text()
        for damaged in (whole[: len(whole) // 2], "[]", '{"choice": {}, "n_items": 1}', ""):
            file.write_text(damaged)
            assert kept_choice(run, "0") is None


@pytest.mark.slow
def test_nothing_is_searched_where_nothing_may_be_cut(clip: Path, colours: Path, tmp_path: Path) -> None:
    show = Recorder()
    report = workflow.optimize(planned(clip, colours, "skip-branches", max_sites=0), tmp_path / "out", progress=show)
    assert not {"profile", "plan"} & set(show.stages)
    assert report["passes"][0]["n_applied"] == 0
    assert load_recipe(tmp_path / "out").passes == ()
