"""Shapes an exported ONNX graph: named dimensions, constant shapes, weights as MatMul reads them, nothing left over.

Plain translation computes the shape of most reshapes at run time and transposes every weight when a session starts. The
general optimizer mends part of that, and takes longer than these few edits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from vlmopt.core.program import TensorSpec
from vlmopt.emit.onnx_bytes import address

_FOLDED_BYTES = 1 << 20  # constants above a megabyte are not made at compile time: they would only add to the file


def tidy(
    model: ir.Model,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec] = (),
    shared: Collection[int] = (),
    *,
    replaceable: Collection[int] = (),
) -> None:
    """Edits the model in place; it computes the same.

    Args:
        shared: addresses of weights that other graphs read as well, and that stay as they are.
        replaceable: addresses of weights that others may take the place of: nothing is computed from their numbers.
    """
    name_dims(model, inputs, outputs)
    fold_weight_transposes(model, shared)
    freeze_reshapes(model)
    optimizer.fold_constants(
        model,
        input_size_limit=_FOLDED_BYTES,
        output_size_limit=_FOLDED_BYTES,
        should_fold=lambda node: False if _reads(node, replaceable) else _may_fold(node),
    )
    for edit in (
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
        *(() if replaceable else (common.DeduplicateInitializersPass(),)),  # equal numbers may not stay equal
        common.ClearMetadataAndDocStringPass(),
    ):
        edit(model)
    model.metadata_props.clear()


def _reads(node: ir.Node, addresses: Collection[int]) -> bool:
    return any(value is not None and value.is_initializer() and address(value) in addresses for value in node.inputs)


def _may_fold(node: ir.Node) -> bool | None:
    """A weight that is read both ways stays one weight, and one of few bits stays so; None leaves it to the size."""
    is_weight = bool(node.inputs) and node.inputs[0] is not None and node.inputs[0].is_initializer()
    return False if node.op_type in ("Transpose", "Cast", "DequantizeLinear") and is_weight else None


def name_dims(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec] = ()) -> None:
    """Calls every symbolic dimension what runtimes call it."""
    names: dict[str, str] = {}
    for value, spec in (
        *zip(model.graph.outputs, outputs, strict=False),
        *zip(model.graph.inputs, inputs, strict=True),
    ):
        for found, wanted in zip(value.shape or (), spec.shape_in_files, strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(wanted, str):
                names[str(found.value)] = wanted
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_named(size, names) for size in value.shape])


def _named(size: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int):
        return size
    return names.get(str(size.value), None if size.value is None else str(size.value))


def _values(model: ir.Model) -> list[ir.Value]:
    found = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        found.extend(node.outputs)
    return found


def fold_weight_transposes(model: ir.Model, shared: Collection[int] = ()) -> None:
    """Stores a weight transposed where every reader transposes it alike; the copy is made while it is written."""
    own = [value for value in model.graph.initializers.values() if address(value) not in shared]
    for value in own:
        readers = [node for node, _ in value.uses()]
        orders = {_order(node) for node in readers}
        if len(orders) != 1 or None in orders or value.const_value is None:
            continue
        (order,) = orders
        assert order is not None
        value.const_value = _transposed(value.const_value, order)
        value.shape = value.const_value.shape
        for node in readers:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)


def _order(node: ir.Node) -> tuple[int, ...] | None:
    if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
        return None
    order = node.attributes.get("perm")
    return None if order is None else tuple(order.as_ints())


def _transposed(tensor: ir.TensorProtocol, order: tuple[int, ...]) -> ir.LazyTensor:
    shape = [int(tensor.shape[axis]) for axis in order]  # type: ignore[arg-type]

    def make() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(order)), dtype=tensor.dtype)

    return ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape(shape), name=tensor.name)


def freeze_reshapes(model: ir.Model) -> None:
    """Gives a Reshape its shape as a constant wherever at most one size must be found at run time."""
    made: dict[tuple[int, ...], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.inputs[0] is None:
            continue
        target = _constant_target(node.inputs[0].shape, node.outputs[0].shape)
        if target is None:
            continue
        if target not in made:
            made[target] = _shape_initializer(model, target)
        node.replace_input_with(1, made[target])
        node.attributes.pop("allowzero", None)


def _constant_target(source: ir.Shape | None, wanted: ir.Shape | None) -> tuple[int, ...] | None:
    """In ONNX 0 keeps the size at the same place, and one size may be -1."""
    if wanted is None:
        return None
    target: list[int] = []
    for axis, size in enumerate(wanted):
        if isinstance(size, int):
            target.append(size)
        elif size.value is not None and source is not None and axis < len(source) and source[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    n_kept = sum(isinstance(size, int) and size == 0 for size in wanted)
    return None if target.count(-1) > 1 or n_kept else tuple(target)


def _shape_initializer(model: ir.Model, target: tuple[int, ...]) -> ir.Value:
    name = "shape_" + "_".join(str(size).replace("-1", "rest") for size in target)
    tensor = ir.tensor(np.array(target, dtype=np.int64), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape([len(target)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value
