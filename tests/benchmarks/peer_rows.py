"""The rows of the comparison with peers: which file in which runtime, how it is made, and processes that make it.

Every conversion, every evaluation and every measurement of memory is a process of its own, so that a library that fails
or crashes spoils one row. Two environments: the project's, and one with NNCF, OpenVINO and Olive, which is made here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import towers
from vlmopt.core.integer_products import saturates

SATURATES = "PRODUCTS_SATURATE"  # of the environment: whether products of unsigned and signed bytes do here
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PINNED = ("nncf==3.4.0", "openvino==2026.4.1", "olive-ai==0.13.0")  # as the extra `peers` has them
BESIDE = ("torch==2.13.0", "transformers", "onnx", "onnxruntime", "onnxscript", "requests")  # Olive imports all of them
LONGEST_S = 2400
QUIET = {"HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Row:
    """A model file in a runtime.

    `made` is who makes the file: `here` and `apart` are conversions of the plain tower in the one and the other
    environment, `pruned` ours of what Torch-Pruning leaves, `ours` a run of `vlmopt optimize`; empty where it is there.
    `behind` is the file that it is made from. `is_same` rows compute the original's function in other files.
    """

    name: str
    title: str
    runtime: str
    file: str
    made: str = ""
    behind: str = ""
    is_same: bool = False

    @property
    def is_ours(self) -> bool:
        return self.made == "ours"


PLAIN = "plain.onnx"
ROWS = (
    Row("ours", "vlmopt: branches skipped, int8", "onnxruntime", "ours.onnx", "ours"),
    Row("ours_plan", "vlmopt: one plan of cuts, widths and int8", "onnxruntime", "ours_plan.onnx", "ours"),
    Row("ours_skip", "vlmopt: branches skipped", "onnxruntime", "ours_skip.onnx", "ours"),
    Row("ours_int8", "vlmopt: int8 alone", "onnxruntime", "ours_int8.onnx", "ours"),
    Row("eager", "PyTorch eager", "eager", "tower.pt", is_same=True),
    Row("torchscript", "TorchScript", "torchscript", "scripted.ts", "here", is_same=True),
    Row("ort_fp32", "ONNX Runtime fp32", "onnxruntime", PLAIN, "here", is_same=True),
    Row("ort_int8", "ONNX Runtime dynamic int8", "onnxruntime", "dynamic-int8.onnx", "here", PLAIN),
    Row("exporters", "transformers.exporters, fusions", "onnxruntime", "fused.onnx", "here", is_same=True),
    Row("openvino_fp32", "OpenVINO fp32", "openvino-f32", "openvino.xml", "apart", PLAIN, is_same=True),
    Row("openvino", "OpenVINO, its own precision", "openvino", "openvino.xml", "apart", PLAIN),
    Row("nncf_int8", "NNCF int8", "openvino", "nncf-int8.xml", "apart", PLAIN),
    Row("nncf_accuracy", "NNCF int8, accuracy control", "openvino", "nncf-accuracy.xml", "apart", PLAIN),
    Row("olive", "Olive: fusions, dynamic int8", "onnxruntime", "olive-int8.onnx", "apart", PLAIN),
    Row("pruning", "Torch-Pruning, our MACs", "onnxruntime", "pruned.onnx", "pruned"),
    Row(
        "pruning_int8",
        "Torch-Pruning, dynamic int8",
        "onnxruntime",
        "pruned-int8.onnx",
        "here",
        "pruned.onnx",
    ),
)


class RowError(Exception):
    """A row that cannot be had; its text is what the peer said, in one line."""


def interpreter(runtime_or_maker: str) -> str:
    """The Python of the environment that holds a runtime, or makes a row."""
    is_apart = runtime_or_maker == "apart" or runtime_or_maker.startswith("openvino")
    return str(peers_environment() / "bin" / "python") if is_apart else sys.executable


def peers_environment() -> Path:
    """The virtual environment of the peers, made where it is not there yet.

    Raises:
        RowError: pip cannot install the packages.
    """
    folder = towers.cache() / "benchmarks" / "peers-venv"
    stamp, wanted = folder / "installed.txt", "\n".join((*PINNED, *BESIDE))
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        venv.create(folder, with_pip=True)
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
        done = subprocess.run([*command, *PINNED, *BESIDE], capture_output=True, text=True)
        if done.returncode:
            raise RowError(f"pip: {last_line(done.stderr)}")
        stamp.write_text(wanted, encoding="utf-8")
    return folder


def converted(row: Row, folder: Path) -> float:
    """Seconds that the row's file took; it is made in the folder."""
    if row.made == "apart":
        script = [str(HERE / "peer_making_apart.py")]
    else:
        script = ["-m", "tests.benchmarks.peer_making"]
    return float(answer([interpreter(row.made), *script, row.file, str(folder)])["seconds"])


def called(command: str, row: Row, folder: Path, *files: Path) -> dict[str, Any]:
    """What `peer_calls.py` finds of a row's file."""
    script = str(HERE / "peer_calls.py")
    given = [command, row.runtime, str(folder / row.file), *map(str, files)]
    return answer([interpreter(row.runtime), script, *given])


def answer(command: Sequence[str]) -> dict[str, Any]:
    """The last line that a process prints, as JSON.

    Raises:
        RowError: it failed, or took too long.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", cwd=ROOT, env=environment(), timeout=LONGEST_S
        )
    except subprocess.TimeoutExpired as error:
        raise RowError(f"not done after {LONGEST_S} s") from error
    if done.returncode:
        raise RowError(last_line(done.stderr) or f"exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def environment() -> dict[str, str]:
    """That of the processes: ours importable, nobody online, nobody's threads limited from outside."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**kept, **QUIET, "PYTHONPATH": str(ROOT), SATURATES: str(int(saturates()))}


def last_line(text: str) -> str:
    """What a failed process said last, without line breaks."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def size_bytes(row: Row, folder: Path) -> int:
    """Bytes of the file with its weights."""
    file = folder / row.file
    beside = [file.with_suffix(".bin")] if file.suffix == ".xml" else [Path(f"{file}_data"), Path(f"{file}.data")]
    return sum(one.stat().st_size for one in (file, *beside) if one.is_file())


class Workers:
    """Processes that time calls, one a runtime; only the one that is asked holds a model."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[str]] = {}

    def time(self, row: Row, folder: Path, *, threads: int, seconds: float) -> dict[str, Any]:
        """Median milliseconds of a call: `wall_ms`, and `cpu_ms` of all threads together.

        Raises:
            RowError: the runtime failed.
        """
        request = {"runtime": row.runtime, "file": str(folder / row.file), "sample": str(folder / "sample.npy")}
        worker = self._worker(row.runtime)
        assert worker.stdin is not None
        assert worker.stdout is not None
        print(json.dumps({**request, "threads": threads, "seconds": seconds}), file=worker.stdin, flush=True)
        line = worker.stdout.readline()
        if not line:
            self._running.pop(row.runtime)
            raise RowError(f"{row.runtime} ended with {worker.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _worker(self, runtime: str) -> subprocess.Popen[str]:
        if runtime not in self._running:
            command = [interpreter(runtime), str(HERE / "peer_calls.py"), "serve"]
            pipe = subprocess.PIPE
            self._running[runtime] = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=environment()
            )
        return self._running[runtime]

    def close(self) -> None:
        for worker in self._running.values():
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()
        self._running.clear()
