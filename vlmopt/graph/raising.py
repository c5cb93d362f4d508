"""Raises an exported program to one flat graph whose weighted operations are `torch.nn` leaves under original names.

Before: `aten.linear(x, get_attr W, get_attr b)`; after: `call_module` of an `nn.Linear` that holds the same W and b,
under the path of the module that made the call. The leaf calls the same ATen operation, so the output is bit-equal. On
such a graph peft, torch-pruning, torchao, autograd and a second `torch.export` work unchanged.

Modules that share a tensor (a tied embedding and output layer) become leaves that share it, each under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from vlmopt.graph.canonical import canonicalize_graph, drop_dead_nodes
from vlmopt.graph.functional import functional_graph
from vlmopt.graph.modules import free_path, get_at, graph_module, has_path, make_code, set_at

aten = torch.ops.aten


def raise_program(
    exported: torch.export.ExportedProgram, *, prefix: str = "", is_canonical: bool = True
) -> fx.GraphModule:
    """The exported program as a flat, canonical GraphModule over `torch.nn` leaves that returns a tuple of tensors.

    Args:
        prefix: cut from the front of every name (the attribute under which a capture wrapper holds the model).
        is_canonical: without it dead code and assertions are left in, as they come from torch.export.
    """
    flat = functional_graph(exported)
    graph = fx.Graph()
    root = nn.Module()
    mapping: dict[fx.Node, fx.Node] = {}
    _copy_nodes(flat, graph, root, mapping, prefix)
    module = graph_module(root, graph)
    if is_canonical:
        canonicalize_graph(module)
    raise_leaves(module, prefix=prefix)
    if is_canonical:
        drop_dead_nodes(module)
    module.graph.lint()
    make_code(module)
    return module


def _copy_nodes(
    source: fx.GraphModule, graph: fx.Graph, root: nn.Module, mapping: dict[fx.Node, fx.Node], prefix: str
) -> None:
    for node in source.graph.nodes:
        if node.op == "output":
            values = fx.node.map_arg(node.args[0], lambda n: mapping[n])
            flat = [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, fx.Node)]
            graph.output(tuple(flat))
        elif node.op == "get_attr":
            mapping[node] = _copy_attribute(source, node, graph, root, prefix)
        elif node.op == "call_module":
            continue  # only guards are left as modules, and they compute nothing
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])


def _copy_attribute(source: fx.GraphModule, node: fx.Node, graph: fx.Graph, root: nn.Module, prefix: str) -> fx.Node:
    path = str(node.target)
    value = get_at(source, path)
    path = path.removeprefix(prefix)
    if isinstance(value, torch.Tensor) and not has_path(root, path):
        set_at(root, path, value)
    copied = graph.create_node("get_attr", path, name=node.name)
    copied.meta = dict(node.meta)
    return copied


def raise_leaves(module: fx.GraphModule, *, prefix: str = "") -> int:
    """Replaces weighted ATen calls by `torch.nn` leaves; returns how many."""
    raised = 0
    for node in list(module.graph.nodes):
        build = _BUILDERS.get(node.target) if node.op == "call_function" else None
        made = None if build is None else build(module, node)
        if made is None:
            continue
        path = _place(module, _owner(node, made, prefix), made.leaf)
        with module.graph.inserting_before(node):
            call = module.graph.call_module(path, (made.operand,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
        raised += 1
    for node in reversed(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return raised


@dataclass(frozen=True)
class _Made:
    """A leaf, the path of the weight it holds, and the value it is called with."""

    leaf: nn.Module
    weight_path: str
    operand: fx.Node


def _owner(node: fx.Node, made: _Made, prefix: str) -> str:
    """Path of the module that made the call; where no `torch.nn` module did, of the one that owns the weight."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if stack:
        path, kind = stack[-1]
        kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        path = re.sub(r"@\d+$", "", path)  # torch marks the second call of a module so
        if path and kind.startswith("torch.nn.") and kind.endswith(f".{type(made.leaf).__name__}"):
            return str(path.removeprefix(prefix))
    return made.weight_path.removesuffix(".weight")


def _tensor(module: fx.GraphModule, node: object) -> torch.Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = get_at(module, str(node.target))
    return value if isinstance(value, torch.Tensor) else None


