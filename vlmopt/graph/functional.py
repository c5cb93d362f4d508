"""Frees exported programs of writes in place and of regions under another autocast or grad mode.

A value that is written after it was read would be wrong in whatever replays, clones or reorders the graph.
"""

from __future__ import annotations

import warnings

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from vlmopt.graph.canonical import HAND_ON, writes

aten = torch.ops.aten

_POINTWISE = {"add", "sub", "mul", "div", "neg", "relu", "clamp", "exp", "sigmoid", "tanh", "silu"}


def functional_graph(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as one flat graph in which no node changes another's value.

    Writes into a value that nothing else reads become ordinary operations. All others, and regions, are left to torch,
    which takes longer than the export itself.

    Raises:
        TypeError: torch.export gave no graph.
    """
    if any(_needs_torch(node) for node in exported.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch about its own tree functions
            exported = exported.run_decompositions({})
    flat = exported.module(check_guards=False)
    if not isinstance(flat, fx.GraphModule):
        raise TypeError(f"expected a GraphModule from torch.export, found {type(flat).__name__}")
    for node in flat.graph.nodes:
        replacement = _ordinary(node)
        if replacement is not None:
            node.target = replacement
    return flat


def _needs_torch(node: fx.Node) -> bool:
    if isinstance(node.target, HigherOrderOperator):
        return True
    return writes(node) and _ordinary(node) is None


def _ordinary(node: fx.Node) -> OpOverload | None:
    """The operation that returns what this one writes, if nothing can tell the two apart."""
    if not writes(node) or not isinstance(node.target, OpOverload) or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is aten.detach_.default:
        return aten.detach.default  # writes no values
    written = node.args[0]
    name = node.target._schema.name.removeprefix("aten::").removesuffix("_")
    if name not in _POINTWISE or not _is_fresh(written) or list(written.users) != [node] or not _keeps_type(node):
        return None
    found: OpOverload | None = getattr(getattr(aten, name), node.target._overloadname, None)
    return found


def _is_fresh(node: fx.Node) -> bool:
    """The node makes a new tensor: no input, no weight and no view of another value."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    if node.target in HAND_ON and node.target is not aten.clone.default:  # the others may give back what they are given
        return False
    return not writes(node) and all(value.alias_info is None for value in node.target._schema.returns)


def _keeps_type(node: fx.Node) -> bool:
    """A write keeps the dtype of what it writes into, where an ordinary operation may widen it."""
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    return len(dtypes) == 1 and all(dtype.is_floating_point for dtype in dtypes)
