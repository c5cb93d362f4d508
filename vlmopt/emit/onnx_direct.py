"""ONNX from a component's own graph, without a second `torch.export` and without a retrace.

`torch.onnx.export` takes an exported program, which would have to be made by exporting the component again, retraces
it to insert what torch converts in silence, and builds the table of all translations in every call. Here the graph is
lifted and walked once: that gives the values, fresh from the input specs, and the conversions.

This file alone calls what torch does not publish, for there is no public way from a graph to its translation; a test
compares the result with the public way. Whatever does not fit here goes that way, refusals of graphs included.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cache
from traceback import FrameSummary
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import version_converter
from onnxscript.function_libs.torch_lib.registration import default_registry
from torch import Tensor, fx, nn
from torch.export import graph_signature as signature
from torch.onnx._internal.exporter import _core, _ir_passes, _registration
from torch.onnx._internal.exporter._torchlib import _torchlib_registry
from torch.onnx._internal.fx.passes import type_promotion

from vlmopt.core.program import Component, Dim
from vlmopt.emit.lifted import Lifted, lifted, weight_of
from vlmopt.emit.onnx_translation import TRANSLATIONS
from vlmopt.graph.shapes import fake_inputs, known_value, shape_mode, symbols

_log = logging.getLogger(__name__)
_MOST_NODES = 20_000  # of all graphs below together
_WALKED: OrderedDict[str, Lifted | None] = OrderedDict()  # original and artifact share what no pass changed


def direct_program(component: Component, dims: Mapping[str, Dim]) -> torch.export.ExportedProgram | None:
    """The component as an exported program in which every conversion is a call of its own.

    None where that needs the full export: an unknown operation, or a named dimension that the graph may restrict.
    """
    made = lifted(component)
    if made is None:
        return None
    words = _words(component, dims, made)
    if words in _WALKED:
        _WALKED.move_to_end(words)
    else:
        _WALKED[words] = made if _walk(component, dims, made) else None
        while len(_WALKED) > 1 and _n_nodes() > _MOST_NODES:
            _WALKED.popitem(last=False)
    walked = _WALKED[words]
    return None if walked is None else _exported(component, walked)


def _n_nodes() -> int:
    return sum(1 if made is None else len(made.graph.nodes) for made in _WALKED.values())


def _words(component: Component, dims: Mapping[str, Dim], made: Lifted) -> str:
    """All that a walk reads: nodes, inputs, and of weights what is not their numbers."""
    nodes = [f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}" for node in made.graph.nodes]
    weights = [(path, weight_of(component, path)) for path in made.weights]
    kinds = [f"{path} {type(w).__name__} {w.dtype} {w.device} {(*w.shape,)} {w.stride()}" for path, w in weights]
    return "\n".join([str(dict(dims)), str(component.inputs), *kinds, *nodes])


def _walk(component: Component, dims: Mapping[str, Dim], made: Lifted) -> bool:
    """Gives every node its value and makes nodes of conversions; False where only the full export can tell."""
    mode = shape_mode()
    assert mode.shape_env is not None
    fixed = {name: dim.maximum for name, dim in dims.items() if dim.minimum == dim.maximum}
    values = fake_inputs(component, mode, {**symbols(component, dims, mode.shape_env), **fixed})
    root = fx.GraphModule(nn.Module(), made.graph)
    try:
        with mode, torch.no_grad(), torch._dispatch.python.enable_python_dispatcher():
            weights = [mode.from_tensor(weight_of(component, path), static_shapes=True) for path in made.weights]
            _Walk(root, type_promotion.TypePromotionTable()).run(*weights, *values)
    except Exception as problem:  # noqa: BLE001  the full export says what is wrong with the graph
        _log.debug("%s: no direct way to ONNX (%s)", component.name, problem)
        return False
    if guards := [guard for guard in mode.shape_env.guards if not _chooses_a_kernel(guard)]:
        _log.debug("%s: restricts its dimensions %s", component.name, guards)
        return False
    _fold_numbers(made.graph)
    return True


def _chooses_a_kernel(guard: Any) -> bool:
    """Whether a size was asked for since a convolution of PyTorch has several kernels; a file knows nothing of them."""
    where = guard.sloc.framework_loc
    return isinstance(where, FrameSummary) and where.name == "conv" and where.filename.endswith("fake_impls.py")


class _Walk(type_promotion._TypePromotionInterpreter):
    """Sets `meta["val"]` of every node and makes a node of every conversion of an operand's type."""

    def run_node(self, n: fx.Node) -> Any:
        known = known_value(n.target, *self.fetch_args_kwargs_from_env(n)) if n.op == "call_function" else None
        if known is not None:
            n.meta["val"] = known
            return known
        value = n.meta["val"] = fx.Interpreter.run_node(self, n)
        rule = type_promotion.get_type_promotion_rule(n, self.type_promotion_table)
        if rule is None:
            return value
        before = n.args, n.kwargs
        self._maybe_promote_node(n, rule)
        return value if (n.args, n.kwargs) == before else self.env[n]