def _weight_and_bias(
    module: fx.GraphModule, weight: object, bias: object
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Both tensors, if the weight is stored under the name `weight` and a bias, if there is one, is stored as well."""
    stored, stored_bias = _tensor(module, weight), _tensor(module, bias)
    if stored is None or not str(weight.target).endswith(".weight"):  # type: ignore[attr-defined]
        return None
    return None if bias is not None and stored_bias is None else (stored, stored_bias)


def _fill(leaf: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    leaf.weight = _parameter(weight)
    if bias is not None:
        leaf.bias = _parameter(bias)
    return leaf.train(False)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _linear(module: fx.GraphModule, node: fx.Node) -> _Made | None:
    operand, weight, bias = _arguments(node, None, None, None)
    found = _weight_and_bias(module, weight, bias)
    if found is None:
        return None
    d_out, d_in = found[0].shape
    return _Made(
        _fill(nn.Linear(d_in, d_out, bias=bias is not None, device="meta"), *found), str(weight.target), operand
    )


def _layer_norm(module: fx.GraphModule, node: fx.Node) -> _Made | None:
    operand, shape, weight, bias, eps = _arguments(node, None, None, None, None, 1e-5)
    found = _weight_and_bias(module, weight, bias)
    if found is None:
        return None
    leaf = nn.LayerNorm(list(shape), eps=eps, bias=bias is not None, device="meta")
    return _Made(_fill(leaf, *found), str(weight.target), operand)


def _conv2d(module: fx.GraphModule, node: fx.Node) -> _Made | None:
    operand, weight, bias, stride, padding, dilation, groups = _arguments(node, None, None, None, 1, 0, 1, 1)
    found = _weight_and_bias(module, weight, bias)
    if found is None or found[0].dim() != 4:
        return None
    c_out, c_in, height, width = found[0].shape
    leaf = nn.Conv2d(
        c_in * groups,
        c_out,
        (height, width),
        stride=_pair(stride),
        padding=padding if isinstance(padding, str) else _pair(padding),
        dilation=_pair(dilation),
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    return _Made(_fill(leaf, *found), str(weight.target), operand)


def _embedding(module: fx.GraphModule, node: fx.Node) -> _Made | None:
    weight, indices = _arguments(node, None, None)
    found = _weight_and_bias(module, weight, None)
    if found is None:
        return None
    rows, width = found[0].shape
    return _Made(_fill(nn.Embedding(rows, width, device="meta"), *found), str(weight.target), indices)


def _arguments(node: fx.Node, *defaults: object) -> list[Any]:
    """The leading arguments of a call, the absent ones filled in."""
    return [*node.args[: len(defaults)], *defaults[len(node.args) :]]


def _pair(value: Sequence[int] | int) -> tuple[int, int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return (sizes[0], sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


_BUILDERS: dict[object, Callable[[fx.GraphModule, fx.Node], _Made | None]] = {
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.conv2d.default: _conv2d,
    aten.conv2d.padding: _conv2d,
    aten.embedding.default: _embedding,
}


def _place(module: fx.GraphModule, owner: str, leaf: nn.Module) -> str:
    """Puts the leaf at its owner's path; a second use with the same tensors reuses the module that lies there."""
    path, count = owner, 1
    while has_path(module, path):
        present = get_at(module, path)
        if _is_same_leaf(present, leaf):
            return path
        if isinstance(present, nn.Module) and type(present) is nn.Module and not present._modules:
            break  # the bare container that held the raw tensors until now
        count += 1
        path = f"{owner}_{count}"
    if has_path(module, path):
        _keep_raw_tensors(module, path)
    set_at(module, path, leaf)
    return path


def _is_same_leaf(present: object, leaf: nn.Module) -> bool:
    return (
        type(present) is type(leaf)
        and present.weight is leaf.weight
        and getattr(present, "bias", None) is getattr(leaf, "bias", None)
        and repr(present) == repr(leaf)
    )


def _keep_raw_tensors(module: fx.GraphModule, path: str) -> None:
    """Readers of a raw tensor under `path` (a layer's scale, say) keep reading it when a leaf comes to lie there."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target).rpartition(".")[0] == path:
            leaf_name = str(node.target).rpartition(".")[2]
            if leaf_name in ("weight", "bias"):
                continue  # the new leaf holds the same tensor under the same name
            moved = free_path(module, f"{path}_{leaf_name}")
            value = get_at(module, str(node.target))
            assert isinstance(value, torch.Tensor)
            set_at(module, moved, value)
            node.target = moved
