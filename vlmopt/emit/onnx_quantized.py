"""Quantized leaves in ONNX: integer products of ONNX Runtime in the place of what `vlmopt.graph.quantized` simulates.

On the way to ONNX a leaf is a call of an operation of its own, `vlmopt::...`, which computes what the leaf does and
has a translation here. Such calls are in no other file: elsewhere leaves are ordinary ATen code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import numpy_helper
from onnxscript import opset18 as op
from torch import Tensor, fx
from torch.onnx._internal.exporter import _core

from vlmopt.core.integer_products import saturates
from vlmopt.core.program import Component
from vlmopt.graph.modules import clone_graph, get_at, set_at
from vlmopt.graph.quantized import (
    BlockwiseEmbedding,
    BlockwiseLinear,
    HalfEmbedding,
    HalfLinear,
    Int8Linear,
    QuantizedLeaf,
    embedding_blockwise,
    embedding_half,
    linear_blockwise,
    linear_half,
    linear_int8,
)

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # target and arguments
Weights = Mapping[str, Any]  # own name in the leaf -> its node

UNSIGNED_ZERO = 128
_INT8_PRODUCTS = 4  # MatMulNBits rounds its input by block, and multiplies integers

_library = torch.library.Library("vlmopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMAS = {
    "linear_int8": "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? input_scale, Tensor? input_zero, "
    "bool is_qdq)",
    "linear_blockwise": "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int in_features, int bits, int block, "
    "bool rounds_input)",
    "embedding_blockwise": "(Tensor indices, Tensor weight, Tensor scale, int bits, int block)",
    "linear_half": "(Tensor x, Tensor weight, Tensor? bias)",
    "embedding_half": "(Tensor indices, Tensor weight)",
}
_SIMULATIONS = {
    "linear_int8": lambda *args: linear_int8(*args[:-1]),
    "linear_blockwise": linear_blockwise,
    "embedding_blockwise": embedding_blockwise,
    "linear_half": linear_half,
    "embedding_half": embedding_half,
}
for _name, _schema in _SCHEMAS.items():
    _library.define(f"{_name}{_schema} -> Tensor")  # type: ignore[no-untyped-call]
    _library.impl(_name, _SIMULATIONS[_name], "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _linear_shape(x: Tensor, weight: Tensor, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty([*x.shape[:-1], scale.shape[0]])


def _embedding_shape(indices: Tensor, weight: Tensor, scale: Tensor, bits: int, block: int) -> Tensor:
    return scale.new_empty([*indices.shape, weight.shape[-1] * 8 // bits])


def _half_linear_shape(x: Tensor, weight: Tensor, _: object) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[1]])


def _half_embedding_shape(indices: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty([*indices.shape, weight.shape[1]], dtype=torch.float32)


torch.library.register_fake("vlmopt::linear_half", _half_linear_shape, lib=_library)
torch.library.register_fake("vlmopt::embedding_half", _half_embedding_shape, lib=_library)
torch.library.register_fake("vlmopt::linear_int8", _linear_shape, lib=_library)
torch.library.register_fake("vlmopt::linear_blockwise", _linear_shape, lib=_library)
torch.library.register_fake("vlmopt::embedding_blockwise", _embedding_shape, lib=_library)

_calls = torch.ops.vlmopt
QUANTIZED_CALLS = frozenset(getattr(_calls, name).default for name in _SCHEMAS)


def quantized_call(leaf: QuantizedLeaf, operand: Any, own: Weights) -> Call:
    """The operation that stands for a leaf."""
    weight, scale, bias = own["weight"], own.get("scale"), own.get("bias")
    if isinstance(leaf, HalfLinear):
        return _calls.linear_half.default, (operand, weight, bias)
    if isinstance(leaf, HalfEmbedding):
        return _calls.embedding_half.default, (operand, weight)
    if isinstance(leaf, Int8Linear):
        ranges = own.get("input_scale"), own.get("input_zero")
        return _calls.linear_int8.default, (operand, weight, scale, bias, *ranges, leaf.is_qdq)
    if isinstance(leaf, BlockwiseLinear):
        form = leaf.in_features, leaf.bits, leaf.block, leaf.rounds_input
        return _calls.linear_blockwise.default, (operand, weight, scale, bias, *form)
    assert isinstance(leaf, BlockwiseEmbedding)
    return _calls.embedding_blockwise.default, (operand, weight, scale, leaf.bits, leaf.block)


def with_unsigned_weights(component: Component) -> Component:
    """The component with int8 weights moved up by 128 where their layer asks for it, or leaves it open and products of
    unsigned with signed bytes saturate in the runtime here; only what is written to ONNX reads them so."""
    found = {
        path: leaf
        for path, leaf in component.graph.named_modules()
        if isinstance(leaf, Int8Linear) and (leaf.weights == "unsigned" or (leaf.weights == "auto" and saturates()))
    }
    if not found:
        return component
    graph = clone_graph(component.graph)
    for path, leaf in found.items():
        moved = copy.copy(leaf)
        moved._buffers = {**leaf._buffers, "weight": (leaf.weight.to(torch.int16) + UNSIGNED_ZERO).to(torch.uint8)}
        set_at(graph, path, moved)
    return replace(component, graph=graph)


def with_calls(component: Component) -> fx.GraphModule:
    """The component's graph with such operations in the place of its quantized leaves, for a full export."""
    graph = clone_graph(component.graph)
    for node in list(graph.graph.nodes):
        leaf = get_at(graph, str(node.target)) if node.op == "call_module" else None
        if not isinstance(leaf, QuantizedLeaf):
            continue
        with graph.graph.inserting_before(node):
            own = {name: graph.graph.get_attr(f"{node.target}.{name}") for name, _ in leaf.named_buffers()}
            target, args = quantized_call(leaf, node.args[0], own)
            call = graph.graph.call_function(target, args)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _in_float32(translate: Callable[..., Any]) -> Callable[..., Any]:
    """The translation for inputs of any type: the runtime's kernels take float32."""

    def translated(x: Any, *rest: Any) -> Any:
        if x.dtype == ir.DataType.FLOAT:
            return translate(x, *rest)
        return op.Cast(translate(op.Cast(x, to=ir.DataType.FLOAT), *rest), to=x.dtype)

    return translated


