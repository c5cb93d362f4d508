"""What every pass must leave intact, checked from outside by comparing a snapshot with the result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from vlmopt.core.contract import Pass
from vlmopt.core.errors import PassError
from vlmopt.core.program import Program
from vlmopt.graph.modules import output_values, placeholders
from vlmopt.graph.text import component_text


@dataclass(frozen=True)
class Snapshot:
    """Text, signature, node names and tensor versions of a program at one moment."""

    texts: dict[str, str]
    signatures: dict[str, object]
    nodes: dict[str, frozenset[str]]
    versions: dict[int, tuple[str, torch.Tensor, int]]

    @classmethod
    def of(cls, program: Program) -> Snapshot:
        versions: dict[int, tuple[str, torch.Tensor, int]] = {}
        for name, component in program.components.items():
            graph = component.graph
            for path, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
                versions[id(tensor)] = (f"{name}/{path}", tensor, tensor._version)
        parts = program.components
        return cls(
            {name: component_text(part) for name, part in parts.items()},
            {name: (part.inputs, part.outputs) for name, part in parts.items()},
            {name: frozenset(node.name for node in part.graph.graph.nodes) for name, part in parts.items()},
            versions,
        )


def stamp_new_nodes(before: Snapshot, program: Program, pass_: Pass, step: int) -> None:
    """Marks every node that was not there before with who made it."""
    for name, component in program.components.items():
        known = before.nodes.get(name, frozenset())
        for node in component.graph.graph.nodes:
            if node.name not in known:
                node.meta.setdefault("made_by", (step, pass_.name))


def check_invariants(before: Snapshot, program: Program, pass_: Pass, step: int, *, n_applied: int) -> None:
    """Raises PassError, naming pass and step, for the first invariant that does not hold."""
    place = f"step {step} {pass_.name}"
    for path, tensor, version in before.versions.values():
        if tensor._version != version:
            raise PassError(place, f"wrote tensor {path} in place", expected="a new tensor, since weights are shared")
    changed = {name: component_text(part) for name, part in program.components.items()} != before.texts
    if changed != (n_applied > 0):
        found = "changed the program without applying a site" if changed else "applied sites that changed nothing"
        raise PassError(place, found, expected="a change if and only if a site is applied")
    if not pass_.changes_signature:
        _check_signature(before, program, place)
    for name, component in program.components.items():
        _check_graph(component.graph, f"{place}, component {name}")


def _check_signature(before: Snapshot, program: Program, place: str) -> None:
    found = {name: (part.inputs, part.outputs) for name, part in program.components.items()}
    if found != before.signatures:
        names = sorted(set(found) ^ set(before.signatures)) or [n for n in found if found[n] != before.signatures[n]]
        raise PassError(place, f"changed the signature of {', '.join(names)}", expected="changes_signature = True")


def _check_graph(graph: fx.GraphModule, place: str) -> None:
    graph.graph.lint()
    for node in graph.graph.nodes:
        if node.op not in ("output",) and "val" not in node.meta:
            raise PassError(place, f"node {node.name} has no shape metadata", expected="meta['val'] on every node")
    inputs = set(placeholders(graph))
    outputs = output_values(graph)
    if len(set(outputs)) != len(outputs) or inputs & set(outputs):
        raise PassError(place, "an output is an input or another output", expected="outputs that alias nothing")
