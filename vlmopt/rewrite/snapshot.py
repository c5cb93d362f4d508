"""A program at one moment, to tell what a pass changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from vlmopt.core.program import Program
from vlmopt.graph.modules import get_at, output_values, placeholders
from vlmopt.graph.text import component_text

_CHUNK = 2**20  # words of a tensor that are summed at once: their places need as much memory again


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
class _Leaf:
    """A leaf module as it was: its settings, and which tensors it held."""

    path: str
    module: nn.Module
    settings: str
    tensors: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, path: str, module: nn.Module) -> _Leaf:
        named = (*module.named_parameters(), *module.named_buffers())
        return cls(path, module, f"{module!r} {module.training}", tuple((name, id(tensor)) for name, tensor in named))

    @property
    def is_unchanged(self) -> bool:
        return _Leaf.of(self.path, self.module) == self


@dataclass(frozen=True)
class Snapshot:
    """Text, contents, signature, node names, aliases, tensors and leaf modules of a program at one moment."""

    texts: dict[str, str]
    contents: dict[str, object]
    described: dict[str, object]
    signatures: dict[str, object]
    nodes: dict[str, frozenset[str]]
    aliases: dict[str, frozenset[str]]
    tensors: tuple[_Stored, ...]
    leaves: tuple[_Leaf, ...]

    @classmethod
    def of(cls, program: Program) -> Snapshot:
        parts = program.components
        return cls(
            {name: component_text(part) for name, part in parts.items()},
            contents_of(program),
            described(program),
            {name: (part.inputs, part.outputs) for name, part in parts.items()},
            {name: frozenset(node.name for node in part.graph.graph.nodes) for name, part in parts.items()},
            {name: aliases_of(part.graph) for name, part in parts.items()},
            tuple(_stored(program)),
            tuple(_leaves(program)),
        )


def contents_of(program: Program) -> dict[str, object]:
    """What tells whether a pass changed something: the text of every graph, and which modules and tensors it reads."""
    return {name: (component_text(part), _objects(part.graph)) for name, part in program.components.items()}


def _objects(graph: fx.GraphModule) -> tuple[int, ...]:
    paths = (str(node.target) for node in graph.graph.nodes if node.op in ("call_module", "get_attr"))
    return tuple(id(get_at(graph, path)) for path in paths)


def described(program: Program) -> dict[str, object]:
    """What the program says of itself beside its graphs; tensors by identity, since they are not compared by value."""
    fixed = {(part, name): id(tensor) for part, feed in program.fixed_inputs.items() for name, tensor in feed.items()}
    return {
        "assembly": program.assembly,
        "similarity": program.similarity,
        "labels": program.labels,
        "generation": program.generation,
        "dims": dict(program.dims),
        "fixed inputs": fixed,
        "fitted heads": program.fitted_heads,
        "source": program.source,
    }


def _leaves(program: Program) -> Iterable[_Leaf]:
    seen: set[int] = set()
    for name, component in program.components.items():
        for node in component.graph.graph.nodes:
            module = get_at(component.graph, str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Module) and id(module) not in seen:
                seen.add(id(module))
                yield _Leaf.of(f"{name}/{node.target}", module)


def checksum(tensor: torch.Tensor) -> int | None:
    """Sum over the tensor's bytes, eight at a time, each counted by its place, so that rows that changed places are
    noticed too; None where there are no bytes (meta and fake tensors).
    """
    if tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor) or tensor.layout is not torch.strided:
        return None
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.data_ptr() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    total = int.from_bytes(bytes(data[whole:].tolist()), "little")
    every = data[:whole].view(torch.int64)
    for number, start in enumerate(range(0, len(every), _CHUNK)):
        words = every[start : start + _CHUNK]
        # Odd numbers, since an even one would lose bits of its word.
        places = torch.arange(1, 2 * len(words) + 1, 2, device=words.device)
        total += (2 * number + 1) * int((words * places).sum())
    return total


def _stored(program: Program) -> Iterable[_Stored]:
    seen: set[int] = set()
    for name, component in program.components.items():
        for path, tensor in [*component.graph.named_parameters(), *component.graph.named_buffers()]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield _Stored(f"{name}/{path}", tensor, tensor._version, checksum(tensor))


def aliases_of(graph: fx.GraphModule) -> frozenset[str]:
    """Outputs that are an input, or another output, by what they are."""
    outputs, inputs = output_values(graph), set(placeholders(graph))
    found = {f"the input {node.target}" for node in outputs if node in inputs}
    found |= {f"output {outputs.index(node)} again" for i, node in enumerate(outputs) if outputs.index(node) < i}
    return frozenset(found)
