from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlmopt.verify.loading import check_loading, told_apart


def written(path: Path, *unread: str) -> Path:
    """A graph of one operation, with weights that nothing reads."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy"]
    weights = [numpy_helper.from_array(np.zeros(3, np.float32), name) for name in unread]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:], weights)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_a_graph_that_the_runtime_has_nothing_to_say_of_passes(tmp_path: Path) -> None:
    gate = check_loading("it loads", written(tmp_path / "m.onnx"))
    assert (gate.name, gate.passed, gate.found, gate.allowed) == ("it loads", True, 0.0, 0.0)


def test_warnings_are_counted_and_the_first_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gate = check_loading("it loads", written(tmp_path / "m.onnx", "left", "left too"))
    assert (gate.passed, gate.found) == (False, 2.0)
    assert gate.name.startswith("it loads (Removing initializer 'left ")
    assert capfd.readouterr().err == ""


def test_what_others_write_meanwhile_is_no_warning_of_the_graph_and_is_not_lost() -> None:
    display = "timing ... 3 of 7\n"
    machine = "2026-01-02 03:04:05 [W:onnxruntime:Default, device_discovery.cc:1 find] no graphics card\n"
    graph = "\x1b[0;93m2026-01-02 [W:onnxruntime:vlmopt-graph, graph.cc:5004 Clean] Removing 'left'.\x1b[m\n"
    assert told_apart(display + graph + machine) == (["Removing 'left'."], display + machine)
