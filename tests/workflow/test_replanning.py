"""`vlmopt plan` finds what trying every cut finds, and says clearly what it cannot do."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.profiles import TOTAL_MACS, TOTAL_US, profile, written
from vlmopt.cli import entry
from vlmopt.core.budgets import Budgets, Quantity, parse_budgets
from vlmopt.core.errors import PlanError
from vlmopt.profiling.document import Profile, ProfiledInteraction, ProfiledScore, ProfileStability
from vlmopt.recipe import load_recipe
from vlmopt.workflow.replanning.fronts import plan_front
from vlmopt.workflow.replanning.solving import Request, replan

Capture = pytest.CaptureFixture[str]
Rows = tuple[ProfiledScore, ...]


def limits(**given: str) -> Budgets:
    return parse_budgets({Quantity(name): value for name, value in given.items()})


def cuts(made: Profile, scopes: tuple[str, ...] = ("branch",)) -> Iterator[Rows]:
    """All cuts in which no branch is cut twice."""
    rows = [score for score in made.scores if score.scope in scopes]
    for n in range(len(rows) + 1):
        for cut in itertools.combinations(rows, n):
            branches = [branch for row in cut for branch in row.branches]
            if len(branches) == len(set(branches)):
                yield cut


def macs(cut: Rows) -> int:
    return sum(row.macs for row in cut)


def time(cut: Rows) -> float:
    return sum(row.latency_us or 0.0 for row in cut)


def loss(cut: Rows) -> float:
    return sum(row.score for row in cut)


def drop(cut: Rows) -> float:
    return sum(row.drop_points or 0.0 for row in cut)


def same_cut(made: Profile, cut: Rows) -> Rows:
    """The rows of another profile for the same sites."""
    names = {row.name for row in cut}
    return tuple(row for row in made.scores if row.name in names)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scope", ["branches", "both"])
def test_a_budget_of_resources_gives_the_least_loss_of_all_cuts_that_fit(tmp_path: Path, seed: int, scope: str) -> None:
    made = profile("style", seed=seed)
    found = replan(Request((written(tmp_path, made),), limits(macs="0.5x", latency="0.7x"), scope=scope))
    scopes = ("branch", "layer") if scope == "both" else ("branch",)
    fitting = [c for c in cuts(made, scopes) if macs(c) >= 0.5 * TOTAL_MACS and time(c) >= 0.3 * TOTAL_US - 1e-9]
    assert found["tasks"][0]["loss"] == pytest.approx(min(map(loss, fitting)), abs=1e-9)
    assert found["saves"]["macs"]["saved"] == sum(site["macs"] for site in found["sites"])
    assert found["saves"]["macs"]["share"] >= 0.5
    n_cut = len(found["sites"])
    assert found["tasks"][0]["loss_error"] == pytest.approx(0.01 * n_cut**0.5, abs=1e-12)
    assert found["tasks"][0]["drop_error"] == pytest.approx(0.3 * n_cut**0.5, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_drop_gives_the_most_macs_of_all_cuts_within_it(tmp_path: Path, seed: int) -> None:
    made = profile("style", seed=seed)
    found = replan(Request((written(tmp_path, made),), limits(max_drop="2.5")))
    assert found["saves"]["macs"]["saved"] == max(macs(cut) for cut in cuts(made) if drop(cut) <= 2.5)
    assert found["tasks"][0]["drop_points"] <= 2.5


def test_interactions_of_branches_count(tmp_path: Path) -> None:
    plain = profile("style", seed=1)
    first = replan(Request((written(tmp_path, plain),), limits(macs="0.75x")))
    pair = sorted(site["name"] for site in first["sites"])[:2]
    made = profile("style", seed=1, interactions=(ProfiledInteraction(first=pair[0], second=pair[1], score=9.0),))
    second = replan(Request((written(tmp_path, made),), limits(macs="0.75x")))
    assert not set(pair) <= {site["name"] for site in second["sites"]}


def test_sites_that_are_kept_are_not_cut(tmp_path: Path) -> None:
    path = written(tmp_path, profile("style", seed=0))
    found = replan(Request((path,), limits(macs="0.6x"), keep=("layers.0.*", "encoder/layers.3.ffn")))
    assert found["sites"]
    assert not {"encoder/layers.0.attention", "encoder/layers.0.ffn", "encoder/layers.3.ffn"} & {
        site["name"] for site in found["sites"]
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_worst_of_several_tasks_is_made_as_small_as_it_can_be(tmp_path: Path, seed: int) -> None:
    a, b = profile("style", seed=seed), profile("meaning", seed=seed + 50)
    request = Request((written(tmp_path, a), written(tmp_path, b)), limits(macs="0.6x"), combine="worst")
    found = replan(request)
    fitting = [cut for cut in cuts(a) if macs(cut) >= 0.4 * TOTAL_MACS]
    best = min(max(loss(cut), loss(same_cut(b, cut))) for cut in fitting)
    assert max(task["loss"] for task in found["tasks"]) == pytest.approx(best, abs=1e-9)
    for task, made in zip(found["tasks"], (a, b), strict=True):
        own = [cut for cut in cuts(made) if macs(cut) >= 0.4 * TOTAL_MACS]
        assert task["alone"]["loss"] == pytest.approx(min(map(loss, own)), abs=1e-9)
        assert task["loss"] >= task["alone"]["loss"] - 1e-9


def test_weights_decide_which_task_is_spared(tmp_path: Path) -> None:
    a, b = profile("style", seed=3), profile("meaning", seed=53)
    paths = (written(tmp_path, a), written(tmp_path, b))
    fitting = [cut for cut in cuts(a) if macs(cut) >= 0.4 * TOTAL_MACS]
    for weights in ((3.0, 1.0), (0.0, 1.0), ()):
        found = replan(Request(paths, limits(macs="0.6x"), combine="weighted", weights=weights))
        first, second = weights or (1.0, 1.0)
        best = min(first * loss(cut) + second * loss(same_cut(b, cut)) for cut in fitting)
        mixed = first * found["tasks"][0]["loss"] + second * found["tasks"][1]["loss"]
        assert mixed == pytest.approx(best, abs=1e-9)


def test_a_drop_for_several_tasks_holds_for_every_one(tmp_path: Path) -> None:
    a, b = profile("style", seed=3), profile("meaning", seed=53)
    paths = (written(tmp_path, a), written(tmp_path, b))
    found = replan(Request(paths, limits(max_drop="2"), combine="worst"))
    both = [cut for cut in cuts(a) if drop(cut) <= 2 and drop(same_cut(b, cut)) <= 2]
    assert found["saves"]["macs"]["saved"] == max(map(macs, both))


def test_what_cannot_be_met_is_refused_with_the_closest_that_can(tmp_path: Path) -> None:
    made = profile("style", seed=0)
    path = written(tmp_path, made)
    reachable = TOTAL_MACS - 4 * (90 + 130)
    with pytest.raises(PlanError) as caught:
        replan(Request((path,), limits(macs="0.05x")))
    assert f"macs {reachable} (0.12x), asked 50" in caught.value.one_line()
    with pytest.raises(PlanError) as caught:
        replan(Request((path,), limits(macs="0.4x", max_drop="2")))
    least = min(drop(cut) for cut in cuts(made) if macs(cut) >= 0.6 * TOTAL_MACS)
    most = max(macs(cut) for cut in cuts(made) if drop(cut) <= 2)
    text = caught.value.one_line()
    assert f"a predicted drop of {least:.2f} points, asked 2" in text
    assert f"macs {TOTAL_MACS - most} " in text


def test_a_budget_that_is_met_already_cuts_nothing(tmp_path: Path) -> None:
    made = profile("style", seed=0)
    sure = made.model_copy(
        update={"scores": tuple(s.model_copy(update={"score": abs(s.score) + 0.001}) for s in made.scores)}
    )
    found = replan(Request((written(tmp_path, sure),), limits(macs="1x")))
    assert found["sites"] == []
    assert found["saves"]["macs"]["saved"] == 0


def test_the_front_has_no_cut_that_another_one_beats(tmp_path: Path) -> None:
    made = profile("style", seed=2, with_times=False)
    found = plan_front(Request((written(tmp_path, made),), Budgets()))
    assert found["resource"] == "macs"
    assert len(found["points"]) > 5
    for point in found["points"]:
        saved = point["saves"]["macs"]["saved"]
        assert point["loss"] == pytest.approx(min(loss(cut) for cut in cuts(made) if macs(cut) >= saved), abs=1e-9)
    losses = [point["loss"] for point in found["points"]]
    saves = [point["saves"]["macs"]["saved"] for point in found["points"]]
    assert losses == sorted(losses)
    assert saves == sorted(saves)
    assert saves[-1] == 4 * (90 + 130)


def test_the_front_is_drawn_against_time_where_times_were_measured(tmp_path: Path) -> None:
    path = written(tmp_path, profile("style", seed=2))
    for form in ("html", "svg", "json"):
        out = tmp_path / f"front.{form}"
        assert entry.run(["plan", "-q", str(path), "--front", "-o", str(out)]) == 0
        text = out.read_text(encoding="utf-8")
        assert ("saved latency" in text) == (form != "json")
    found = json.loads((tmp_path / "front.json").read_text(encoding="utf-8"))
    drawn = (tmp_path / "front.svg").read_text(encoding="utf-8")
    assert drawn.count("<circle") == len(found["points"])
    assert drawn.count('class="front"') == len(found["points"]) - 1
    assert "http" not in (tmp_path / "front.html").read_text(encoding="utf-8").replace("http-equiv", "")


def test_a_plan_is_written_as_a_recipe_that_names_its_sites(tmp_path: Path) -> None:
    path = written(tmp_path, profile("style", seed=0))
    out = tmp_path / "plan.yaml"
    assert entry.run(["plan", "-q", str(path), "--macs", "0.5x", "-o", str(out)]) == 0
    names = [site["name"] for site in replan(Request((path,), limits(macs="0.5x")))["sites"]]
    recipe = load_recipe(out)
    assert recipe.model == "toy"
    assert [(step.name, step.options) for step in recipe.passes][:2] == [
        ("canonicalize", {}),
        ("skip-branches", {"branches": names}),
    ]
    assert recipe.budgets.macs == "0.5x"


def test_a_plan_is_put_into_a_recipe_and_leaves_the_rest(tmp_path: Path) -> None:
    path, base, out = written(tmp_path, profile("style", seed=0)), tmp_path / "base.yaml", tmp_path / "new.yaml"
    base.write_text("model: ./mine\nbudgets: {max_drop: 2}\npasses: [canonicalize, skip-branches, fold-constants]\n")
    words = ["plan", "-q", str(path), "--latency", "0.6x", "--sites", "both", "--recipe", str(base), "-o", str(out)]
    assert entry.run(words) == 0
    recipe = load_recipe(out)
    assert recipe.model == str(tmp_path / "mine")
    assert (recipe.budgets.max_drop, recipe.budgets.latency) == (2.0, "0.6x")
    names = [step.name for step in recipe.passes]
    assert names[0] == "canonicalize"
    assert names[-1] == "fold-constants"
    assert set(names[1:-1]) <= {"skip-branches", "skip-layers"}
    assert all(step.options for step in recipe.passes[1:-1])


def test_the_terminal_shows_the_cut_its_price_and_what_each_task_alone_would_cut(
    tmp_path: Path, capsys: Capture
) -> None:
    paths = [str(written(tmp_path, profile(name, seed=i))) for i, name in enumerate(("style", "meaning"))]
    assert entry.run(["plan", *paths, "--combine", "worst", "--macs", "0.5x"]) == 0
    shown = capsys.readouterr().out
    for words in ("What to cut", "importance for meaning", "saves 5", "a cut of its own", "predicted drop (points)"):
        assert words in shown


Change = Callable[[Path], list[str]]


@pytest.mark.parametrize(
    ("words", "expected", "code"),
    [
        (["A"], "plan: has no budget; expected --max-drop, --latency, --macs or --size", 1),
        (["A", "--macs", "2g"], "did you mean 'G'", 2),
        (["A", "--latency", "5"], "has no unit", 2),
        (["A", "--max-drop", "2%"], "means nothing without the metric", 1),
        (["A", "B", "--macs", "0.5x"], "nothing says how to weigh them", 1),
        (["A", "--macs", "0.5x", "--combine", "worst"], "there is one profile only", 1),
        (["A", "B", "--macs", "0.5x", "--combine", "worst", "--weights", "1,2"], "nothing is weighted", 1),
        (["A", "B", "--macs", "0.5x", "--combine", "weighted", "--weights", "1"], "1 are given; expected 2", 1),
        (["A", "B", "--macs", "0.5x", "--combine", "weighted", "--weights", "0,0"], "not all zero", 1),
        (["A", "B", "--macs", "0.5x", "--combine", "weighted", "--weights", "x"], "no list of numbers", 2),
        (["A", "A", "--macs", "0.5x", "--combine", "worst"], "is of the same task as", 1),
        (["A", "OTHER", "--macs", "0.5x", "--combine", "worst"], "is of another model", 1),
        (["A", "B", "--front", "--combine", "worst"], "is drawn of one loss", 1),
        (["A", "--front", "--max-drop", "1"], "--max-drop has no place", 1),
        (["A", "--front", "--recipe", "x.yaml"], "--front makes no recipe", 2),
        (["A", "--macs", "0.5x", "--recipe", "x.yaml"], "add -o NEW.yaml", 2),
        (["A", "--macs", "0.5x", "-o", "plan.txt"], "its ending says no format", 1),
        (["A", "--front", "-o", "front.yaml"], "its ending says no format", 1),
        (["A", "--macs", "0.5x", "--keep", "layer.0"], "'layer.0' matches nothing", 1),
        (["BARE", "--macs", "0.5x"], "does not say what the whole model takes", 1),
        (["BARE", "--max-drop", "1"], "has no drops in points", 1),
        (["UNTIMED", "--latency", "0.5x"], "has no measured times", 1),
        (["NONE", "--macs", "0.5x"], "no such file", 1),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str, code: int
) -> None:
    made = {
        "A": profile("style", seed=0),
        "B": profile("meaning", seed=1),
        "OTHER": profile("count", seed=1, model="model-b"),
        "BARE": profile("bare", seed=0, with_drops=False, with_totals=False),
        "UNTIMED": profile("untimed", seed=0, with_times=False),
    }
    paths = {name: str(written(tmp_path, one)) for name, one in made.items()} | {"NONE": str(tmp_path / "none.json")}
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert entry.run(["plan", *(paths.get(word, word) for word in words)]) == code
    shown = capsys.readouterr().err
    assert expected in " ".join(shown.split())
    if code == 1:
        assert shown.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_an_existing_plan_is_replaced_only_when_asked(tmp_path: Path, capsys: Capture) -> None:
    path, out = written(tmp_path, profile("style", seed=0)), tmp_path / "plan.yaml"
    out.write_text("mine", encoding="utf-8")
    assert entry.run(["plan", "-q", str(path), "--macs", "0.5x", "-o", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "mine"
    assert entry.run(["plan", "-q", str(path), "--macs", "0.5x", "-o", str(out), "--force"]) == 0
    assert "skip-branches" in out.read_text(encoding="utf-8")


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    path = written(tmp_path, profile("style", seed=0))
    code = (
        "import sys; from vlmopt.cli import entry; "
        f"code = entry.run(['plan', '-q', {str(path)!r}, '--macs', '0.5x', '-o', {str(tmp_path / 'p.yaml')!r}]); "
        "print(code, sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "0 []\n"


def test_ranks_of_the_bootstrap_come_with_the_plan(tmp_path: Path) -> None:
    ranks = {"encoder/layers.0.ffn": (0.0, 2.0)}
    made = profile("style", seed=0, stability=ProfileStability(n_resamples=10, ranks=ranks, agreement={}))
    found: dict[str, Any] = replan(Request((written(tmp_path, made),), limits(macs="0.15x")))
    by_name = {site["name"]: site["ranks"]["style"] for site in found["sites"]}
    assert by_name["encoder/layers.0.ffn"] == (0.0, 2.0)
    assert sum(rank is not None for rank in by_name.values()) == 1
