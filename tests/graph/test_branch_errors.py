"""How far every branch of an edited graph is off by itself."""

from __future__ import annotations

import pytest
import torch

from vlmopt.core.program import Program
from vlmopt.graph.branch_errors import branch_errors
from vlmopt.graph.branches import find_branches
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.modules import get_at
from vlmopt.graph.skipping import skip
from vlmopt.rewrite.pipeline import clone_program

FEED = {"x": torch.randn(6, 8, generator=torch.Generator().manual_seed(0))}


def _blocks() -> Program:
    return program_of(ResidualBlocks(), torch.ones(2, 8))


def _names(program: Program) -> list[str]:
    return [branch.name for branch in find_branches(program.components["model"].graph)]


def _feed(program: Program) -> dict[str, torch.Tensor]:
    (spec,) = program.components["model"].inputs
    return {spec.name: FEED["x"]}


def test_each_branch_answers_for_itself_alone() -> None:
    program = _blocks()
    edited = clone_program(program)
    first, *others = _names(program)
    branch = find_branches(edited.components["model"].graph)[0]
    last = [node for node in branch.region if node.op == "call_module"][-1]
    leaf = get_at(edited.components["model"].graph, str(last.target))
    assert isinstance(leaf, torch.nn.Linear)
    with torch.no_grad():
        halved = torch.nn.Linear(leaf.in_features, leaf.out_features)
        halved.weight.copy_(0.5 * leaf.weight)
        halved.bias.copy_(0.5 * leaf.bias)
    parent, _, name = str(last.target).rpartition(".")
    setattr(get_at(edited.components["model"].graph, parent), name, halved)
    found = branch_errors(program.components["model"], edited.components["model"], [(_feed(program), _feed(program))])
    assert found[first] == pytest.approx(0.25)
    assert others
    assert all(found[name] == 0.0 for name in others)


def test_a_branch_that_is_gone_has_no_error() -> None:
    program = _blocks()
    edited = clone_program(program)
    first, *others = _names(program)
    skip(edited, "model", [first])
    found = branch_errors(program.components["model"], edited.components["model"], [(_feed(program), _feed(program))])
    assert set(found) == set(others)
    assert all(error == 0.0 for error in found.values())
