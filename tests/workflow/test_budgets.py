"""Runs under budgets of resources: they are met by the artifact, or refused with what can be reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.workflow.profiles import profile
from tests.workflow.test_optimizing import Recorder
from vlmopt import workflow
from vlmopt.cli import entry
from vlmopt.core.budgets import Limit, Quantity
from vlmopt.core.errors import PlanError, RecipeError
from vlmopt.planning.cuts import Candidate, Choice, Measurement
from vlmopt.profiling.document import ProfileStability
from vlmopt.recipe import default_recipe
from vlmopt.recipe.schema import SHORTENING_PASSES
from vlmopt.workflow.branch_fates import with_certainty
from vlmopt.workflow.budgeting import Found
from vlmopt.workflow.searching import _tightened

Capture = pytest.CaptureFixture[str]


def test_a_budget_of_macs_is_met_with_no_more_cut_than_it_asks_for(clip: Path, colours: Path, tmp_path: Path) -> None:
    recipe = default_recipe(str(clip), str(colours), {"budgets.macs": "0.7x"})
    assert recipe.budgets.max_drop is None
    report = workflow.optimize(recipe, tmp_path / "out")
    cost = report["result"]["cost"]
    assert cost["optimized"]["macs"] <= 0.7 * cost["original"]["macs"]
    gate = next(gate for gate in report["gates"] if gate["name"] == "MACs for one sample")
    assert gate["passed"] is True
    assert gate["found"] == cost["optimized"]["macs"]
    assert gate["allowed"] == pytest.approx(0.7 * cost["original"]["macs"], rel=1e-12)
    plan = report["plan"]
    assert (plan["max_drop_points"], plan["limits"]) == (None, ["macs 0.7x"])
    chosen = [trial for trial in plan["trials"] if trial["is_chosen"]]
    assert len({trial["saved_macs"] for trial in chosen}) == 1
    assert all(trial["fits"] for trial in chosen)
    assert all(trial["fits"] for trial in plan["trials"] if trial["is_accepted"])
    assert {trial["order"] for trial in plan["trials"]} >= {"depth", "importance", "program"}
    cautious = [t["drop_points"] + 1.645 * t["stderr_points"] for t in plan["trials"] if t["fits"]]
    assert plan["drop_points"] + 1.645 * plan["stderr_points"] == pytest.approx(min(cautious), abs=1e-9)
    recipe_text = (tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8")
    assert "macs: 0.7x" in recipe_text


def test_adapters_that_follow_a_cut_are_part_of_what_it_takes(clip: Path, colours: Path, tmp_path: Path) -> None:
    plain = workflow.optimize(default_recipe(str(clip), str(colours), {"budgets.macs": "0.7x"}), tmp_path / "plain")
    allowed = plain["result"]["cost"]["optimized"]["macs"]  # the same cut with adapters behind it takes more
    passes = [
        "canonicalize",
        "skip-branches",
        {"insert-skip-adapter": {"rank": 16}},
        *SHORTENING_PASSES,
        "fold-constants",
    ]
    recipe = default_recipe(str(clip), str(colours), {"budgets.macs": str(allowed), "passes": passes})
    report = workflow.optimize(recipe, tmp_path / "out")
    assert report["result"]["cost"]["optimized"]["macs"] <= allowed
    adapters = next(step for step in report["passes"] if step["name"] == "insert-skip-adapter")
    assert adapters["counted"]["macs"] < 0
    assert any(note.startswith("a plan that missed its budget was tightened") for note in report["plan"]["notes"])


@pytest.mark.slow
def test_budgets_of_latency_and_size_are_measured_on_emitted_files(clip: Path, colours: Path, tmp_path: Path) -> None:
    show = Recorder()
    changes = {"budgets.latency": "0.9x", "budgets.size": "0.95x"}
    report = workflow.optimize(default_recipe(str(clip), str(colours), changes), tmp_path / "out", progress=show)
    assert {"branch times", "checking the plan in ONNX Runtime"} <= set(show.stages)
    assert any(text.startswith("branch times: image_encoder: a mixed cut takes") for text in show.messages)
    sizes = report["result"]["size_bytes"]
    assert sizes["optimized"] <= 0.95 * sizes["original"]
    made = json.loads((tmp_path / "out" / "profile.json").read_text(encoding="utf-8"))
    assert all(total["latency_us"] > 0 for total in made["totals"])
    assert all(score["latency_us"] is not None for score in made["scores"])


def test_a_budget_that_cannot_be_met_says_how_far_it_can_go(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["optimize", "-q", "-m", str(clip), "-t", str(colours), "-o", str(tmp_path / "out"), "--macs", "0.01x"]
    assert entry.run(words) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: --macs: cannot be met: cutting all ")
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_budgets_that_contradict_each_other_name_the_closest_for_both(
    clip: Path, colours: Path, tmp_path: Path
) -> None:
    recipe = default_recipe(str(clip), str(colours), {"budgets.macs": "0.12x", "budgets.max_drop": 0})
    with pytest.raises(PlanError) as caught:
        workflow.optimize(recipe, tmp_path / "out")
    text = caught.value.one_line()
    assert "the cut that loses least of those that fit drops" in text
    assert "% of what --macs asks to save" in text
    assert not (tmp_path / "out").exists()


def test_a_budget_without_a_task_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = default_recipe("no/model", None, {"budgets.macs": "0.5x", "passes": ["canonicalize", "skip-branches"]})
    with pytest.raises(RecipeError, match="there is no task to measure cuts on"):
        workflow.optimize(recipe, tmp_path / "out")


def test_a_relative_drop_is_a_share_of_the_original_metric(clip: Path, colours: Path, tmp_path: Path) -> None:
    report = workflow.optimize(default_recipe(str(clip), str(colours), {"budgets.max_drop": "30%"}), tmp_path / "out")
    gate = next(gate for gate in report["gates"] if gate["name"].startswith("drop of"))
    metric = report["result"]["metric"]
    assert gate["allowed"] == pytest.approx(30.0 * metric["original"], rel=1e-12)
    assert 0 < report["plan"]["max_drop_points"] <= 30


def test_a_plan_that_missed_is_asked_for_what_it_saved_and_what_it_lacked() -> None:
    pool = [Candidate("a", 0.1, 1, 100, latency_us=50.0), Candidate("b", 0.2, 2, 100, latency_us=40.0)]
    choice = Choice(("a",), Measurement(0.0, 0.0), ())
    missed = Found(Limit(Quantity.LATENCY, 100.0), 120.0, 100.0)
    assert not missed.is_met
    assert Found(Limit(Quantity.LATENCY, 100.0), 104.0, 100.0).is_met  # within the clock's noise
    assert not Found(Limit(Quantity.SIZE, 100.0), 104.0, 100.0).is_met
    allowed = {"latency": 100.0, "macs": 7.0}
    assert _tightened({"latency": 45.0, "macs": 1.0}, [missed], pool, choice, allowed) == {"latency": 60.0, "macs": 1.0}
    nearer = Found(Limit(Quantity.LATENCY, 100.0), 106.0, 100.0)
    assert _tightened({"latency": 45.0}, [nearer], pool, choice, allowed) == pytest.approx({"latency": 57.5})
    # planned on all threads and measured on one: the share that is missed counts, not the microseconds
    assert _tightened({"latency": 45.0}, [missed], pool, choice, {"latency": 20.0}) == {"latency": 52.0}
    assert missed.text == "latency 120us, 100us allowed"


def test_a_cut_is_certain_where_resamples_keep_it_among_those_cut() -> None:
    names = ("layers.0.attention", "layers.0.ffn", "layers.1.ffn", "layers.2.ffn")
    rows = [{"component": "encoder", "name": name, "kept": i == 3} for i, name in enumerate(names)]
    ranks = {
        "encoder/layers.0.attention": (0.0, 2.0),
        "encoder/layers.0.ffn": (1.0, 3.0),
        "encoder/layers.1.ffn": (0, 3),
    }
    made = profile("style", seed=0, stability=ProfileStability(n_resamples=9, ranks=ranks, agreement={}))
    assert [row["certainty"] for row in with_certainty(rows, made)] == ["certain", "uncertain", "uncertain", None]
    assert [row["certainty"] for row in with_certainty(rows, None)] == [None] * 4
