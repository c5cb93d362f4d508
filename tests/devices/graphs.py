"""Small ONNX graphs whose operations are known by heart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vlmopt.devices.document import DeviceMachine, DeviceProfile, DeviceRuntime, OperationTime

WIDTH = 64


def weight(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def stack(path: Path, *, layers: int = 3, width: int = WIDTH) -> Path:
    """`layers` times a product with a matrix of its own and a Relu, then a product [width, 2 * width]."""
    nodes, weights, last = [], [], "x"
    for i in range(layers):
        weights.append(weight(f"w{i}", width, width))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"], name=f"product{i}"))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"r{i}"], name=f"relu{i}"))
        last = f"r{i}"
    weights.append(weight("wide", width, 2 * width))
    nodes.append(helper.make_node("MatMul", [last, "wide"], ["out"], name="wide_product"))
    return saved(path, nodes, weights, [("x", ("batch", 4, width))], ["out"])


def choice(path: Path) -> Path:
    """An `If` whose branches read a value from around it."""
    branches = []
    for kind in ("Relu", "Neg"):
        node = helper.make_node(kind, ["doubled"], [f"out_{kind}"], name=kind)
        value = helper.make_tensor_value_info(f"out_{kind}", TensorProto.FLOAT, None)
        branches.append(helper.make_graph([node], kind, [], [value]))
    nodes = [
        helper.make_node("Add", ["x", "x"], ["doubled"], name="double"),
        helper.make_node("ReduceMax", ["x"], ["most"], name="most", keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["is_positive"], name="compare"),
        helper.make_node("If", ["is_positive"], ["out"], name="if", then_branch=branches[0], else_branch=branches[1]),
    ]
    zero = numpy_helper.from_array(np.float32(0), "zero")
    return saved(path, nodes, [zero], [("x", ("batch", 4))], ["out"])


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    inputs: list[tuple[str, tuple[int | str, ...]]],
    outputs: list[str],
) -> Path:
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "graph", given, made, initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


def profile(times: dict[str, float], *, version: str = "", call_us: float = 2.0) -> DeviceProfile:
    """A device profile that says so."""
    from importlib import metadata

    return DeviceProfile(
        vlmopt="0",
        created="2026-01-01T00:00:00+00:00",
        machine=DeviceMachine(cpu="A", cores=1, os="Linux"),
        runtime=DeviceRuntime(
            name="onnxruntime",
            version=version or metadata.version("onnxruntime"),
            provider="CPUExecutionProvider",
            threads=1,
            graph="all",
        ),
        clock="thread",
        rotated_bytes=1,
        call_us=call_us,
        operations={
            name: OperationTime(median_us=us, quietest_us=us, spread_us=0.0, n_runs=5) for name, us in times.items()
        },
    )
