"""What every pass must leave intact, checked from outside by comparing a snapshot with the result.

Rules:
1. No tensor of the program is written in place: tensors are shared with the program before the pass.
2. The program changes if and only if a site is applied.
3. Inputs and outputs stay as they are unless the pass declares `changes_signature`, and always fit the graph.
4. Every graph passes fx's own lint, and every node but the output has `meta["val"]`.
5. No output becomes an input or another output.
6. Names of sites are unique within a plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from vlmopt.core.contract import Pass, Plan
from vlmopt.core.errors import PassError
from vlmopt.core.program import Component, Program, TensorSpec
from vlmopt.graph.modules import output_values, placeholders
from vlmopt.graph.text import component_text


@dataclass(frozen=True)
class _Stored:
    """A tensor as it was: `version` counts autograd's writes in place, `checksum` notices the others."""

    path: str
    tensor: torch.Tensor
    version: int
    checksum: int | None

    @property
    def is_unchanged(self) -> bool:
        return self.tensor._version == self.version and checksum(self.tensor) == self.checksum


@dataclass(frozen=True)
class Snapshot:
    """Text, signature, node names, aliases and tensors of a program at one moment."""

    texts: dict[str, str]
    signatures: dict[str, object]
    nodes: dict[str, frozenset[str]]
    aliases: dict[str, frozenset[str]]
    tensors: tuple[_Stored, ...]

    @classmethod
    def of(cls, program: Program) -> Snapshot:
        parts = program.components
        return cls(
            {name: component_text(part) for name, part in parts.items()},
            {name: (part.inputs, part.outputs) for name, part in parts.items()},
            {name: frozenset(node.name for node in part.graph.graph.nodes) for name, part in parts.items()},
            {name: _aliases(part.graph) for name, part in parts.items()},
            tuple(_stored(program)),
        )


def checksum(tensor: torch.Tensor) -> int | None:
    """Sum over the tensor's bytes, eight at a time; None where there are no bytes (meta and fake tensors)."""
    if tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor) or tensor.layout is not torch.strided:
        return None
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    if data.data_ptr() % 8:
        data = data.clone()
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())


def _stored(program: Program) -> Iterable[_Stored]:
    seen: set[int] = set()
    for name, component in program.components.items():
        for path, tensor in [*component.graph.named_parameters(), *component.graph.named_buffers()]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield _Stored(f"{name}/{path}", tensor, tensor._version, checksum(tensor))


def stamp_new_nodes(before: Snapshot, program: Program, pass_: Pass, step: int) -> None:
    """Marks every node that was not there before with who made it."""
    for name, component in program.components.items():
        known = before.nodes.get(name, frozenset())
        for node in component.graph.graph.nodes:
            if node.name not in known:
                node.meta["made_by"] = (step, pass_.name)  # metadata copied from an older node names its maker


def check_plan(plan: Plan, place: str) -> None:
    """Raises PassError when two sites have one name."""
    names = [site.name for site in plan.sites]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise PassError(place, f"plans two sites named {twice}", expected="names that are unique within the plan")


def check_invariants(before: Snapshot, program: Program, pass_: Pass, step: int, *, n_applied: int) -> None:
    """Raises PassError, naming pass and step, for the first invariant that does not hold."""
    place = f"step {step} {pass_.name}"
    for stored in before.tensors:
        if not stored.is_unchanged:
            found = f"wrote tensor {stored.path} in place"
            raise PassError(place, found, expected="a new tensor, since weights are shared")
    changed = {name: component_text(part) for name, part in program.components.items()} != before.texts
    if changed != (n_applied > 0):
        found = "changed the program without applying a site" if changed else "applied sites that changed nothing"
        raise PassError(place, found, expected="a change if and only if a site is applied")
    if not pass_.changes_signature:
        _check_signature(before, program, place)
    for name, component in program.components.items():
        _check_component(component, before.aliases.get(name, frozenset()), f"{place}, component {name}")


def _check_signature(before: Snapshot, program: Program, place: str) -> None:
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
    new = _aliases(component.graph) - known_aliases
    if new:
        raise PassError(place, f"an output is {min(new)}", expected="outputs that alias nothing")


def lint(graph: fx.GraphModule, place: str) -> None:
    """fx's own check of the graph, as a PassError."""
    try:
        graph.graph.lint()
    except (RuntimeError, AttributeError) as error:
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


def _aliases(graph: fx.GraphModule) -> frozenset[str]:
    """Outputs that are an input, or another output, by what they are."""
    outputs, inputs = output_values(graph), set(placeholders(graph))
    found = {f"the input {node.target}" for node in outputs if node in inputs}
    found |= {f"output {outputs.index(node)} again" for i, node in enumerate(outputs) if outputs.index(node) < i}
    return frozenset(found)
