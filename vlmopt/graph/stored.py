"""A program as two files, JSON for its graphs and safetensors for its weights, read back node for node.

Why not `torch.export`: exporting a graph again renames its nodes and drops some of them, and a pass that names what it
edits would not find it. Shapes are not stored: they are computed anew from the inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

from vlmopt.core.program import Assembly, Component, Dim, Generation, ModelSource, Program, Similarity, TensorSpec
from vlmopt.graph.marks import Mark, marks_of, set_marks
from vlmopt.graph.modules import get_at, graph_module, set_at
from vlmopt.graph.notation import leaf_from, leaf_words, read_value, target_from, target_word, write_value
from vlmopt.graph.shapes import compute_shapes

_SUFFIXES = (".json", ".safetensors")


def write_program(program: Program, folder: Path, *, name: str) -> None:
    """Writes `folder/NAME.json` and `folder/NAME.safetensors`.

    Raises:
        VlmoptError: a node holds something that has no notation (a module or function that vlmopt does not know).
    """
    tensors = _Tensors()
    similarity = None if program.similarity is None else asdict(program.similarity)
    content = {
        "assembly": program.assembly.value,
        "components": {name: component_words(part, tensors.key) for name, part in program.components.items()},
        "dims": {key: asdict(dim) for key, dim in program.dims.items()},
        "source": asdict(program.source),
        "similarity": similarity,
        "heads": program.heads,
        "fitted_heads": sorted(program.fitted_heads),
        "fixed_inputs": {
            part: {key: tensors.key(f"{part}|{key}", value) for key, value in fixed.items()}
            for part, fixed in program.fixed_inputs.items()
        },
        "labels": list(program.labels),
        "generation": None if program.generation is None else asdict(program.generation),
    }
    text, weights = (folder / (name + suffix) for suffix in _SUFFIXES)
    save_file(tensors.stored, weights)
    text.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_program(folder: Path, *, name: str) -> Program:
    """The program that `write_program` wrote; every node has its name, arguments and shape."""
    text, weights = (folder / (name + suffix) for suffix in _SUFFIXES)
    content = json.loads(text.read_text(encoding="utf-8"))
    # A copy begins where kernels like it to; what lies as it does in the file may be rounded another way.
    tensors = {key: value.clone() for key, value in load_file(weights).items()}
    dims = {key: Dim(**{**dim, "sum_of": tuple(dim["sum_of"])}) for key, dim in content["dims"].items()}
    similarity, generation = content["similarity"], content["generation"]
    return Program(
        Assembly(content["assembly"]),
        {key: component_from(key, words, tensors, dims) for key, words in content["components"].items()},
        dims,
        ModelSource(**content["source"]),
        None if similarity is None else Similarity(**similarity),
        content["heads"],
        frozenset(content["fitted_heads"]),
        {part: {key: tensors[k] for key, k in fixed.items()} for part, fixed in content["fixed_inputs"].items()},
        tuple(content["labels"]),
        None if generation is None else Generation(**{key: _frozen(value) for key, value in generation.items()}),
    )


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


class _Tensors:
    """Tensors by key; one that several nodes share is stored once and read back shared."""

    def __init__(self) -> None:
        self.stored: dict[str, torch.Tensor] = {}
        self._keys: dict[int, str] = {}

    def key(self, wanted: str, tensor: torch.Tensor) -> str:
        if id(tensor) not in self._keys:
            self._keys[id(tensor)] = wanted
            self.stored[wanted] = tensor.detach().clone().contiguous()
        return self._keys[id(tensor)]


def component_words(component: Component, key_of: Callable[[str, torch.Tensor], str]) -> dict[str, Any]:
    """The component as plain data.

    Args:
        key_of: under which key a tensor is found when the component is read back; asked with a name that fits.

    Raises:
        VlmoptError: a node holds something that has no notation.
    """
    module = component.graph
    leaves: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    for node in module.graph.nodes:
        path = str(node.target)
        if node.op == "call_module" and path not in leaves:
            leaf = get_at(module, path)
            assert isinstance(leaf, nn.Module)
            keys = {key: key_of(f"{component.name}/{path}.{key}", value) for key, value in _tensors_of(leaf)}
            leaves[path] = {**leaf_words(leaf, f"{component.name}/{node.name}"), "tensors": keys}
            if trained := [key for key, value in _tensors_of(leaf) if value.requires_grad]:
                leaves[path]["trained"] = trained
        elif node.op == "get_attr" and path not in raw:
            value = get_at(module, path)
            assert isinstance(value, torch.Tensor)
            is_parameter = isinstance(value, nn.Parameter)
            raw[path] = {"tensor": key_of(f"{component.name}/{path}", value), "is_parameter": is_parameter}
    return {
        "inputs": [asdict(spec) for spec in component.inputs],
        "outputs": [asdict(spec) for spec in component.outputs],
        "leaves": leaves,
        "tensors": raw,
        "nodes": [_node_words(component, node) for node in module.graph.nodes],
    }


def _tensors_of(leaf: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*leaf.named_parameters(), *leaf.named_buffers()]


def _node_words(component: Component, node: fx.Node) -> dict[str, Any]:
    place = f"{component.name}/{node.name}"
    words: dict[str, Any] = {"name": node.name, "op": node.op, "target": target_word(node, place)}
    words["args"] = write_value(list(node.args), place)
    if node.kwargs:
        words["kwargs"] = {key: write_value(value, place) for key, value in node.kwargs.items()}
    if "made_by" in node.meta:
        words["made_by"] = list(node.meta["made_by"])
    if marks_of(node):
        words["skipped"] = [list(mark) for mark in marks_of(node)]
    return words


def component_from(
    name: str, words: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dims: Mapping[str, Dim]
) -> Component:
    """The component that `component_words` wrote, holding the tensors of these keys; every node has its shape."""
    root = nn.Module()
    made: dict[tuple[str, bool], torch.Tensor] = {}

    def stored(key: str, *, is_parameter: bool) -> torch.Tensor:
        value = made.get((key, is_parameter), tensors[key])
        if is_parameter and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        return made.setdefault((key, is_parameter), value)

    for path, leaf in words["leaves"].items():
        parameters = {k: stored(key, is_parameter=True) for k, key in leaf["tensors"].items()}
        for key in leaf.get("trained", ()):
            parameters[key].requires_grad_(True)
        set_at(root, path, leaf_from(leaf, parameters))
    for path, entry in words["tensors"].items():
        set_at(root, path, stored(entry["tensor"], is_parameter=entry["is_parameter"]))
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in words["nodes"]:
        args = read_value(entry["args"], nodes)
        kwargs = {key: read_value(value, nodes) for key, value in entry.get("kwargs", {}).items()}
        node = graph.create_node(entry["op"], target_from(entry), tuple(args), kwargs, name=entry["name"])
        nodes[entry["name"]] = node
        if "made_by" in entry:
            node.meta["made_by"] = tuple(entry["made_by"])
        set_marks(node, (Mark(*mark) for mark in entry.get("skipped", ())))
    module = graph_module(root, graph)
    inputs, outputs = (_specs(words[side]) for side in ("inputs", "outputs"))
    component = Component(name, module, inputs, outputs)
    compute_shapes(component, dims)
    return component


def _specs(words: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(spec["name"], tuple(spec["shape"]), spec["dtype"]) for spec in words)
