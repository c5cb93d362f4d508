"""What the exporter to ONNX is told beyond torch's own translations.

Three things: attention with its scale as a constant (torch's translation recomputes it from the shape in every call),
`bucketize`, which torch has to take apart first, and that a program whose every operation has a translation need not be
retraced through a decomposition table first, which takes half of the export's time and changes nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops.core import aten_bitwise_and, aten_bitwise_or
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

from vlmopt.emit.onnx_quantized import QUANTIZED_CALLS, QUANTIZED_TRANSLATIONS

aten = torch.ops.aten


class LoweredProgram(torch.export.ExportedProgram):
    """An exported program in which every operation is translated as it is."""

    def run_decompositions(self, *args: object, **kwargs: object) -> torch.export.ExportedProgram:
        return self


def as_lowered(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program, marked as lowered if all of its operations are known to have a translation."""
    targets = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    if not targets <= DIRECT:
        return exported
    exported.__class__ = LoweredProgram
    return exported


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`softmax(scale * query @ key.T + mask) @ value`; a mask of booleans forbids where it is false.

    A row whose keys are all forbidden gets the mean of the values (torch: zeros); only padding has such rows.

    Shapes: query [..., N, D], key [..., S, D], value [..., S, Dv], mask broadcast to [..., N, S].
    """
    width, rank = query.shape[-1], len(key.shape)
    if is_causal or enable_gqa or dropout_p or not isinstance(width, int):
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = 1.0 / math.sqrt(width) if scale is None else scale
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scores = op.MatMul(op.Mul(query, _number(factor, query)), op.Transpose(key, perm=swapped))
    if attn_mask is not None and str(attn_mask.dtype) == "BOOL":
        scores = op.Where(attn_mask, scores, _number(query.dtype.min, query))  # -inf would make such a row NaN
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _number(number: float, like: Any) -> Any:
    return op.Constant(value=ir.tensor(number, dtype=like.dtype))  # type: ignore[arg-type]


def bucketize(values: Any, boundaries: Any, out_int32: bool = False, right: bool = False) -> Any:
    """How many boundaries lie below each value, with `right` also those that equal it."""
    last: Any = op.Constant(value_ints=[-1])
    passed = (op.LessOrEqual if right else op.Less)(boundaries, op.Unsqueeze(values, last))
    counted: Any = op.Cast(passed, to=int(ir.DataType.INT32 if out_int32 else ir.DataType.INT64))
    return op.ReduceSum(counted, last, keepdims=0)


def _cast(tensor: Any, dtype: int, *_: object, **__: object) -> Any:
    return op.Cast(tensor, to=int(dtype))


def _cast_on_device(tensor: Any, device: object, dtype: int, *_: object, **__: object) -> Any:
    return op.Cast(tensor, to=int(dtype))  # a graph lives on one device


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.bucketize.Tensor: bucketize,
    aten.to.dtype: _cast,
    aten.to.device: _cast_on_device,
    aten.__and__.Tensor: aten_bitwise_and,
    aten.__or__.Tensor: aten_bitwise_or,
    **QUANTIZED_TRANSLATIONS,
}

# Operations that torch's table of translations, or the one above, holds under their own names. It drops assertions.
_DIRECT_ATEN = """
    __and__.Tensor __or__.Tensor _assert_scalar.default _assert_tensor_metadata.default _to_copy.default
    _unsafe_view.default add.Scalar add.Tensor addmm.default alias.default amax.default any.dim arange.default
    arange.start arange.start_step argmax.default avg_pool2d.default bitwise_and.Tensor bitwise_not.default
    bitwise_or.Tensor bmm.default bucketize.Tensor cat.default chunk.default clamp.default clamp_min.default
    clone.default constant_pad_nd.default contiguous.default conv2d.default copy.default cos.default cumsum.default
    detach.default div.Scalar div.Tensor embedding.default eq.Scalar eq.Tensor erf.default exp.default
    expand.default expand_as.default flatten.using_ints full.default full_like.default gather.default ge.Scalar
    ge.Tensor gelu.default gt.Scalar gt.Tensor hardswish.default index.Tensor index_select.default
    layer_norm.default le.Scalar le.Tensor lift_fresh_copy.default linalg_vector_norm.default linear.default
    log_softmax.int logical_and.default logical_not.default logical_or.default lt.Scalar lt.Tensor
    masked_fill.Scalar masked_fill.Tensor matmul.default max.dim max_pool2d.default mean.default mean.dim mm.default
    mul.Scalar mul.Tensor ne.Scalar ne.Tensor neg.default new_full.default new_ones.default new_zeros.default
    ones.default ones_like.default pad.default permute.default pow.Tensor_Scalar reciprocal.default relu.default
    repeat.default reshape.default rsqrt.default scalar_tensor.default scaled_dot_product_attention.default
    select.int select_scatter.default sigmoid.default silu.default sin.default slice.Tensor slice_scatter.default
    softmax.int split.Tensor split_with_sizes.default sqrt.default squeeze.dim stack.default sub.Scalar sub.Tensor
    sum.default sum.dim_IntList sym_size.int t.default tanh.default to.device to.dtype transpose.int tril.default
    triu.default unbind.int unflatten.int unsqueeze.default upsample_bicubic2d.vec upsample_bilinear2d.vec
    view.default where.Scalar where.ScalarOther where.ScalarSelf where.self zeros.default zeros_like.default
"""


def _overload(name: str) -> object:
    packet, overload = name.split(".")
    return getattr(getattr(aten, packet), overload)


DIRECT: frozenset[object] = frozenset(
    {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv}
    | {_overload(name) for name in _DIRECT_ATEN.split()}
    | QUANTIZED_CALLS
)
