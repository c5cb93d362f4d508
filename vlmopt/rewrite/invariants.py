"""What every pass must leave intact, checked from outside by comparing a snapshot with the result.

Rules:
1. No tensor is written in place, and no leaf module gets another tensor or setting: both are shared with the program
   before the pass.
2. The program changes if and only if a site is applied.
3. Inputs, outputs and what else the program says of itself (assembly, labels, dims ...) stay as they are unless the
   pass declares `changes_signature`; inputs and outputs always fit the graph, and heads are modules that it calls.
4. Every graph passes fx's own lint, and every node but the output has `meta["val"]`.
5. No output becomes an input or another output.
6. A plan is a `Plan` of sites and refusals, in components that exist, with names that are unique among the sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

from vlmopt.core.contract import Pass
from vlmopt.core.errors import PassError, VlmoptError
from vlmopt.core.program import Component, Program, TensorSpec
from vlmopt.graph.modules import has_path, output_values, placeholders
from vlmopt.rewrite.planned import kind_of
from vlmopt.rewrite.snapshot import Snapshot as Snapshot
from vlmopt.rewrite.snapshot import aliases_of, contents_of, described
from vlmopt.rewrite.snapshot import checksum as checksum


def stamp_new_nodes(before: Snapshot, program: Program, pass_: Pass, step: int) -> None:
    """Marks every node that was not there before with who made it."""
    for name, component in program.components.items():
        known = before.nodes.get(name, frozenset())
        for node in component.graph.graph.nodes:
            if node.name not in known:
                node.meta["made_by"] = (step, pass_.name)  # metadata copied from an older node names its maker


@contextmanager
def judging(place: str) -> Iterator[None]:
    """What a pass left behind may be such that even looking at it fails; that is the pass's fault as well."""
    try:
        yield
    except VlmoptError:
        raise
    except Exception as error:
        found = f"left a program that cannot be read ({type(error).__name__}: {error})"
        raise PassError(place, found, expected="components with sound graphs") from error


def check_invariants(before: Snapshot, program: Program, pass_: Pass, step: int, *, n_applied: int) -> None:
    """Raises PassError, naming pass and step, for the first invariant that does not hold."""
    place = f"step {step} {pass_.name}"
    with judging(place):
        _check_shared(before, place)
        for name, component in program.components.items():
            check_component(component, name, place)
        changed = contents_of(program) != before.contents
        if changed != (n_applied > 0):
            found = "changed the program without applying a site" if changed else "applied sites that changed nothing"
            raise PassError(place, found, expected="a change if and only if a site is applied")
        if not pass_.changes_signature:
            _check_signature(before, program, place)
        for name, component in program.components.items():
            _check_component(component, before.aliases.get(name, frozenset()), f"{place}, component {name}")
        _check_heads(program, place)


def check_component(component: object, name: str, place: str) -> None:
    """Raises PassError unless this is a component of that name around a graph."""
    if not isinstance(component, Component) or not isinstance(component.graph, fx.GraphModule):
        raise PassError(
            place, f"put {kind_of(component)} at components[{name!r}]", expected="a Component with its graph"
        )
    if component.name != name:
        raise PassError(place, f"put the component {component.name!r} at components[{name!r}]", expected="one name")


def _check_shared(before: Snapshot, place: str) -> None:
    for stored in before.tensors:
        if not stored.is_unchanged:
            found = f"wrote tensor {stored.path} in place"
            raise PassError(place, found, expected="a new tensor, since weights are shared")
    for leaf in before.leaves:
        if not leaf.is_unchanged:
            found = f"changed the module {leaf.path} in place"
            raise PassError(place, found, expected="a new module, since leaf modules are shared")


def _check_heads(program: Program, place: str) -> None:
    for name, path in program.heads.items():
        if name not in program.components:
            raise PassError(place, f"left a head of {name}, which is gone", remedy="remove it from program.heads")
        graph = program.components[name].graph
        if not has_path(graph, path) or all(node.target != path for node in graph.graph.nodes):
            found = f"left {path} as the head of {name}, which calls no such module"
            raise PassError(place, found, remedy="name the new one in program.heads, or remove the entry")


def _check_signature(before: Snapshot, program: Program, place: str) -> None:
    found = described(program)
    for what, value in before.described.items():
        if found[what] != value:
            raise PassError(place, f"changed the program's {what}", expected="changes_signature = True")
    found = {name: (part.inputs, part.outputs) for name, part in program.components.items()}
    if found != before.signatures:
        names = sorted(set(found) ^ set(before.signatures)) or [n for n in found if found[n] != before.signatures[n]]
        raise PassError(place, f"changed the signature of {', '.join(names)}", expected="changes_signature = True")


def _check_component(component: Component, known_aliases: frozenset[str], place: str) -> None:
    lint(component.graph, place)
    for node in component.graph.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            raise PassError(place, f"node {node.name} has no shape metadata", expected="meta['val'] on every node")
    _check_specs(component, place)
    new = aliases_of(component.graph) - known_aliases
    if new:
        raise PassError(place, f"an output is {min(new)}", expected="outputs that alias nothing")


def lint(graph: fx.GraphModule, place: str) -> None:
    """fx's own check of the graph, as a PassError."""
    try:
        graph.graph.lint()
    except Exception as error:
        raise PassError(place, f"left a broken graph ({error})") from error


def _check_specs(component: Component, place: str) -> None:
    """The graph takes and returns what the component's inputs and outputs say."""
    inputs, outputs = placeholders(component.graph), output_values(component.graph)
    names, wanted = [str(node.target) for node in inputs], [spec.name for spec in component.inputs]
    if names != wanted:
        raise PassError(place, f"the graph takes {', '.join(names) or 'nothing'}", expected=", ".join(wanted))
    if len(outputs) != len(component.outputs):
        raise PassError(place, f"the graph returns {len(outputs)} values", expected=str(len(component.outputs)))
    for node, spec in zip((*inputs, *outputs), (*component.inputs, *component.outputs), strict=True):
        if not _fits(node.meta["val"], spec):
            found = f"{spec.name} has shape {tuple(node.meta['val'].shape)} and dtype {node.meta['val'].dtype}"
            raise PassError(place, found, expected=f"{spec.shape} and {spec.dtype}, as its spec says")


def _fits(value: object, spec: TensorSpec) -> bool:
    if not isinstance(value, torch.Tensor):
        return True
    if str(value.dtype).removeprefix("torch.") != spec.dtype or value.dim() != len(spec.shape):
        return False
    pairs = zip(value.shape, spec.shape, strict=True)
    return all(found == wanted for found, wanted in pairs if isinstance(found, int) and isinstance(wanted, int))
