"""Calls one model file in one runtime: a script for any virtual environment, of numpy and that runtime alone.

    peer_calls.py outputs RUNTIME FILE INPUTS.npy OUTPUTS.npy   every input by itself (batch 1)
    peer_calls.py memory RUNTIME FILE SAMPLE.npy                peak memory of loading and one call, in bytes
    peer_calls.py operations RUNTIME FILE SAMPLE.npy            microseconds of a call by type of operation
    peer_calls.py serve                                         times calls, one request (JSON) a line

Answers are JSON, one a line. Only one model is loaded at a time.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Call = Callable[[Array], Array]
WARM_UP, FEWEST, PROFILED = 5, 9, 30  # calls


def opened(runtime: str, file: str, threads: int) -> Call:
    """The model as a function of one batch."""
    return OPENERS[runtime](file, threads)


def _eager(file: str, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    return _of_module(torch.load(file, weights_only=False).eval())


def _torchscript(file: str, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    return _of_module(torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.load(file).eval())))


def _of_module(module: Any) -> Call:
    import torch

    def call(batch: Array) -> Array:
        with torch.inference_mode():
            found: Array = module(torch.from_numpy(batch)).numpy()
        return found

    return call


def _onnxruntime(file: str, threads: int) -> Call:
    session = _session(file, threads)
    name = session.get_inputs()[0].name

    def call(batch: Array) -> Array:
        found: Array = session.run(None, {name: batch})[0]
        return found

    return call


def _session(file: str, threads: int, *, trace: str = "") -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    if trace:
        options.enable_profiling, options.profile_file_prefix = True, trace
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _openvino(file: str, threads: int) -> Call:
    return _of_compiled(_compiled(file, threads, {}))


def _openvino_f32(file: str, threads: int) -> Call:
    return _of_compiled(_compiled(file, threads, {"INFERENCE_PRECISION_HINT": "f32"}))


def _compiled(file: str, threads: int, settings: dict[str, Any]) -> Any:
    import openvino

    common = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    return openvino.Core().compile_model(file, "CPU", {**common, **settings})


def _of_compiled(compiled: Any) -> Call:
    request, name = compiled.create_infer_request(), compiled.inputs[0]

    def call(batch: Array) -> Array:
        found: Array = request.infer({name: batch})[0]
        return found

    return call


OPENERS: dict[str, Callable[[str, int], Call]] = {
    "eager": _eager,
    "torchscript": _torchscript,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "openvino-f32": _openvino_f32,
}
MODULES = {
    "eager": ("torch", "transformers.models.dinov2.modeling_dinov2"),
    "torchscript": ("torch",),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "openvino-f32": ("openvino",),
}


def outputs(runtime: str, file: str, inputs: str, target: str, threads: int = 2) -> dict[str, Any]:
    """Writes what the model makes of every input, [n, d], and says how many there are."""
    call, batches = opened(runtime, file, threads), np.load(inputs, mmap_mode="r")
    np.save(target, np.concatenate([call(np.ascontiguousarray(batches[i : i + 1])) for i in range(len(batches))]))
    return {"n": len(batches)}


def memory(runtime: str, file: str, sample: str) -> dict[str, Any]:
    """Peak memory of this process above what it has with the runtime imported, on one thread.

    Linux tells it of this program alone; `ru_maxrss` would hold what the process that started it had.
    """
    for module in MODULES[runtime]:
        __import__(module)
    batch = np.load(sample)
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    opened(runtime, file, 1)(batch)
    return {"peak_bytes": _status_bytes("VmHWM") - before}


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def timed(runtime: str, file: str, sample: str, threads: int, seconds: float) -> dict[str, Any]:
    """Median milliseconds of a call: by the clock on the wall, and of the processor, all threads together."""
    call, batch = opened(runtime, file, threads), np.load(sample)
    for _ in range(WARM_UP):
        call(batch)
    wall, processor = list[float](), list[float]()
    end = time.perf_counter() + seconds
    while len(wall) < FEWEST or time.perf_counter() < end:
        start, busy = time.perf_counter(), time.process_time()
        call(batch)
        processor.append(1e3 * (time.process_time() - busy))
        wall.append(1e3 * (time.perf_counter() - start))
    return {"wall_ms": statistics.median(wall), "cpu_ms": statistics.median(processor), "n": len(wall)}


def operations(runtime: str, file: str, sample: str) -> dict[str, Any]:
    """Microseconds of one call by type of operation, by the runtime's own profiler, on one thread."""
    batch = np.load(sample)
    found = _profiled_openvino(file, batch) if runtime == "openvino" else _profiled_onnxruntime(file, batch)
    return {"us": dict(found.most_common())}


def _profiled_onnxruntime(file: str, batch: Array) -> Counter[str]:
    with tempfile.TemporaryDirectory() as folder:
        session = _session(file, 1, trace=str(Path(folder) / "trace"))
        name = session.get_inputs()[0].name
        for _ in range(PROFILED):
            session.run(None, {name: batch})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            nodes.setdefault((event["args"]["op_name"], event["name"]), []).append(float(event["dur"]))
    total = Counter[str]()
    for (kind, _), times in nodes.items():
        total[kind] += statistics.median(times)  # type: ignore[assignment]
    return total


def _profiled_openvino(file: str, batch: Array) -> Counter[str]:
    compiled = _compiled(file, 1, {"PERF_COUNT": True})
    request, name = compiled.create_infer_request(), compiled.inputs[0]
    nodes: dict[tuple[str, str], list[float]] = {}
    for _ in range(PROFILED):
        request.infer({name: batch})
        for node in request.get_profiling_info():
            nodes.setdefault((node.node_type, node.node_name), []).append(node.real_time.total_seconds() * 1e6)
    total = Counter[str]()
    for (kind, _), times in nodes.items():
        total[kind] += statistics.median(times)  # type: ignore[assignment]
    return Counter({kind: value for kind, value in total.items() if value > 0})


def serve(requests: TextIO, answers: TextIO) -> None:
    """Times what is asked until the requests end."""
    for line in requests:
        found = timed(**json.loads(line))
        gc.collect()  # threads of a session that a cycle keeps alive would spin on
        print(json.dumps(found), file=answers, flush=True)


def main(arguments: Sequence[str]) -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    name, *given = arguments
    if name == "serve":
        serve(sys.stdin, answers)
        return 0
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "outputs": outputs,
        "memory": memory,
        "operations": operations,
    }
    print(json.dumps(commands[name](*given)), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
