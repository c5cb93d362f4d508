"""What can be asked of a finished artifact: is it what was verified, and how fast is it here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vlmopt.core.energy import energy_meter
from vlmopt.core.errors import ArtifactError, GateError
from vlmopt.core.formats import ROUNDS_INPUTS
from vlmopt.core.manifest import MANIFEST, ComponentEntry, Manifest, read_manifest, sha256_of
from vlmopt.core.progress import Progress, Silent
from vlmopt.rundir import CHECKSUM
from vlmopt.verify.parity import Gate, Recorded, check_file
from vlmopt.workflow.checking_genai import check_genai_graphs
from vlmopt.workflow.evaluating import evaluate_artifact
from vlmopt.workflow.publishing import CASES, wanted_key
from vlmopt.workflow.timing import time_sessions

AS_RECORDED = "computes what was recorded"


def verify_artifact(path: Path, *, task: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Repeats what was verified when the artifact was made: every byte, every graph at two shapes, and the metric.

    Raises:
        ArtifactError: the directory is no artifact.
        GateError: something is not as it was.
    """
    show = progress or Silent()
    _check_manifest(path)
    manifest = read_manifest(path)
    gates = _changed_files(path, manifest, show)
    if all(gate.passed for gate in gates):
        with show.stage("graphs"):
            gates += _graphs(path, manifest)
        if task is not None:
            gates.append(_metric(path, task, show))
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        first = failed[0]
        found = f"{first.name}: found {first.found:.4g}, allowed {first.allowed:.4g}" if first.found else first.name
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise GateError(str(path), found + more, remedy="restore the artifact, or make it again from its recipe.yaml")
    return {"gates": [{"name": g.name, "passed": g.passed, "found": g.found, "allowed": g.allowed} for g in gates]}


def _check_manifest(path: Path) -> None:
    """The manifest holds the hash of every other file, and a file beside it holds its own."""
    manifest, recorded = path / MANIFEST, path / CHECKSUM
    if not manifest.is_file():
        return  # reading it says what is wrong
    text = recorded.read_bytes() if recorded.is_file() else b""
    if text != f"{sha256_of(manifest)}  {MANIFEST}\n".encode():
        found = f"{MANIFEST} or {CHECKSUM} was changed since it was verified" if text else f"{CHECKSUM} is missing"
        raise GateError(str(path), found, remedy="restore the artifact, or make it again from its recipe.yaml")


def _changed_files(path: Path, manifest: Manifest, progress: Progress) -> list[Gate]:
    """One gate a file; a missing or changed one is named."""
    gates = []
    for name, entry in progress.track(manifest.files.items(), "hashing", total=len(manifest.files)):
        file = path / name
        if not file.is_file():
            gates.append(Gate(f"{name} is missing", False, 0.0, 0.0))
        elif file.stat().st_size != entry.bytes or sha256_of(file) != entry.sha256:
            gates.append(Gate(f"{name} was changed since it was verified", False, 0.0, 0.0))
        else:
            gates.append(Gate(f"{name} is unchanged", True, 0.0, 0.0))
    return gates


def _graphs(path: Path, manifest: Manifest) -> list[Gate]:
    recorded = load_file(path / CASES)
    cases = {name: recorded_cases(recorded, name, entry) for name, entry in manifest.components.items()}
    gates = []
    for name, entry in manifest.components.items():
        for kind, file in entry.files.items():
            title = f"{file} {AS_RECORDED}"
            limit = entry.onnx_tolerance if kind in ROUNDS_INPUTS else None
            dtype = entry.outputs[0].dtype
            gates.append(check_file(title, path / file, kind, cases[name], dtype=dtype, limit=limit))
    held = {name: entry.onnx_tolerance for name, entry in manifest.components.items()}
    limits = {name: limit for name, limit in held.items() if limit is not None}
    graphs = manifest.components
    return gates + check_genai_graphs(manifest.generation, graphs, cases, path, claim=AS_RECORDED, limits=limits)


def recorded_cases(recorded: dict[str, Tensor], name: str, entry: ComponentEntry) -> list[Recorded]:
    """Inputs in order and wanted outputs of every case that was kept for a component."""
    cases: list[Recorded] = []
    while f"{name}|{len(cases)}|=" in recorded:
        number = len(cases)
        feed = {spec.name: recorded[f"{name}|{number}|{spec.name}"] for spec in entry.inputs}
        cases.append((feed, [recorded[wanted_key(name, number, place)] for place in range(len(entry.outputs))]))
    return cases


def _metric(path: Path, task: str, progress: Progress) -> Gate:
    """The metric on the test split against the report's, in points."""
    found = evaluate_artifact(path, task, progress=progress)
    recorded = found["recorded"]
    if recorded is None:
        raise ArtifactError(str(path), "its report holds no metric", expected="an artifact made with a task")
    drop = 100.0 * abs(found["value"] - recorded)
    return Gate(f"{found['metric']} on the test split is as reported, in points", drop <= 0.05, drop, 0.05)


def bench_artifact(
    path: Path, *, runs: int = 50, threads: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Latency of every ONNX graph of the artifact on this machine, batch 1, one session at a time."""
    show = progress or Silent()
    manifest = read_manifest(path)
    recorded = load_file(path / CASES)
    rows: dict[str, Any] = {}
    for name, entry in manifest.components.items():
        if "onnx" not in entry.files:
            raise ArtifactError(str(path), f"{name} has no ONNX file", remedy="make the artifact with --emit onnx")
        feed, _ = recorded_cases(recorded, name, entry)[0]
        arrays = {key: value.numpy() for key, value in feed.items()}
        measured = time_sessions({name: path / entry.files["onnx"]}, arrays, progress=show, runs=runs, threads=threads)[
            name
        ]
        rows[name] = {
            "file": entry.files["onnx"],
            "size_bytes": (path / entry.files["onnx"]).stat().st_size,
            "median_ms": measured.median_ms,
            "p10_ms": measured.p10_ms,
            "p90_ms": measured.p90_ms,
            "joules": measured.joules,
            "runs": measured.n,
        }
    return {"components": rows, "energy": energy_meter().note}
