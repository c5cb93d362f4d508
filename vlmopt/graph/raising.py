"""Raises an exported program to one flat graph whose weighted operations are `torch.nn` leaves under their original names.

Before: `aten.linear(x, get_attr W, get_attr b)`; after: `call_module` of an `nn.Linear` that holds the same W and b at W's
own path. The leaf calls the same ATen operation, so the output is bit-equal. On such a graph peft, torch-pruning,
torchao, autograd and a second `torch.export` work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from vlmopt.graph.canonical import canonicalize_graph, drop_dead_nodes
from vlmopt.graph.modules import free_path, get_at, has_path, placeholders, set_at

aten = torch.ops.aten


def raise_program(
    exported: torch.export.ExportedProgram, *, prefix: str = "", is_canonical: bool = True
) -> fx.GraphModule:
    """The exported program as a flat, canonical GraphModule over `torch.nn` leaves that returns a tuple of tensors.

    `prefix` is cut from the front of every parameter name (the attribute under which a capture wrapper holds the model).
    With `is_canonical` False dead code and assertions are left in, as they come from torch.export.
    """
    flat = exported.module(check_guards=False)
    if not isinstance(flat, fx.GraphModule):
        raise TypeError(f"expected a GraphModule from torch.export, found {type(flat).__name__}")
    graph = fx.Graph()
    root = nn.Module()
    mapping: dict[fx.Node, fx.Node] = {}
    _copy_nodes(flat, graph, root, mapping, prefix)
    module = fx.GraphModule(root, graph, class_name="Component")
    if is_canonical:
        canonicalize_graph(module)
    raise_leaves(module)
    if is_canonical:
        drop_dead_nodes(module)
    module.graph.lint()
    module.recompile()
    module.train(False)
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
        elif _is_inlinable(node):
            _inline(source, node, graph, root, mapping)
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


def _is_inlinable(node: fx.Node) -> bool:
    """Regions under a changed autocast or grad mode compute the same at inference in one precision."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def _inline(
    source: fx.GraphModule, node: fx.Node, graph: fx.Graph, root: nn.Module, mapping: dict[fx.Node, fx.Node]
) -> None:
    position = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
    holder = node.args[position]
    assert isinstance(holder, fx.Node)
    body = get_at(source, str(holder.target))
    assert isinstance(body, fx.GraphModule)
    operands = [mapping[arg] for arg in node.args[position + 1 :] if isinstance(arg, fx.Node)]
    inner: dict[fx.Node, fx.Node] = dict(zip(placeholders(body), operands, strict=True))
    results: tuple[fx.Node, ...] = ()
    for child in body.graph.nodes:
        if child.op == "output":
            leaves = torch.utils._pytree.tree_leaves(child.args[0])
            results = tuple(inner[leaf] for leaf in leaves)
        elif child.op != "placeholder":
            inner[child] = graph.node_copy(child, lambda n: inner[n])
    for user in node.users:  # each reader is a getitem
        mapping[user] = results[int(user.args[1])]  # type: ignore[arg-type]


