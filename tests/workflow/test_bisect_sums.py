"""The search over real states of real programs: every planted fault is found, whatever it is and wherever."""

from __future__ import annotations

import functools
import runpy
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workflow.sums import passes_of, recipe_of, run_of, sums
from vlmopt.core.program import Program
from vlmopt.verify.bisection import Outcome, most_checks
from vlmopt.verify.parity import difference, program_scores
from vlmopt.verify.tolerances import CLOSE
from vlmopt.workflow.bisecting.judging import PromiseJudge
from vlmopt.workflow.bisecting.search import bisect_state, search
from vlmopt.workflow.bisecting.states import SiteLine


@functools.cache
def program_with(n: int) -> Program:
    return sums(n)


@functools.cache
def shared_judge(n: int) -> tuple[PromiseJudge, ExitStack]:
    """One judge for all searches in a program: files that it found equal are not emitted again."""
    stack = ExitStack()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    state = stack.enter_context(run_of(program_with(n), recipe_of({}), folder))
    return PromiseJudge(state), stack


@pytest.fixture(scope="module", autouse=True)
def _judges() -> Iterator[None]:
    yield
    for n in (5, 64):
        shared_judge(n)[1].close()
    shared_judge.cache_clear()


def found_in(n: int, *steps: dict[str, object]) -> tuple[Outcome, int, int, int]:
    """Outcome, number of the site, number of checks and number of sites."""
    recipe = recipe_of(*steps)
    with tempfile.TemporaryDirectory() as folder, run_of(program_with(n), recipe, Path(folder)) as state:
        line = SiteLine(state, passes_of(recipe))
        verdict, _ = search(state, line, shared_judge(n)[0])
    return verdict.outcome, verdict.first, verdict.n_checks, len(line.sites)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 64))
def test_a_fault_at_any_of_64_sites_is_found_within_seven_checks(broken: int) -> None:
    outcome, first, n_checks, n_sites = found_in(64, {"broken": broken})
    assert (first, n_sites) == (broken, 64)
    assert outcome is (Outcome.SITE if broken else Outcome.NOTHING)
    assert n_checks <= 7


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.sampled_from(["wrong", "nan", "raises"]))
def test_the_first_fault_of_several_steps_is_found(broken: list[int], how: str) -> None:
    outcome, first, n_checks, n_sites = found_in(5, *({"broken": number, "how": how} for number in broken))
    faults = [5 * step + number for step, number in enumerate(broken) if number]
    assert first == (min(faults) if faults else 0)
    assert outcome is (Outcome.SITE if faults else Outcome.NOTHING)
    assert n_checks <= most_checks(n_sites)


def bisected(folder: Path, n: int, *steps: dict[str, object], **options: Any) -> dict[str, Any]:
    recipe = recipe_of(*steps)
    with run_of(program_with(n), recipe, folder) as state:
        return bisect_state(state, passes_of(recipe), folder / "case", **options)


def run_script(path: Path) -> object:
    """The exit code of a case's script."""
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path), run_name="__main__")
    return caught.value.code


