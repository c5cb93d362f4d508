"""Operations are those that ONNX Runtime executes, and what decides their time is in their signature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from tests.devices.graphs import choice, saved, stack, weight
from vlmopt.core.errors import ProfileError
from vlmopt.devices.operations import operations_of

X = np.ones((1, 4, 64), np.float32)


def test_operations_alike_are_counted_and_others_kept_apart(tmp_path: Path) -> None:
    found = operations_of(stack(tmp_path / "a.onnx"), {"x": X})
    assert dict(found.counts) == {
        "MatMul(float32[1,4,64], constant float32[64,64]) -> float32[1,4,64]": 3,
        "Relu(float32[1,4,64]) -> float32[1,4,64]": 3,
        "MatMul(float32[1,4,64], constant float32[64,128]) -> float32[1,4,128]": 1,
    }
    assert found.nodes["wide_product"].endswith("float32[1,4,128]")


def test_sizes_are_those_of_the_run(tmp_path: Path) -> None:
    found = operations_of(stack(tmp_path / "a.onnx", layers=1), {"x": np.ones((3, 4, 64), np.float32)})
    assert "Relu(float32[3,4,64]) -> float32[3,4,64]" in found.counts


def test_what_the_runtime_fuses_is_one_operation(tmp_path: Path) -> None:
    """BiasGelu exists only behind ONNX Runtime's own fusions."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="m"),
        helper.make_node("Add", ["m", "b"], ["a"], name="a"),
        helper.make_node("Gelu", ["a"], ["out"], name="g"),
    ]
    weights = [weight("w", 64, 64), weight("b", 64)]
    path = saved(tmp_path / "a.onnx", nodes, weights, [("x", ("batch", 4, 64))], ["out"])
    found = operations_of(path, {"x": X})
    assert [name.partition("(")[0] for name in found.counts] == ["MatMul", "com.microsoft.BiasGelu"]


def test_constant_integers_and_attributes_are_part_of_a_signature(tmp_path: Path) -> None:
    def slices(start: int, axis: int) -> set[str]:
        parts = {"start": [start], "end": [start + 2], "axis": [axis]}
        weights = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in parts.items()]
        nodes = [
            helper.make_node("Slice", ["x", *parts], ["s"], name="s"),
            helper.make_node("Transpose", ["s"], ["out"], name="t", perm=[0, 2, 1] if axis == 1 else [1, 0, 2]),
        ]
        path = saved(tmp_path / "a.onnx", nodes, weights, [("x", (1, 4, 64))], ["out"])
        return set(operations_of(path, {"x": X}).counts)

    first, second = slices(0, 1), slices(1, 1)
    assert first != second
    sliced = "Slice(float32[1,4,64], constant int64[1] = 1, constant int64[1] = 3, constant int64[1] = 1) -> "
    assert any(name.startswith(sliced) for name in second)
    assert any("perm=[0,2,1]" in name for name in first)


def test_small_integers_that_are_computed_are_kept_for_the_copy(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], name="sizes"),
        helper.make_node("Expand", ["one", "sizes"], ["out"], name="spread"),
    ]
    path = saved(tmp_path / "a.onnx", nodes, [weight("one", 1)], [("x", ("batch", 4, 64))], ["out"])
    found = operations_of(path, {"x": X})
    (spread,) = (one for name, one in found.examples.items() if name.startswith("Expand"))
    assert spread.operands[1] is not None
    assert spread.operands[1].values == (1, 4, 64)


def test_an_operation_with_graphs_inside_does_not_stand_alone(tmp_path: Path) -> None:
    found = operations_of(choice(tmp_path / "a.onnx"), {"x": np.ones((1, 4), np.float32)})
    assert {name.partition("(")[0]: one.stands_alone for name, one in found.examples.items()} == {
        "Add": True,
        "ReduceMax": True,
        "Greater": True,
        "If": False,
    }


def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(ProfileError, match="ONNX Runtime cannot run it") as caught:
        operations_of(path, {"x": X})
    assert "\n" not in caught.value.one_line()