def _fold_numbers(graph: fx.Graph) -> None:
    """Sizes that are plain numbers, since an edit fixed them or since they always were, go where they are read."""
    numbers = {node: node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), int | float)}
    for node in graph.nodes:
        if not numbers.keys().isdisjoint(node.all_input_nodes):
            node.args = fx.node.map_arg(node.args, lambda n: numbers.get(n, n))
            node.kwargs = fx.node.map_arg(node.kwargs, lambda n: numbers.get(n, n))
    for node in reversed(numbers):
        graph.erase_node(node)


def _exported(component: Component, made: Lifted) -> torch.export.ExportedProgram:
    weights = {path: weight_of(component, path) for path in made.weights}
    inputs = [
        *(_weight_spec(path, made.weights[path].name, weight) for path, weight in weights.items()),
        *(signature.InputSpec(signature.InputKind.USER_INPUT, _argument(node), None) for node in made.inputs),
    ]
    outputs = [
        signature.OutputSpec(signature.OutputKind.USER_OUTPUT, _argument(node), None)
        for node in made.graph.output_node().all_input_nodes
    ]
    return torch.export.ExportedProgram(
        nn.Module(), made.graph, signature.ExportGraphSignature(inputs, outputs), weights, {}, []
    )


def _weight_spec(path: str, name: str, weight: Tensor) -> signature.InputSpec:
    is_parameter = isinstance(weight, nn.Parameter)
    kind = signature.InputKind.PARAMETER if is_parameter else signature.InputKind.BUFFER
    return signature.InputSpec(kind, signature.TensorArgument(name), path, None if is_parameter else True)


def _argument(node: fx.Node) -> signature.TensorArgument:
    return signature.TensorArgument(node.name)


def translated(component: Component, program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    """The direct program in ONNX, inputs and outputs named as in files.

    Raises:
        torch.onnx.OnnxExporterError: an operation has no translation in this opset.
    """
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    model = _core._exported_program_to_onnx_program(program, registry=_registry(targets, opset)).model
    version_converter.convert_version(model, opset, fallback=True)
    _ir_passes.rename_inputs(model, [spec.name_in_files for spec in component.inputs])
    _ir_passes.rename_outputs(model, [spec.name_in_files for spec in component.outputs])
    return model


def _registry(targets: Iterable[Any], opset: int) -> _registration.ONNXRegistry:
    """The translations of these operations alone; to read all of them takes longer than to translate a graph."""
    registry = _registration.ONNXRegistry()
    registry._opset_version = opset
    for target in dict.fromkeys(targets):
        for made in _translations(target):
            registry._register(target, made)
    registry._cleanup_registry_based_on_opset_version()
    for target, function in TRANSLATIONS.items():
        registry.register_op(target, function)
    return registry


@cache
def _translations(target: Any) -> tuple[_registration.OnnxDecompMeta, ...]:
    """What torch itself has for the operation, and behind it what onnxscript has, in the order in which torch asks."""
    is_python = not isinstance(target, torch._ops.OpOverload)
    name = f"{target.__module__}::{target.__name__}" if is_python else target.name()
    own = [made for made in _torchlib_registry.get_torchlib_ops() if made.fx_target == target]
    if name not in default_registry:
        return tuple(own)
    found = default_registry[name]
    kinds = [(each, False) for each in found.overloads] + [(each, True) for each in found.complex]
    return (
        *own,
        *(_registration.OnnxDecompMeta(each, target, None, is_complex=is_complex) for each, is_complex in kinds),
    )
