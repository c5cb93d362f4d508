"""Named modules, parameters and clones of a GraphModule."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule

ADAPTERS = "adapters"  # where the modules of all adapters lie


def is_adapter_call(node: fx.Node) -> bool:
    """Whether the node calls a module of an adapter."""
    return node.op == "call_module" and str(node.target).startswith(f"{ADAPTERS}.")


def set_at(root: nn.Module, path: str, value: nn.Module | nn.Parameter | torch.Tensor) -> None:
    """Puts a module, parameter or buffer at a dotted path, making empty containers on the way."""
    *parents, leaf = path.split(".")
    owner = root
    for name in parents:
        child = owner._modules.get(name)
        if child is None:
            child = nn.Module()
            owner.add_module(name, child)
        owner = child
    if isinstance(value, nn.Module):
        owner.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def get_at(root: nn.Module, path: str) -> nn.Module | torch.Tensor:
    """The module, parameter or buffer at a dotted path.

    Raises:
        AttributeError: nothing lies there.
    """
    value: object = root
    for name in path.split("."):
        value = getattr(value, name)
    if not isinstance(value, nn.Module | torch.Tensor):
        raise AttributeError(path)
    return value


def has_path(root: nn.Module, path: str) -> bool:
    try:
        get_at(root, path)
    except AttributeError:
        return False
    return True


def free_path(root: nn.Module, wanted: str) -> str:
    """`wanted`, or `wanted_2`, `wanted_3` ... where something lies there already."""
    path, count = wanted, 1
    while has_path(root, path):
        count += 1
        path = f"{wanted}_{count}"
    return path


def graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module that runs the graph with what it reads of `root`.

    Its code is made when it is first run, not whenever the graph is edited: a plan of many sites edits and clones
    graphs of thousands of nodes that never run. Until then `forward` has no signature (`make_code`).
    """
    return _LazyGraphModule(root, graph, class_name="Component").train(False)


def make_code(module: fx.GraphModule) -> None:
    """Makes the module's code now: torch.export and others look at its signature before they run it."""
    _LazyGraphModule.force_recompile(module)


def clone_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with its own graph and containers, sharing every leaf module and tensor with the original."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    result = graph.output(output)
    original = output_node(module)
    result.meta = copy.copy(original.meta)
    return graph_module(module, graph)


def output_node(module: fx.GraphModule) -> fx.Node:
    return module.graph.output_node()


def output_values(module: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The nodes that the graph returns, in order."""
    (values,) = output_node(module).args
    return tuple(value for value in values if isinstance(value, fx.Node))  # type: ignore[union-attr]


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def drop_unused_modules(module: fx.GraphModule) -> None:
    """Removes modules, parameters and buffers that no node reads (torch's own method leaves parameters behind)."""
    used: set[str] = set()
    for node in module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            used.add(str(node.target))
    _prune(module, "", used)


def _prune(owner: nn.Module, prefix: str, used: set[str]) -> None:
    for name in list(owner._parameters):
        if prefix + name not in used:
            del owner._parameters[name]
    for name in list(owner._buffers):
        if prefix + name not in used:
            del owner._buffers[name]
    for name, child in list(owner._modules.items()):
        path = prefix + name
        if path in used:
            continue  # a leaf keeps all of its tensors
        if type(child) is not nn.Module and any(target.startswith(path + ".") for target in used):
            continue  # a leaf that is not called any more, one of whose tensors is read
        if type(child) is nn.Module:  # a container, which belongs to this graph alone; leaves are shared with clones
            _prune(child, path + ".", used)
            if child._parameters or child._buffers or child._modules:
                continue
        del owner._modules[name]