def _linear_int8(x: Any, weight: Any, scale: Any, bias: Any, input_scale: Any, input_zero: Any, is_qdq: bool) -> Any:
    is_unsigned = weight.dtype == ir.DataType.UINT8
    if input_scale is not None and is_qdq:
        seen = op.DequantizeLinear(op.QuantizeLinear(x, input_scale, input_zero), input_scale, input_zero)
        zeros = (_zeros(int(scale.shape[0])),) if is_unsigned else ()
        y = op.MatMul(seen, op.DequantizeLinear(weight, scale, *zeros, axis=1))
    else:
        if input_scale is None:
            levels, step, zero = op.DynamicQuantizeLinear(x)
        else:
            levels, step, zero = op.QuantizeLinear(x, input_scale, input_zero), input_scale, input_zero
        zeros = (_zeros(),) if is_unsigned else ()
        sums = op.Cast(op.MatMulInteger(levels, weight, zero, *zeros), to=ir.DataType.FLOAT)
        y = op.Mul(sums, op.Mul(step, scale))
    return y if bias is None else op.Add(y, bias)


def _zeros(*shape: int) -> Any:
    """What stands for 0 in an unsigned weight."""
    return op.Constant(value=numpy_helper.from_array(np.full(shape, UNSIGNED_ZERO, dtype=np.uint8)))


def _linear_blockwise(
    x: Any,
    weight: Any,
    scale: Any,
    bias: Any,
    in_features: int,
    bits: int,
    block: int,
    rounds_input: bool,
) -> Any:
    form: dict[str, Any] = {"K": in_features, "N": int(scale.shape[0]), "bits": bits, "block_size": block}
    products = _INT8_PRODUCTS if rounds_input else 0
    biases = () if bias is None else (None, None, bias)
    return _of_runtime("MatMulNBits", x, weight, scale, *biases, **form, accuracy_level=products)


def _embedding_blockwise(indices: Any, weight: Any, scale: Any, bits: int, block: int) -> Any:
    axes = {"gather_axis": 0, "quantize_axis": 1}
    form: dict[str, Any] = {"bits": bits, "block_size": block, **axes}
    return _of_runtime("GatherBlockQuantized", weight, indices, scale, dtype=scale.dtype, **form)


def _linear_half(x: Any, weight: Any, bias: Any) -> Any:
    y = op.MatMul(x, op.Cast(weight, to=ir.DataType.FLOAT))
    return y if bias is None else op.Add(y, bias)


def _embedding_half(indices: Any, weight: Any) -> Any:
    return op.Cast(op.Gather(weight, indices), to=ir.DataType.FLOAT)


def _of_runtime(name: str, *inputs: Any, dtype: ir.DataType = ir.DataType.FLOAT, **attributes: Any) -> Any:
    """An operation of ONNX Runtime's own, recorded as torch records those that it knows no schema of."""
    tracer = _core.current_tracer
    assert tracer is not None
    written = ir.convenience.convert_attributes(attributes)
    tracer.nodes.append(node := ir.Node("com.microsoft", name, inputs, written, num_outputs=1, version=1))
    node.outputs[0].dtype = dtype
    return node.outputs[0]


QUANTIZED_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    _calls.linear_int8.default: _in_float32(_linear_int8),
    _calls.linear_blockwise.default: _in_float32(_linear_blockwise),
    _calls.embedding_blockwise.default: _embedding_blockwise,
    _calls.linear_half.default: _in_float32(_linear_half),
    _calls.embedding_half.default: _embedding_half,
}