@pytest.mark.parametrize(
    ("how", "fault", "text"),
    [
        ("wrong", "promise", "step 2 replace-addition promises to be exact, and changes the result by 0."),
        ("nan", "promise", "changes the result by inf of the largest output (allowed 0e+00)"),
        ("raises", "fails", "apply model/add_2: raised ValueError: planted ("),
        ("loops", "fails", "apply model/add_2: is not done after 1 s"),
        ("weights", "fails", "wrote tensor model/scale in place"),
        ("shape", "fails", "the program cannot be run"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_written_as_a_case_that_fails(
    how: str, fault: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bisected(tmp_path, 5, {}, {"broken": 3, "how": how}, time_limit_s=1.0 if how == "loops" else 60.0)
    assert (found["outcome"], found["fault"], found["n_sites"]) == ("site", fault, 10)
    (site,) = found["sites"]
    assert (site["number"], site["step"], site["name"], site["component"]) == (8, 2, "model/add_2", "model")
    assert found["line"].startswith("site 8, model/add_2 of step 2 replace-addition (component model")
    assert "\n" not in found["line"]
    assert text in found["line"]
    case = tmp_path / "case"
    assert {path.name for path in case.iterdir()} >= {
        "case.py",
        "before.json",
        "before.txt",
        "README.md",
        "recipe.yaml",
    }
    assert found["needs_model"] is False
    assert run_script(case / "case.py") == 1
    assert text.split(" by ")[0] in capsys.readouterr().out


def test_a_plan_that_raises_is_found_as_well(tmp_path: Path) -> None:
    found = bisected(tmp_path, 5, {}, {"broken": 1, "how": "plan"})
    (site,) = found["sites"]
    assert (site["number"], site["step"], site["name"]) == (6, 2, "its plan")
    assert "raised ValueError: planted in the plan" in found["line"]
    assert run_script(tmp_path / "case" / "case.py") == 1


def test_a_case_is_cut_down_to_the_nodes_around_its_site(tmp_path: Path) -> None:
    found = bisected(tmp_path, 12, {"broken": 7})
    assert found["n_nodes"] <= 5
    assert found["sites"][0]["nodes"] == ["mul_tensor_6", "add_7"]
    before, changed = ((tmp_path / "case" / f"{name}.txt").read_text() for name in ("before", "diff"))
    assert len(before.splitlines()) <= 6
    assert [line for line in changed.splitlines() if line.startswith("+%mul")] != []


def test_sites_that_break_a_promise_only_together_are_held_against_the_program_before_the_step(tmp_path: Path) -> None:
    recipe = recipe_of({}, name="replace-slightly")
    program = program_with(5)
    with run_of(program, recipe, tmp_path) as state:
        line = SiteLine(state, passes_of(recipe))
        feeds = state.sample_feeds(program)
        wanted = program_scores(program, feeds)["output"]
        drifts = [difference(program_scores(line.reach(n).program, feeds)["output"], wanted) for n in range(6)]
        found = bisect_state(state, passes_of(recipe), tmp_path / "case")
    first = next(n for n, drift in enumerate(drifts) if drift > CLOSE["float32"])
    assert drifts[1] < CLOSE["float32"]
    assert (found["sites"][0]["number"], found["fault"]) == (first, "promise")
    assert (tmp_path / "case" / "reference.json").is_file()
    assert run_script(tmp_path / "case" / "case.py") == 1


def test_weights_that_a_pass_writes_are_as_they_were_in_every_other_state(tmp_path: Path) -> None:
    before = program_with(5).components["model"].graph.get_parameter("scale").clone()
    found = bisected(tmp_path, 5, {"broken": 2, "how": "weights"})
    assert found["sites"][0]["number"] == 2
    assert torch.equal(program_with(5).components["model"].graph.get_parameter("scale"), before)


def test_a_program_that_is_good_is_said_to_be(tmp_path: Path) -> None:
    found = bisected(tmp_path, 5, {}, {})
    assert found["line"] == "nothing is bad (10 sites, 4 checks)"
    assert found["case"] is None
    assert not (tmp_path / "case").exists()


def test_answers_of_a_search_that_was_interrupted_are_taken_up(tmp_path: Path) -> None:
    recipe = recipe_of({"broken": 4})
    with run_of(program_with(5), recipe, tmp_path) as state:
        line = SiteLine(state, passes_of(recipe))
        asked: list[int] = []

        def judge(reached: Any) -> Any:
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(reached.number)
            return PromiseJudge(state)(reached)

        with pytest.raises(KeyboardInterrupt):
            search(state, line, judge)
        assert len(asked) == 2
        verdict, _ = search(state, line, lambda reached: asked.append(reached.number) or PromiseJudge(state)(reached))
    assert verdict.first == 4
    assert len(asked) == len(set(asked)) == verdict.n_checks
