"""Measures how long single operations take in ONNX Runtime, on whatever device this file is copied to.

    python measure.py [--threads N] [--rounds N] [--seconds S] [--only TEXT]

It lies in a folder with `plan.json` and `models/`, written by `vlmopt device export`, and needs Python 3.10, numpy and
onnxruntime; nothing of vlmopt. It writes random weights beside the models, runs one model after another, each alone and
each in several rounds, and leaves `results.json`, which `vlmopt device import` reads where the folder was written.

A model holds the same operation many times, every copy with weights of its own: together they are larger than the
processor's caches, as in a whole network, where weights come from memory in every call. The outputs of the copies are
read by nobody, so their buffers are reused and stay in the cache, as the buffers of a whole network do.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1
PLAN, RESULTS, MODELS = "plan.json", "results.json", "models"
EMPTY = ""  # the signature of the model that holds no operation: what a call itself takes
ROUNDS, SECONDS = 5, 0.12
WARMUP, _FEWEST_RUNS, _MOST_RUNS = 2, 5, 200
_BLOCK_BYTES = 1 << 22
Track = Callable[[Sequence[Any], str], Iterable[Any]]


def main() -> int:
    """Measures the folder that this file lies in."""
    parser = argparse.ArgumentParser(description="Measures single operations in ONNX Runtime.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of ONNX Runtime (all cores)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of every model ({ROUNDS})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"seconds of a turn ({SECONDS})")
    parser.add_argument("--only", default="", help="only operations whose signature holds this text")
    given = parser.parse_args()
    folder = Path(__file__).resolve().parent
    found = measure(
        folder, threads=given.threads, rounds=given.rounds, seconds=given.seconds, only=given.only, track=_told
    )
    (folder / RESULTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _say(f"written: {folder / RESULTS}")
    for signature, reason in found["failed"].items():
        _say(f"cannot be measured here: {signature}: {reason}")
    return 0


def measure(
    folder: Path,
    *,
    threads: int,
    track: Track,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    only: str = "",
    provider: str = "CPUExecutionProvider",
) -> dict[str, Any]:
    """Times of all models of the folder, in microseconds of one copy of the operation.

    Args:
        track: hands on what it is given, and shows how far the work is.
    """
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    write_weights(folder, plan["weights"])
    wanted = [entry for entry in plan["entries"] if entry["signature"] == EMPTY or only in entry["signature"]]
    turns = [entry for _ in range(rounds) for entry in wanted]
    runs: dict[str, list[list[float]]] = {entry["signature"]: [] for entry in wanted}
    failed: dict[str, str] = {}
    gc.collect()
    gc.freeze()  # what is alive now need not be looked at after every session
    try:
        for entry in track(turns, "operations"):
            signature = entry["signature"]
            if signature in failed:
                continue
            try:
                runs[signature].append(
                    _turn(folder / MODELS, entry, threads=threads, seconds=seconds, provider=provider)
                )
            except Exception as problem:  # noqa: BLE001  ONNX Runtime's exceptions share no public base class
                failed[signature] = " ".join(str(problem).replace(str(folder), ".").split())[:200]
    finally:
        gc.unfreeze()
    if EMPTY in failed:
        raise RuntimeError(f"ONNX Runtime cannot run the empty model: {failed[EMPTY]}")
    return _results(plan, wanted, runs, failed, threads=threads, provider=provider)


def _results(
    plan: dict[str, Any],
    wanted: list[dict[str, Any]],
    runs: dict[str, list[list[float]]],
    failed: dict[str, str],
    *,
    threads: int,
    provider: str,
) -> dict[str, Any]:
    import onnxruntime

    call_us = min(statistics.median(times) for times in runs[EMPTY])
    measured = [entry for entry in wanted if entry["signature"] not in (EMPTY, *failed)]
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "machine": {
            "cpu": processor(),
            "cores": os.cpu_count() or 1,
            "os": f"{platform.system()} {platform.release()}",
        },
        "runtime": {
            "name": "onnxruntime",
            "version": onnxruntime.__version__,
            "provider": provider,
            "threads": threads,
            "graph": plan["graph"],
        },
        "clock": "thread" if threads == 1 else "wall",
        "rotated_bytes": plan["rotated_bytes"],
        "call_us": call_us,
        "operations": {
            entry["signature"]: _summary(runs[entry["signature"]], call_us=call_us, n_copies=entry["n_copies"])
            for entry in measured
        },
        "failed": failed,
    }


def _summary(rounds: list[list[float]], *, call_us: float, n_copies: int) -> dict[str, float]:
    """Of one copy: median and spread (median absolute deviation) of all runs, and the median of the quietest round."""
    runs = [value for times in rounds for value in times]
    median = statistics.median(runs)
    quietest = min(statistics.median(times) for times in rounds)
    spread = statistics.median(abs(value - median) for value in runs)
    return {
        "median_us": max(0.0, median - call_us) / n_copies,
        "quietest_us": max(0.0, quietest - call_us) / n_copies,
        "spread_us": spread / n_copies,
        "n_runs": len(runs),
    }


def _turn(folder: Path, entry: dict[str, Any], *, threads: int, seconds: float, provider: str) -> list[float]:
    """Microseconds of the runs of one session, which is gone when this returns: idle sessions slow others down."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # The operations are those of an optimized graph already; optimizing again would merge the copies into one.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / entry["model"]), options, providers=[provider])
    try:
        given = {spec["name"]: sample(spec) for spec in entry["inputs"]}
        return run_times_us(session, given, threads=threads, seconds=seconds)
    finally:
        del session
        gc.collect()


