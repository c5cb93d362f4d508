"""A program without some of its branches, for measuring what they cost where it runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vlmopt.core.program import Program
from vlmopt.graph.skipping import skip
from vlmopt.rewrite.pipeline import clone_program


def cut_program(program: Program, branches: Mapping[str, Collection[str]]) -> Program:
    """A clone in which these branches, by component, are skipped; heads stay as they are, since they cost the same."""
    clone = clone_program(program)
    for component, names in branches.items():
        skip(clone, component, names)
    return clone
