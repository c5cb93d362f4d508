"""How ONNX Runtime multiplies integers on the processor of this machine: it is asked, not remembered."""

from __future__ import annotations

from functools import cache

_N = 64
_MOST, _LARGEST = 255, 127  # of an unsigned and of a signed byte


@cache
def saturates() -> bool:
    """Whether products of unsigned with signed bytes are wrong where they are large.

    Processors with AVX2 or AVX-512 that lack VNNI add two such products in 16 bits, and what does not fit is cut off.
    Products of unsigned bytes with each other take the runtime another way, which is exact everywhere.
    """
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.full((_N, _N), _LARGEST, dtype=np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, (_N, _N))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (_N, _N))],
        [weight],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.full((_N, _N), _MOST, dtype=np.uint8)})[0]
    return bool((np.asarray(found) != _N * _MOST * _LARGEST).any())
