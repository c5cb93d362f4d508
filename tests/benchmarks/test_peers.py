"""The comparison with peers: from measured rows to figures and tables, and processes that call models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.benchmarks import peer_tables, peers
from tests.benchmarks.peer_figures import ASKED, TASKS, as_figures
from tests.benchmarks.peer_making_apart import item_scores
from tests.benchmarks.peer_ours import share_at
from tests.benchmarks.peer_rows import PINNED, Row, RowError, Workers, answer, called, size_bytes
from tests.benchmarks.width import by_magnitude
from vlmopt.graph.costing import program_cost
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.tasks.scoring import Pairs, ranks

RESULTS = Path(__file__).parent / "results"


def record(ms: float, drop: float, n_bytes: float = 80e6) -> dict[str, Any]:
    clocks = {"cpu_ms_1": [ms + 1, ms], "wall_ms_1": [ms + 2, ms + 1], "wall_ms_2": [ms, ms / 2]}
    known = {"points": 70 - drop, "drop_points": drop, "low95": drop - 1, "high95": drop + 1, "n_test": 1900}
    return {**known, **clocks, "bytes": n_bytes, "peak_bytes": 1e8, "conversion_s": 9.0, "date": "2026-01-02T03:04"}


MEASURED = {
    "ours": record(2.0, 0.5, 5e6),
    "ours_skip": record(1.0, 1.5, 9e6),
    "eager": record(50.0, 0.0),
    "ort_fp32": record(30.0, 0.0),
    "ort_int8": record(12.0, 1.0),
    "nncf_int8": record(8.0, 1.1),
    "olive": {"error": "ValueError: no | pipes", "date": "2026-01-02T03:04"},
}


def test_the_best_peer_is_the_fastest_that_loses_no_more_than_a_point() -> None:
    found = as_figures("style", MEASURED, {"ours": {"MatMul": 75.0}})
    assert found["style_ours"] == "ours"  # the faster one loses more than a point
    assert found["style_best_peer"] == "ort_int8"
    assert found["style_fastest_peer"] == "nncf_int8"
    assert found["style_speedup_over_best_peer"] == pytest.approx(6.0)
    assert found["style_speedup_over_fastest_peer"] == pytest.approx(4.0)
    assert found["size_ratio"] == found["style_size_ratio"] == pytest.approx(16.0)
    assert found["style_ort_int8_ms_spread"] == pytest.approx(1.0)
    assert found["style_olive_error"] == "ValueError: no | pipes"
    assert "style_olive_ms" not in found
    assert "size_ratio" not in as_figures("meaning", MEASURED, {})


def result_of(found: dict[str, float | str]) -> dict[str, Any]:
    return {
        "figures": {name: value for name, value in found.items() if not isinstance(value, str)},
        "notes": {name: value for name, value in found.items() if isinstance(value, str)},
        "versions": {"torch": "2"},
        "command": "python -m tests.benchmarks peers",
        "measured": {"style": "2026-01-02, a machine"},
    }


def test_the_table_has_every_row_and_what_a_peer_said_that_did_not_run() -> None:
    table = peer_tables.as_table(result_of(as_figures("style", MEASURED, {"ours": {"MatMul": 75.0}})))
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert "| Olive: fusions, dynamic int8 | did not run: ValueError: no / pipes |" in table
    assert "the best peer within a point, ONNX Runtime dynamic int8 | 6.00 | at least 4 |" in table
    assert "Where the time of vlmopt: branches skipped, int8 goes: MatMul 75 %, others 25 %." in table
    assert len(rows) == 2 + 3 + len(MEASURED)  # two heads, what was reached, and the rows
    assert all(text.replace("==", " ") in table for text in PINNED)


def test_the_figures_of_the_latency_model_stay_beside_those_of_the_peers() -> None:
    device = {"figures": {"latency_mae_percent": 1.0}, "measured": {"latency-model": "then", "peers, style": "before"}}
    found = peer_tables.merged(device, result_of(as_figures("style", MEASURED, {})))
    assert found["figures"] == {
        "latency_mae_percent": 1.0,
        "style_speedup_over_best_peer": pytest.approx(6.0),
        "size_ratio": pytest.approx(16.0),
    }
    assert found["measured"] == {"latency-model": "then", "peers, style": "2026-01-02, a machine"}


def test_retrieval_is_scored_for_a_peer_as_the_task_scores_it() -> None:
    images, texts = np.random.default_rng(0).normal(size=(2, 40, 3)).astype(np.float32)
    pairs = Pairs.of([(f"image {i}", f"text {i}") for i in range(40)])
    by_image, by_text = ranks(torch.from_numpy(images), torch.from_numpy(texts), pairs)
    wanted = ((by_image < 1).double()[pairs.image] + (by_text < 1).double()[pairs.text]) / 2
    found = item_scores(images, np.arange(40), {"texts": texts, "text_of": np.arange(40)})
    assert 0 < wanted.mean() < 1
    assert found.tolist() == wanted.tolist()


def test_labels_are_scored_on_the_rows_that_were_asked() -> None:
    found = item_scores(np.eye(3)[[0, 1]], np.array([2, 0]), {"labels": np.array([1, 2, 0])})
    assert found.tolist() == [1.0, 1.0]


def test_magnitudes_are_cut_to_no_more_macs_than_asked_for() -> None:
    program = program_of(ResidualBlocks(), torch.ones(2, 8))
    whole = program_cost(program).macs
    share = share_at(program, round(0.8 * whole))
    assert 0 < share < 1
    assert 0.6 * whole < program_cost(by_magnitude(program, share)).macs <= 0.8 * whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weight = numpy_helper.from_array(np.full((3, 2), 2.0, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [weight],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "double.onnx")
    np.save(tmp_path / "sample.npy", np.ones((1, 3), dtype=np.float32))
    return tmp_path


DOUBLE = Row("double", "doubles", "onnxruntime", "double.onnx", "here")


def test_rows_are_called_one_by_one_timed_and_looked_into(folder: Path) -> None:
    np.save(folder / "two.npy", np.array([[1, 0, 0], [1, 1, 1]], dtype=np.float32))
    assert called("outputs", DOUBLE, folder, folder / "two.npy", folder / "out.npy") == {"n": 2}
    assert np.load(folder / "out.npy").tolist() == [[2, 2], [6, 6]]
    assert set(called("operations", DOUBLE, folder, folder / "sample.npy")["us"]) == {"MatMul"}
    assert called("memory", DOUBLE, folder, folder / "sample.npy")["peak_bytes"] > 0
    assert size_bytes(DOUBLE, folder) == (folder / "double.onnx").stat().st_size
    found = peers.timed([DOUBLE], folder, 2)["double"]
    assert {name: len(values) for name, values in found.items()} == {
        "wall_ms_1": 2, "cpu_ms_1": 2, "wall_ms_2": 2, "cpu_ms_2": 2
    }  # fmt: skip


def test_a_peer_that_fails_says_so_in_one_line(folder: Path) -> None:
    with pytest.raises(RowError, match="^ValueError: not here$"):
        answer([sys.executable, "-c", "print('a'); raise ValueError('not\\n here'.replace('\\n', ''))"])
    (folder / "double.onnx").write_bytes(b"broken")
    workers = Workers()
    with pytest.raises(RowError, match="onnxruntime ended with"):
        workers.time(DOUBLE, folder, threads=1, seconds=0.1)
    workers.close()
    assert "error" in peers.timed([DOUBLE], folder, 1)["double"]


def test_what_is_committed_is_one_table_and_what_device_json_is_asked_for() -> None:
    result, device = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("peers", "device")
    )
    assert (RESULTS / "peers.md").read_text(encoding="utf-8") == peer_tables.as_table(result)
    assert device == peer_tables.merged(device, result)
    unmeasured = tuple(f"{task}_" for task in TASKS if task not in result["measured"])
    assert result["measured"]
    assert {name for name in ASKED if not name.startswith(unmeasured)} <= set(device["figures"])