def raise_leaves(module: fx.GraphModule) -> int:
    """Replaces weighted ATen calls by `torch.nn` leaves; returns how many."""
    raised = 0
    for node in list(module.graph.nodes):
        build = _BUILDERS.get(node.target) if node.op == "call_function" else None
        if build is None:
            continue
        made = build(module, node)
        if made is None:
            continue
        leaf, owner, operand = made
        path = _place(module, owner, leaf)
        with module.graph.inserting_before(node):
            call = module.graph.call_module(path, (operand,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
        raised += 1
    for node in reversed(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return raised


Made = tuple[nn.Module, str, fx.Node] | None


def _tensor(module: fx.GraphModule, node: object) -> torch.Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = get_at(module, str(node.target))
    return value if isinstance(value, torch.Tensor) else None


def _owner(weight: object) -> str | None:
    """Path of the module that owns the parameter `weight`."""
    path = str(weight.target) if isinstance(weight, fx.Node) else ""
    return path.removesuffix(".weight") if path.endswith(".weight") else None


def _argument(node: fx.Node, position: int, default: object) -> object:
    return node.args[position] if len(node.args) > position else default


def _fill(leaf: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    leaf.weight = _parameter(weight)
    leaf.bias = None if bias is None else _parameter(bias)  # type: ignore[assignment]
    return leaf.train(False)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _linear(module: fx.GraphModule, node: fx.Node) -> Made:
    operand, weight, bias = node.args[0], node.args[1], _argument(node, 2, None)
    tensor, owner = _tensor(module, weight), _owner(weight)
    if tensor is None or owner is None or (bias is not None and _tensor(module, bias) is None):
        return None
    with torch.device("meta"):
        leaf = nn.Linear(tensor.shape[1], tensor.shape[0], bias=bias is not None)
    return _fill(leaf, tensor, _tensor(module, bias)), owner, operand  # type: ignore[return-value]


def _layer_norm(module: fx.GraphModule, node: fx.Node) -> Made:
    operand, shape = node.args[0], node.args[1]
    weight, bias, eps = _argument(node, 2, None), _argument(node, 3, None), _argument(node, 4, 1e-5)
    tensor, owner = _tensor(module, weight), _owner(weight)
    if tensor is None or owner is None:
        return None
    with torch.device("meta"):
        leaf = nn.LayerNorm(list(shape), eps=float(eps), bias=bias is not None)  # type: ignore[call-overload, arg-type]
    return _fill(leaf, tensor, _tensor(module, bias)), owner, operand  # type: ignore[return-value]


def _conv2d(module: fx.GraphModule, node: fx.Node) -> Made:
    operand, weight, bias = node.args[0], node.args[1], _argument(node, 2, None)
    tensor, owner = _tensor(module, weight), _owner(weight)
    if tensor is None or owner is None:
        return None
    stride, padding = _argument(node, 3, [1, 1]), _argument(node, 4, [0, 0])
    dilation, groups = _argument(node, 5, [1, 1]), int(_argument(node, 6, 1))  # type: ignore[call-overload]
    if isinstance(padding, str) or len(tensor.shape) != 4:
        return None
    pair = [tuple(v) * (2 if len(v) == 1 else 1) for v in (stride, padding, dilation)]  # type: ignore[arg-type]
    with torch.device("meta"):
        leaf = nn.Conv2d(
            tensor.shape[1] * groups,
            tensor.shape[0],
            tuple(tensor.shape[2:]),  # type: ignore[arg-type]
            stride=pair[0],  # type: ignore[arg-type]
            padding=pair[1],  # type: ignore[arg-type]
            dilation=pair[2],  # type: ignore[arg-type]
            groups=groups,
            bias=bias is not None,
        )
    return _fill(leaf, tensor, _tensor(module, bias)), owner, operand  # type: ignore[return-value]


def _embedding(module: fx.GraphModule, node: fx.Node) -> Made:
    weight, indices = node.args[0], node.args[1]
    tensor, owner = _tensor(module, weight), _owner(weight)
    if tensor is None or owner is None:
        return None
    with torch.device("meta"):
        leaf = nn.Embedding(tensor.shape[0], tensor.shape[1])
    leaf.weight = _parameter(tensor)
    return leaf.train(False), owner, indices  # type: ignore[return-value]


_BUILDERS: dict[object, Callable[[fx.GraphModule, fx.Node], Made]] = {
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.conv2d.default: _conv2d,
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
        and present.weight is leaf.weight  # type: ignore[attr-defined]
        and getattr(present, "bias", None) is getattr(leaf, "bias", None)
        and repr(present) == repr(leaf)
    )


def _keep_raw_tensors(module: fx.GraphModule, path: str) -> None:
    """Readers of a raw tensor under `path` (a tied weight, say) keep reading the tensor itself, whatever module lies there."""
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
