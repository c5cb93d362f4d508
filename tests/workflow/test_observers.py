"""Observers show what passes do, and say which site breaks something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vlmopt_passes.canonicalize import Canonicalize
from vlmopt_passes.skip_branches import SkipBranches

from tests.workflow.steps import (
    EditClosely,
    EditLossily,
    EditOutput,
    blocks,
    fail,
    feeds,
    run_all,
    times,
    with_an_operand_too_few,
    without_metadata,
)
from vlmopt.core.contract import Pass
from vlmopt.core.errors import GateError, PassError, VlmoptError
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.text import component_text
from vlmopt.workflow.watching.observing import PrintGraphs, VerifyEach
from vlmopt.workflow.watching.tracing import MOST_SHOWN, Trace, why_lines

SKIP = SkipBranches(branches=("layers.0.ffn",))
HONEST = times(1.0)


def printed(before: set[int] = set(), after: set[int] = set(), diff: set[int] = set()) -> list[str]:  # noqa: B006
    shown: list[str] = []
    observer = PrintGraphs(frozenset(before), frozenset(after), frozenset(diff), shown.append)
    run_all(blocks(), [Canonicalize(), SKIP], observer)
    return shown


def test_the_graph_is_printed_before_and_after_the_steps_asked_for_and_no_others() -> None:
    program = blocks()
    result = run_all(program, [Canonicalize(), SKIP])[1]
    before = component_text(program.components["model"]).rstrip("\n")
    after = component_text(result.program.components["model"]).rstrip("\n")
    assert printed() == []
    assert printed(before={2}) == [f"# before step 2 skip-branches\n{before}"]
    assert printed(after={2}) == [f"# after step 2 skip-branches\n{after}"]
    assert len(printed(before={1, 2}, after={1})) == 3


def test_a_diff_shows_only_the_nodes_that_went_and_those_that_read_something_else() -> None:
    (unchanged,) = printed(diff={1})
    assert unchanged == "# step 1 canonicalize\n(no change)"
    (text,) = printed(diff={2})
    lines = text.splitlines()
    gone = [line for line in lines if line.startswith("-%")]
    new = [line for line in lines if line.startswith("+%")]
    assert [line.split(" = ")[1].split()[0] for line in gone[:5]] == [
        "layernorm",
        "linear",
        "relu",
        "linear",
        "add.Tensor",
    ]
    assert len(gone) - len(new) == 5  # the branch and its sum
    assert all(line.split(":")[0][1:] in {old.split(":")[0][1:] for old in gone} for line in new)
    assert all("%x" in line for line in new)  # what read the sum reads the input now


@pytest.mark.parametrize(
    ("kind", "edits", "error", "expected"),
    [
        (
            EditOutput,
            (HONEST, times(2.0), HONEST),
            GateError,
            "step 1 edit-output, site model/1: changed the result by 1",
        ),
        (
            EditClosely,
            (HONEST, HONEST, times(1.01)),
            GateError,
            "step 1 edit-closely, site model/2: changed the result",
        ),
        (
            EditLossily,
            (times(3.0), times(float("nan"))),
            GateError,
            "step 1 edit-lossily, site model/1: output is not finite",
        ),
        (EditLossily, (HONEST, without_metadata), PassError, "component model, site model/1: node mul_tensor_1 has no"),
        (EditLossily, (with_an_operand_too_few,), PassError, "site model/0: the program fails to run"),
    ],
    ids=["exact", "close", "finite", "invariant", "runs"],
)
def test_verify_each_stops_at_the_first_site_that_breaks_something(
    kind: type[EditOutput], edits: tuple[Any, ...], error: type[VlmoptError], expected: str
) -> None:
    with pytest.raises(error) as caught:
        run_all(blocks(), [kind(edits=edits)], VerifyEach(feeds))
    assert expected in caught.value.one_line()


@pytest.mark.parametrize("kind", [EditOutput, EditClosely, EditLossily])
def test_verify_each_lets_an_honest_pass_through(kind: type[EditOutput]) -> None:
    (result,) = run_all(blocks(), [kind(edits=(HONEST, HONEST))], VerifyEach(feeds))
    assert len(result.applied) == 2
    close = EditClosely(edits=(times(1.0 + 1e-7), times(1.0 - 1e-7)))
    assert len(run_all(blocks(), [close], VerifyEach(feeds))[0].applied) == 2


def test_outputs_that_were_not_finite_before_are_no_fault_of_the_pass() -> None:
    infinite = run_all(blocks(), [EditLossily(edits=(times(float("inf")),))])[0].program
    assert len(run_all(infinite, [EditLossily(edits=(times(2.0),))], VerifyEach(feeds))[0].applied) == 1


def answer(passes: list[Pass], name: str) -> dict[str, Any]:
    trace = Trace((name,), lambda text: None)
    run_all(blocks(), passes, trace)
    (row,) = trace.answers()
    (match,) = [match for match in row["matches"] if match["name"] == name]
    return dict(match)


def test_a_node_names_its_maker_what_it_reads_and_who_removed_it() -> None:
    found = answer([Canonicalize(), SKIP], "model/relu")
    assert found["made_by"] == "capture"
    assert found["reads"] == ["model/layers_0_up"]
    assert found["removed_by"] == ["step 2 skip-branches, site model/layers.0.ffn"]
    assert found["sites"] == [{"step": 2, "pass": "skip-branches", "name": "model/layers.0.ffn", "outcome": "applied"}]
    assert found["text"].endswith("= relu (%layers_0_up)")


def test_a_node_that_a_pass_made_names_step_pass_and_site() -> None:
    found = answer([SKIP, EditOutput(edits=(HONEST, HONEST))], "model/mul_tensor_1")
    assert found["made_by"] == "step 2 edit-output, site model/1"
    assert found["reads"] == ["model/mul_tensor"]
    assert found["removed_by"] == []


def test_a_branch_tells_its_nodes_who_refused_it_and_why() -> None:
    found = answer([EditOutput(edits=(HONEST,)), SkipBranches(branches=("layers.1.ffn",))], "model/layers.0.ffn")
    assert (found["n_nodes"], found["n_left"]) == (5, 5)
    assert [(row["pass"], row["reason"]) for row in found["refusals"]] == [
        ("edit-output", "it is needed"),
        ("skip-branches", "not named in `branches`"),
    ]
    assert found["removed_by"] == []


def test_a_module_path_and_a_pattern_find_their_nodes() -> None:
    trace = Trace(("layers.0.*", "*"), lambda text: None)
    run_all(program_of(ResidualBlocks(blocks=4), torch.ones(2, 8)), [SKIP], trace)
    paths, everything = trace.answers()
    assert {match["name"] for match in paths["matches"]} == {
        "model/layers.0.ffn",
        *(f"model/layers_0_{name}" for name in ("norm", "up", "down")),
    }
    assert len(everything["matches"]) == MOST_SHOWN < everything["n_matches"]
    assert any("more names match *" in line for line in why_lines([everything]))


def test_a_site_that_the_run_left_or_never_reached_says_so() -> None:
    assert answer([SkipBranches()], "model/layers.1.ffn")["sites"][0]["outcome"] == "applied"
    trace = Trace(("model/1",), lambda text: None)
    with pytest.raises(PassError, match="planted"):
        run_all(blocks(), [EditOutput(edits=(HONEST, fail))], trace)
    assert trace.answers()[0]["matches"][0]["sites"][0]["outcome"] == "not reached"


def test_an_unknown_name_is_said_at_once_with_the_closest_one() -> None:
    said: list[str] = []
    trace = Trace(("layers.0.fn", "mul_tensor"), said.append)
    run_all(blocks(), [EditOutput(edits=(HONEST,))], trace)
    assert said[0] == (
        "--why layers.0.fn: nothing of the captured program has that name so far; did you mean 'layers.0.ffn'?"
    )
    assert len(said) == 2  # `mul_tensor` is made by the pass only
    assert trace.unknown() == ["layers.0.fn"]
    assert "layers.0.fn: nothing has that name; did you mean 'layers.0.ffn'?" in list(why_lines(trace.answers()))


def test_observers_leave_the_result_as_it_is() -> None:
    plain = run_all(blocks(), [Canonicalize(), SKIP])
    watched = run_all(blocks(), [Canonicalize(), SKIP], VerifyEach(feeds), Trace(("*",), lambda text: None))
    assert [step.text_after for step in plain] == [step.text_after for step in watched]
    x = feeds(blocks())["model"]["x"]
    outputs = [steps[-1].program.components["model"].graph(x)[0] for steps in (plain, watched)]
    assert torch.equal(*outputs)
