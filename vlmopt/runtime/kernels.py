"""Which number formats ONNX Runtime has kernels for on the processors of this machine: it is asked, not remembered."""

from __future__ import annotations

from functools import cache

# What every transformer has. Of ONNX Runtime 1.31 for CPUs: float16 all, bfloat16 none of the first four.
_OPERATIONS = {"MatMul": ((2, 3), (3, 4)), "Add": ((2, 3), (2, 3)), "Mul": ((2, 3), (2, 3)), "Softmax": ((2, 3),)}


@cache
def lacking(dtype: str) -> tuple[str, ...]:
    """Operations that it cannot run on numbers of this format, such as `bfloat16`."""
    return tuple(name for name, shapes in _OPERATIONS.items() if not _runs(name, shapes, dtype.upper()))


def _runs(operation: str, shapes: tuple[tuple[int, ...], ...], dtype: str) -> bool:
    import onnxruntime
    from onnx import TensorProto, helper

    kind = TensorProto.DataType.Value(dtype if dtype != "FLOAT32" else "FLOAT")
    inputs = [helper.make_tensor_value_info(f"x{i}", kind, shape) for i, shape in enumerate(shapes)]
    output = helper.make_tensor_value_info("y", kind, None)
    node = helper.make_node(operation, [value.name for value in inputs], ["y"])
    graph = helper.make_graph([node], operation, inputs, [output])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "NOT_IMPLEMENTED" in str(error) or "INVALID_GRAPH" in str(error):  # no kernel; a type that it takes nowhere
            return False
        raise
    return True
