"""Operations as models of their own: a folder that a device with ONNX Runtime alone can measure.

A model holds one operation in many copies. They share what comes in, as a network reads what was just written, and
each has weights of its own, so that all together are larger than caches (`ROTATED_BYTES`). Nobody reads what they
compute but the runtime, which frees it at once. Weights are random and written by the runner, so the folder stays
small; small constants (axes, scales, biases) are what they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmopt.devices import measure
from vlmopt.devices.operations import Level, Operand, Operation
from vlmopt.rundir import write_json

if TYPE_CHECKING:
    import onnx

ROTATED_BYTES = 64 << 20  # twice what the last cache of common processors holds
MOST_COPIES = 512
COPIES_WITHOUT_WEIGHTS = 16
_ALIGNED_BYTES = 4096
_IR_VERSION = 10  # the oldest with weights of four bits
_HALF_BYTE = ("int4", "uint4", "float4_e2m1fn")
RUNNER = "measure.py"


@dataclass
class _Weights:
    """Files of random numbers by name, and how far the copies of the model at hand have used each."""

    sizes: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)

    def place(self, dtype: str, n_bytes: int) -> tuple[str, int]:
        """A file and an offset in it that no other weight of this model has."""
        name = f"weights.{dtype}"
        offset = self.used.get(name, 0)
        self.used[name] = offset + -(-n_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        self.dtypes[name] = dtype
        self.sizes[name] = max(self.sizes.get(name, 0), self.used[name])
        return name, offset


def write_folder(operations: Iterable[Operation], folder: Path, *, level: Level) -> int:
    """Models of all operations that stand alone, the plan and the runner; returns how many there are.

    Args:
        folder: a new one.
        level: of the graphs that the operations were taken from.
    """
    import onnx

    models = folder / measure.MODELS
    models.mkdir(parents=True)
    weights, entries = _Weights(), [_write_empty(models)]
    for number, operation in enumerate(one for one in operations if one.stands_alone):
        weights.used.clear()
        n_copies = _n_copies(operation.operands)
        name = f"{number:04d}.onnx"
        onnx.save(_model(operation, n_copies, weights), models / name)
        inputs = [_input("it", _ONE)]
        inputs += [
            _input(f"x{i}", operand)
            for i, operand in enumerate(operation.operands)
            if operand is not None and not operand.is_constant
        ]
        entries.append({"signature": operation.signature, "model": name, "n_copies": n_copies, "inputs": inputs})
    plan = {
        "schema": measure.SCHEMA,
        "graph": level,
        "rotated_bytes": ROTATED_BYTES,
        "weights": {name: {"dtype": weights.dtypes[name], "bytes": size} for name, size in weights.sizes.items()},
        "entries": entries,
    }
    write_json(folder / measure.PLAN, plan)
    shutil.copyfile(Path(measure.__file__), folder / RUNNER)
    return len(entries) - 1


def _n_copies(operands: Collection[Operand | None]) -> int:
    large = sum(_n_bytes(one) for one in operands if one is not None and one.is_constant and one.content is None)
    return min(MOST_COPIES, max(1, -(-ROTATED_BYTES // large))) if large else COPIES_WITHOUT_WEIGHTS


def _n_bytes(operand: Operand) -> int:
    import numpy as np
    from onnx import helper

    count = int(np.prod(operand.shape, dtype=np.int64))
    if operand.dtype in _HALF_BYTE:
        return -(-count // 2)
    return count * int(helper.tensor_dtype_to_np_dtype(_element_type(operand.dtype)).itemsize)


def _element_type(dtype: str) -> int:
    """The number that ONNX has for a type of numpy or ml_dtypes."""
    from onnx import TensorProto

    special = {"float16": "FLOAT16", "float32": "FLOAT", "float64": "DOUBLE", "float8_e4m3fn": "FLOAT8E4M3FN"}
    return int(TensorProto.DataType.Value(special.get(dtype, dtype.upper())))


def _model(operation: Operation, n_copies: int, weights: _Weights) -> onnx.ModelProto:
    """`n_copies` of the node, and one output that has nothing to do with them."""
    from onnx import TensorProto, helper

    names, inputs, constants = list[str](), list[Any](), list[Any]()
    for i, operand in enumerate(operation.operands):
        names.append("" if operand is None else f"x{i}")
        if operand is None:
            continue
        if not operand.is_constant:
            inputs.append(helper.make_tensor_value_info(f"x{i}", _element_type(operand.dtype), operand.shape))
        elif operand.content is not None:
            kept = TensorProto()
            kept.CopyFrom(operand.content)
            kept.name = f"x{i}"
            constants.append(kept)
    nodes = []
    for copy in range(n_copies):
        node = type(operation.node)()
        node.CopyFrom(operation.node)
        node.name = f"copy{copy}"
        own = {i: one for i, one in enumerate(operation.operands) if _is_large(one)}
        node.input[:] = [f"x{i}_{copy}" if i in own else name for i, name in enumerate(names)]
        node.output[:] = [f"y{i}_{copy}" if name else "" for i, name in enumerate(operation.node.output)]
        constants += [_external(f"x{i}_{copy}", one, weights) for i, one in own.items() if one is not None]
        nodes.append(node)
    domains = {"", operation.node.domain}
    return _with_output(nodes, inputs, constants, {name: operation.opsets[name] for name in domains})


def _is_large(operand: Operand | None) -> bool:
    return operand is not None and operand.is_constant and operand.content is None


def _external(name: str, operand: Operand, weights: _Weights) -> onnx.TensorProto:
    from onnx import StringStringEntryProto, TensorProto

    n_bytes = _n_bytes(operand)
    file, offset = weights.place(operand.dtype, n_bytes)
    tensor = TensorProto(name=name, data_type=_element_type(operand.dtype), dims=operand.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", str(offset)), ("length", str(n_bytes))):
        tensor.external_data.append(StringStringEntryProto(key=key, value=value))
    return tensor


def _input(name: str, operand: Operand) -> dict[str, Any]:
    described: dict[str, Any] = {"name": name, "dtype": operand.dtype, "shape": list(operand.shape)}
    if operand.values is not None:
        described["values"] = list(operand.values)
    elif operand.bounds is not None:
        described["low"], described["high"] = operand.bounds
    return described


def _write_empty(folder: Path) -> dict[str, Any]:
    """A model without operations, which says what a call takes."""
    import onnx

    onnx.save(_with_output([], [], [], {"": 20}), folder / "empty.onnx")
    return {"signature": measure.EMPTY, "model": "empty.onnx", "n_copies": 1, "inputs": [_input("it", _ONE)]}


_ONE = Operand("float32", (1,), False)


def _with_output(
    nodes: list[onnx.NodeProto], inputs: list[Any], constants: list[Any], opsets: dict[str, int]
) -> onnx.ModelProto:
    """A graph has an output: here one number that is handed through, so that the copies' own are nobody's."""
    from onnx import TensorProto, helper

    it = helper.make_tensor_value_info("it", TensorProto.FLOAT, (1,))
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, (1,))
    last = helper.make_node("Identity", ["it"], ["out"], name="last")
    graph = helper.make_graph([*nodes, last], "operation", [*inputs, it], [out], initializer=constants)
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    oldest = helper.find_min_ir_version_for([helper.make_opsetid("", opsets[""])])
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = max(_IR_VERSION, oldest)
    return model
