"""A component as a TorchScript file.

Tracing would freeze every size it meets, and scripting refuses ATen overloads, so the graph is scripted after each
overload gave way to its packet, whose call resolves to the same kernel: the output is bit-equal, the sizes stay free.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, fx

from vlmopt.core.errors import EmitError
from vlmopt.core.program import Component
from vlmopt.emit.written import EmittedFile, appearing

aten = torch.ops.aten

# Operations on symbolic sizes, which are plain numbers in TorchScript.
_ON_NUMBERS: dict[object, Callable[..., object]] = {
    aten.sym_size.int: aten.size,
    aten.sym_numel.default: aten.numel,
    torch.sym_float: float,
    torch.sym_int: int,
    torch.sym_max: max,
    torch.sym_min: min,
    torch.sym_not: operator.not_,
}


def emit_torchscript(component: Component, path: Path) -> EmittedFile:
    """Writes the component as one `path` for `torch.jit.load`; its sizes are as free as the graph's.

    The loaded module takes the inputs in order and returns a tuple of the outputs.

    Raises:
        EmitError: an operation has no TorchScript counterpart, or the file cannot be written.
    """
    module = scriptable(component.graph)
    with _quiet():
        try:
            scripted = torch.jit.freeze(torch.jit.script(module))
        except (RuntimeError, TypeError, NotImplementedError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise EmitError(
                component.name, f"cannot be scripted ({reason})", remedy="leave torchscript out of --emit"
            ) from problem
        with appearing(path) as temporary:
            torch.jit.save(scripted, str(temporary))
    return EmittedFile(path)


def scriptable(source: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph, sharing its tensors, in the terms that `torch.jit.script` accepts."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source.graph, {}))
    graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.nodes):
        if node.op == "placeholder":
            node.type = Tensor
        elif node.op == "call_function":
            _lower(graph, node)
    module = fx.GraphModule(source, graph, class_name="Scripted")
    return module.train(False)


def _lower(graph: fx.Graph, node: fx.Node) -> None:
    target = node.target
    if "_assert" in str(target) or "sym_constrain" in str(target):
        graph.erase_node(node)
    elif target in _ON_NUMBERS:
        node.target = _ON_NUMBERS[target]
    elif isinstance(target, torch._ops.OpOverload):
        node.target = target.overloadpacket
        # Captured graphs name the device they were captured on, and a keyword None that TorchScript cannot always type.
        node.kwargs = {key: _constant(value) for key, value in node.kwargs.items()}
        node.args = tuple(_constant(value) for value in node.args)


def _constant(value: fx.node.Argument) -> fx.node.Argument:
    return str(value) if isinstance(value, torch.device) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """`torch.jit` warns that it is deprecated; some edge runtimes read nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