def run_times_us(session: Any, inputs: Mapping[str, Any], *, threads: int, seconds: float) -> list[float]:
    """Microseconds of every run within so many seconds, five at least; what comes in and goes out is not copied.

    One thread is timed by its own clock, which stands still while another program has the core; several by the wall's.
    """
    import onnxruntime

    clock = time.thread_time if threads == 1 else time.perf_counter
    binding = session.io_binding()
    kept = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()}
    for name, value in kept.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    for _ in range(WARMUP):
        session.run_with_iobinding(binding)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < _MOST_RUNS and (len(times) < _FEWEST_RUNS or time.perf_counter() - start < seconds):
        before = clock()
        session.run_with_iobinding(binding)
        times.append(1e6 * (clock() - before))
    del binding, kept
    return times


def sample(spec: dict[str, Any]) -> Any:
    """An input as the plan describes it: these values, or random ones between the lowest and the highest seen."""
    shape = spec["shape"]
    if "values" in spec:
        return np.array(spec["values"], dtype=spec["dtype"]).reshape(shape)
    generator = np.random.default_rng(0)
    if spec["dtype"] == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    if spec["dtype"].startswith(("int", "uint")):
        return generator.integers(spec["low"], spec["high"], shape, endpoint=True).astype(spec["dtype"])
    return generator.standard_normal(shape).astype(spec["dtype"])


def write_weights(folder: Path, wanted: dict[str, dict[str, Any]]) -> None:
    """Files of random numbers, one a type, that the models read their weights from; a file of the right size stays."""
    for name, spec in wanted.items():
        path = folder / MODELS / name
        if path.is_file() and path.stat().st_size == spec["bytes"]:
            continue
        block, left = _block(spec["dtype"]), spec["bytes"]
        with path.open("wb") as stream:
            while left > 0:
                left -= stream.write(block[:left])


def _block(dtype: str) -> bytes:
    """Random numbers as small as weights are: large ones would end in infinities, and bits at random in no numbers."""
    generator = np.random.default_rng(0)
    if dtype in ("float64", "float32", "float16", "bfloat16"):
        values = 0.02 * generator.standard_normal(_BLOCK_BYTES // (8 if dtype == "float64" else 4))
        if dtype == "bfloat16":
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return values.astype(dtype).tobytes()
    if dtype in ("bool", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
        return generator.integers(0, 2, _BLOCK_BYTES // 8).astype(dtype).tobytes()
    return generator.integers(0, 256, _BLOCK_BYTES, dtype=np.uint8).tobytes()


def processor() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "hardware", "cpu model"):
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _told(items: Sequence[Any], what: str) -> Iterator[Any]:
    """Tells every few seconds how far the work is."""
    start = last = time.monotonic()
    _say(f"{len(items)} turns of {what}")
    for done, item in enumerate(items):
        if time.monotonic() - last > 5.0:
            last = time.monotonic()
            _say(f"{done} of {len(items)} in {last - start:.0f} s: {item['signature']}")
        yield item


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
