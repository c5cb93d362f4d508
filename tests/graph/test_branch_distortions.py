"""How far edits of single branches move the features."""

from __future__ import annotations

import pytest
import torch

from vlmopt.core.program import Component, Program
from vlmopt.graph.branch_distortions import BranchDistortions
from vlmopt.graph.branches import find_branches
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.modules import get_at
from vlmopt.graph.replay import run_outputs
from vlmopt.graph.skipping import skip
from vlmopt.rewrite.pipeline import clone_program

_X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def _blocks() -> tuple[Program, Component, dict[str, torch.Tensor]]:
    program = program_of(ResidualBlocks(), torch.ones(2, 8))
    component = program.components["model"]
    return program, component, {component.inputs[0].name: _X}


def _scaled(program: Program, name: str, factor: float) -> Component:
    """The component with the last layer of a branch scaled."""
    component = clone_program(program).components["model"]
    branch = next(one for one in find_branches(component.graph) if one.name == name)
    path = str([node for node in branch.region if node.op == "call_module"][-1].target)
    leaf = get_at(component.graph, path)
    assert isinstance(leaf, torch.nn.Linear)
    made = torch.nn.Linear(leaf.in_features, leaf.out_features)
    with torch.no_grad():
        made.weight.copy_(factor * leaf.weight)
        made.bias.copy_(factor * leaf.bias)
    parent, _, last = path.rpartition(".")
    setattr(get_at(component.graph, parent), last, made)
    return component


def _moved(component: Component, other: Component, feed: dict[str, torch.Tensor]) -> float:
    own, changed = (run_outputs(one, feed)[0].double() for one in (component, other))
    return float((changed - own).square().sum() / own.square().sum())


def test_what_a_skip_changes_is_what_the_skipped_graph_computes() -> None:
    program, component, feed = _blocks()
    found = BranchDistortions(component, None, feed).skipped()
    assert len(found) == len(find_branches(component.graph))
    for name, moved in found.items():
        cut = clone_program(program)
        skip(cut, "model", [name])
        assert moved == pytest.approx(_moved(component, cut.components["model"], feed), rel=1e-4)
        assert moved > 0


def test_edits_of_one_branch_count_for_it_alone() -> None:
    program, component, feed = _blocks()
    first, *others = (branch.name for branch in find_branches(component.graph))
    edited = _scaled(program, first, 0.5)
    found = BranchDistortions(component, None, feed).edited(edited, feed, [first, *others])
    assert found[first] == pytest.approx(_moved(component, edited, feed), rel=1e-4)
    assert others
    assert all(found[name] < 1e-12 for name in others)


def test_a_branch_made_zero_moves_what_a_skip_moves() -> None:
    program, component, feed = _blocks()
    name = find_branches(component.graph)[1].name
    distortions = BranchDistortions(component, None, feed)
    found = distortions.edited(_scaled(program, name, 0.0), feed, [name])
    assert found[name] == pytest.approx(distortions.skipped()[name], rel=1e-4)


def test_a_branch_that_is_gone_is_left_out_and_the_whole_is_told() -> None:
    program, component, feed = _blocks()
    names = [branch.name for branch in find_branches(component.graph)]
    cut = clone_program(program)
    skip(cut, "model", names[:1])
    edited = cut.components["model"]
    distortions = BranchDistortions(component, None, feed)
    assert set(distortions.edited(edited, feed, names)) == set(names[1:])
    assert distortions.whole(edited, feed) == pytest.approx(_moved(component, edited, feed), rel=1e-4)
