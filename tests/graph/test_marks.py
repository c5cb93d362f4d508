"""What was skipped at a value is known afterwards, whatever the order of skipping and whatever happens to the graph."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from tests.graph.blocks import Parallel, PostNorm, PreNorm, Stack, sample, seeded
from vlmopt.core.contract import Context
from vlmopt.core.program import Component, Program
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import canonicalize_graph, drop_dead_nodes
from vlmopt.graph.example import ResidualBlocks, component_of, program_of, without_branches
from vlmopt.graph.head import append_head, fitted_linear, replace_head
from vlmopt.graph.marks import Mark, marks_of, set_marks
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.regions import skip_branch
from vlmopt.graph.stored import read_program, write_program
from vlmopt.graph.text import component_text
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step


def marked(graph: fx.GraphModule) -> dict[str, list[str]]:
    """Names of marked nodes and the branches that were skipped there."""
    return {node.name: [mark.branch for mark in marks_of(node)] for node in graph.graph.nodes if marks_of(node)}


def places(graph: fx.GraphModule) -> list[tuple[int, tuple[Mark, ...]]]:
    """Places of marked nodes in the graph, and their marks: names of new nodes depend on the order of skipping."""
    return [(i, marks_of(node)) for i, node in enumerate(graph.graph.nodes) if marks_of(node)]


def after_skips(component: Component, names: tuple[str, ...]) -> fx.GraphModule:
    graph = clone_graph(component.graph)
    for name in names:
        skip_branch(graph, next(branch for branch in find_branches(graph) if branch.name == name))
        drop_dead_nodes(graph)
    return graph


@pytest.mark.parametrize("block", [PreNorm, Parallel, PostNorm])
def test_the_order_of_skipping_does_not_show_in_the_marks(block: type[nn.Module]) -> None:
    component = component_of(seeded(Stack(block(), block())), sample())
    names = [branch.name for branch in find_branches(component.graph)]
    for n in range(1, 5):
        for subset in combinations(names, n):
            found = [places(after_skips(component, order)) for order in permutations(subset)]
            assert all(one == found[0] for one in found), subset
            assert sorted(mark.branch for _, marks in found[0] for mark in marks) == sorted(subset)


def test_every_mark_lies_on_the_value_that_the_next_kept_branch_reads() -> None:
    component = component_of(seeded(Stack(PreNorm(), PreNorm(), PreNorm())), sample())
    graph = after_skips(component, ("layers.2.mlp", "layers.1.attn", "layers.0.mlp", "layers.1.mlp"))
    by_name = {node.name: node for node in graph.graph.nodes}
    first, last = (branch.exit for branch in find_branches(graph))
    assert marked(graph) == {
        first.name: ["layers.0.mlp", "layers.1.attn", "layers.1.mlp"],
        last.name: ["layers.2.mlp"],
    }
    assert marks_of(by_name[first.name])[1] == Mark("layers.1.attn", "layers.1", "attention")
    assert marks_of(by_name[last.name]) == (Mark("layers.2.mlp", "layers.2", "ffn"),)


def test_a_branch_beside_a_kept_one_says_so_until_that_goes_too() -> None:
    component = component_of(seeded(Stack(Parallel())), sample())
    (mark,) = (m for n in after_skips(component, ("layers.0.mlp",)).graph.nodes for m in marks_of(n))
    assert mark == Mark("layers.0.mlp", "layers.0", "ffn", is_beside=True)
    both = after_skips(component, ("layers.0.mlp", "layers.0.attn"))
    found = [mark for node in both.graph.nodes for mark in marks_of(node)]
    assert [(mark.branch, mark.is_beside) for mark in found] == [("layers.0.attn", False), ("layers.0.mlp", False)]


def test_marks_survive_clones_new_heads_and_files(tmp_path: Path) -> None:
    program = without_branches(program_of(ResidualBlocks(blocks=3), torch.ones(2, 8)), "layers.2.ffn", "layers.0.ffn")
    component = program.components["model"]
    wanted = marked(component.graph)
    assert sorted(wanted.values()) == [["layers.0.ffn"], ["layers.2.ffn"]]
    assert marked(clone_graph(component.graph)) == wanted
    linear = fitted_linear(torch.ones(5, 8), torch.ones(5), like=torch.ones(1))
    assert marked(replace_head(component, "head", "task_head", linear, "logits").graph) == wanted
    assert marked(replace_head(component, "head", "head", linear, "logits").graph) == wanted
    wider = fitted_linear(torch.ones(5, 3), None, like=torch.ones(1))
    assert marked(append_head(component, "task_head", wider, "logits").graph) == wanted
    write_program(program, tmp_path, name="p")
    again = read_program(tmp_path, name="p").components["model"].graph
    assert marked(again) == wanted
    assert [marks_of(node) for node in again.graph.nodes] == [marks_of(node) for node in component.graph.graph.nodes]


class _OnACopy(nn.Module):
    """A branch that begins at a copy of the input, or at a value that is computed from a weight alone."""

    def __init__(self, *, is_constant: bool) -> None:
        super().__init__()
        self.is_constant = is_constant
        self.start, self.branch = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        stream = torch.sin(self.start) if self.is_constant else torch.tanh(x).clone()
        return (stream + torch.relu(self.branch(stream))) * x


def _with_skipped_branch(module: nn.Module) -> Program:
    """As captured, with the copy still in it."""
    program = program_of(module, torch.ones(2, 4), raw=True)
    graph = program.components["model"].graph
    (branch,) = find_branches(graph)
    skip_branch(graph, branch)
    graph.recompile()
    return program


def test_canonicalize_hands_the_marks_of_a_copy_on() -> None:
    program = _with_skipped_branch(_OnACopy(is_constant=False))
    assert marked(program.components["model"].graph) == {"clone": ["branch.ffn"]}
    done = run_step(program, make_pass("canonicalize", {}), Context(), step=1)
    assert marked(done.program.components["model"].graph) == {"tanh": ["branch.ffn"]}
    canonicalize_graph(program.components["model"].graph)
    assert marked(program.components["model"].graph) == {"tanh": ["branch.ffn"]}


def test_fold_constants_hands_the_marks_of_what_it_stores_on() -> None:
    program = _with_skipped_branch(_OnACopy(is_constant=True))
    done = run_step(program, make_pass("fold-constants", {}), Context(), step=1)
    assert len(done.applied) == 1
    assert list(marked(done.program.components["model"].graph).values()) == [["branch.ffn"]]


def test_marks_are_no_part_of_the_text() -> None:
    component = program_of(ResidualBlocks(), torch.ones(2, 8)).components["model"]
    before = component_text(component)
    set_marks(next(iter(component.graph.graph.nodes)), [Mark("a", "b", "ffn")])
    assert marked(component.graph) == {"x": ["a"]}
    assert component_text(component) == before
