"""Operations as models of their own, and the runner that times them, here and where nothing of vlmopt is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.devices.graphs import choice, stack
from vlmopt.core.energy import Counter, EnergyMeter
from vlmopt.core.progress import Silent
from vlmopt.devices import measure
from vlmopt.devices.alone import ROTATED_BYTES, write_folder
from vlmopt.devices.document import profile_of_results, read_results
from vlmopt.devices.inside import times_inside
from vlmopt.devices.operations import operations_of
from vlmopt.devices.predicting import predict
from vlmopt.devices.whole import call_costs

X = np.random.default_rng(0).standard_normal((1, 4, 256)).astype(np.float32)
QUICK = {"rounds": 3, "seconds": 0.02}


def untracked(items: Sequence[Any], what: str) -> Iterable[Any]:
    return items


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    found = operations_of(stack(tmp_path / "a.onnx", width=256), {"x": X})
    assert write_folder(found.examples.values(), made, level="all") == 3
    return made


def test_copies_have_weights_of_their_own_that_no_cache_holds_together(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    for entry in plan["entries"]:
        if "constant" not in entry["signature"]:
            continue
        model = onnx.load(folder / "models" / entry["model"], load_external_data=False)
        places = [{pair.key: pair.value for pair in one.external_data} for one in model.graph.initializer]
        spans = sorted((int(place["offset"]), int(place["length"])) for place in places)
        assert len(spans) == entry["n_copies"] == len(model.graph.node) - 1
        assert all(start + length <= after for (start, length), (after, _) in pairwise(spans))
        assert sum(length for _, length in spans) >= ROTATED_BYTES
        assert spans[-1][0] + spans[-1][1] <= plan["weights"]["weights.float32"]["bytes"]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 500_000


def test_the_copies_run_though_nobody_reads_them(folder: Path) -> None:
    """Else every operation would take the time of an empty call."""
    found = measure.measure(folder, threads=1, track=untracked, **QUICK)  # type: ignore[arg-type]
    times = {name: row["quietest_us"] for name, row in found["operations"].items()}
    square, relu, wide = (next(t for n, t in times.items() if part in n) for part in ("[256,256]", "Relu", "[256,512]"))
    assert 0.0 < relu < square < wide
    assert found["failed"] == {}
    assert wide == pytest.approx(2 * square, rel=0.7)


def test_the_sum_of_operations_is_near_the_whole_graph(tmp_path: Path) -> None:
    feed = {"x": np.random.default_rng(0).standard_normal((1, 4, 512)).astype(np.float32)}
    path = stack(tmp_path / "a.onnx", layers=40, width=512)  # 42 MB of weights
    operations = operations_of(path, feed)
    write_folder(operations.examples.values(), tmp_path / "folder", level="all")
    profile = profile_of_results(measure.measure(tmp_path / "folder", threads=1, track=untracked, rounds=4))
    whole = call_costs({"whole": (path, feed)}, threads=1, progress=Silent(), rounds=4)["whole"].us
    assert predict(operations, profile, place="here").us == pytest.approx(whole, rel=0.5)


def test_joules_of_a_call_are_those_of_all_calls_shared_out(tmp_path: Path) -> None:
    feed, readings = {"x": np.zeros((1, 4, 64), dtype=np.float32)}, iter(range(0, 10_000, 500))
    calls = {"whole": (stack(tmp_path / "a.onnx"), feed)}
    known = EnergyMeter([Counter(lambda: next(readings), 1.0)])
    costs = [
        call_costs(calls, threads=1, progress=Silent(), rounds=2, seconds=10.0, meter=meter)["whole"]
        for meter in (known, EnergyMeter((), unavailable="no counters"))
    ]
    assert costs[0].joules == pytest.approx(500 / (measure.WARMUP + measure._MOST_RUNS))
    assert costs[1].joules is None
    assert all(cost.us > 0 for cost in costs)


def test_the_runner_needs_nothing_of_ours_and_its_results_are_a_profile(folder: Path) -> None:
    script = "import runpy, sys; sys.modules.update(vlmopt=None, onnx=None, torch=None); sys.argv = ['measure.py', "
    script += (
        "'--threads', '1', '--rounds', '2', '--seconds', '0.01']; runpy.run_path('measure.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 turns of operations" in done.stdout
    profile = read_results(folder / "results.json")
    assert len(profile.operations) == 3
    assert profile.runtime.threads == 1
    assert all(time.n_runs >= 10 for time in profile.operations.values())


def test_an_operation_that_the_device_cannot_run_is_named_and_the_others_are_measured(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    broken = next(entry for entry in plan["entries"] if entry["signature"].startswith("Relu"))
    model = onnx.load(folder / "models" / broken["model"])
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Unheard"
    onnx.save(model, folder / "models" / broken["model"])
    found = measure.measure(folder, threads=1, track=untracked, **QUICK)  # type: ignore[arg-type]
    assert list(found["failed"]) == [broken["signature"]]
    assert 'In Node, ("copy0", Unheard' in found["failed"][broken["signature"]]
    assert len(found["operations"]) == 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "uint8", "int8", "int64", "bool"])
def test_random_weights_are_small_finite_numbers(dtype: str) -> None:
    block = measure._block(dtype)
    if dtype == "bfloat16":
        values = (np.frombuffer(block, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(block, dtype)
    assert np.isfinite(values.astype(np.float64)).all()
    if "float" in dtype:
        assert 0.01 < values.astype(np.float64).std() < 0.03


def test_what_cannot_stand_alone_is_timed_inside_its_graph(tmp_path: Path) -> None:
    path, feed = choice(tmp_path / "a.onnx"), {"x": np.ones((1, 4), np.float32)}
    found = operations_of(path, feed)
    times = times_inside(path, feed, found, threads=1)
    (name,) = (signature for signature in found.counts if signature.startswith("If"))
    assert times[name].measured == "inside"
    assert times[name].quietest_us >= 0.0
    assert set(times) <= set(found.counts)
