"""What observers read off a graph: its lines under the names of nodes, and the nodes that a candidate is about."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlmopt.core.contract import Refusal, Site
from vlmopt.core.program import Component, Program
from vlmopt.graph.branches import Branch, find_branches
from vlmopt.graph.text import component_text

_NUMBER = re.compile(r"%(\d+)\b")


def named_lines(component: Component) -> dict[str, str]:
    """For every node its line of the canonical text, with the names of nodes in place of their numbers.

    Names stay when nodes in front of them go, so that two of these texts differ only where the graphs do.
    """
    names = [node.name for node in component.graph.graph.nodes]
    lines = component_text(component).splitlines()[1:]
    return {
        name: _NUMBER.sub(lambda match: f"%{names[int(match[1])]}", line)
        for name, line in zip(names, lines, strict=True)
    }


@dataclass(frozen=True)
class Cover:
    """Finds the nodes behind the names that passes use: nodes, branches, layers, modules and whole components."""

    component: Component
    branches: tuple[Branch, ...]

    @classmethod
    def of(cls, component: Component) -> Cover:
        return cls(component, tuple(find_branches(component.graph)))

    @property
    def node_names(self) -> frozenset[str]:
        return frozenset(node.name for node in self.component.graph.graph.nodes if node.op != "output")

    def nodes(self, names: Iterable[str]) -> frozenset[str]:
        """The nodes that any of the names stands for; empty for words that name nothing of the graph."""
        return frozenset().union(*(self._nodes_of(name) for name in names))

    def _nodes_of(self, name: str) -> frozenset[str]:
        if name == self.component.name:
            return self.node_names
        if name in self.node_names:
            return frozenset({name})
        members = [branch for branch in self.branches if name in (branch.name, branch.layer_name)]
        if members:
            return frozenset(node.name for branch in members for node in branch.region)
        return frozenset(
            node.name
            for node in self.component.graph.graph.nodes
            if node.op in ("call_module", "get_attr") and f"{node.target}.".startswith(f"{name}.")
        )


def covers_of(program: Program) -> dict[str, Cover]:
    """One for every component."""
    return {name: Cover.of(component) for name, component in program.components.items()}


def names_of(candidate: Site | Refusal) -> Sequence[str]:
    """The names by which a pass says what it would edit: a site's targets, and the name without its component."""
    own = candidate.name.removeprefix(f"{candidate.component}/")
    return (*candidate.target, own) if isinstance(candidate, Site) else (own,)


def covered(covers: dict[str, Cover], candidate: Site | Refusal) -> frozenset[str]:
    """The nodes that a site would edit, or that a refusal is about."""
    cover = covers.get(candidate.component)
    return frozenset() if cover is None else cover.nodes(names_of(candidate))
