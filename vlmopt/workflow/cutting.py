"""A program without some of its branches, for measuring what they cost where it runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vlmopt.core.program import Program
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.regions import skip_branch
from vlmopt.rewrite.pipeline import clone_program


def cut_program(program: Program, branches: Mapping[str, Collection[str]]) -> Program:
    """A clone in which these branches, by component, are skipped; heads stay as they are, since they cost the same."""
    clone = clone_program(program)
    for component, names in branches.items():
        graph = clone.components[component].graph
        for name in names:  # found anew each time, since skipping one branch changes the sum of the next
            for branch in find_branches(graph):
                if branch.name == name:
                    skip_branch(graph, branch)
            drop_dead_nodes(graph)
    return clone
