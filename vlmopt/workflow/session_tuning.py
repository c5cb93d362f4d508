"""Which options of ONNX Runtime run an artifact fastest here (`vlmopt device tune`): fusions on or off, and threads.

What a fusion or a thread should gain decides nothing; what was measured does. The runtime's own choice stays unless
another is faster by more than noise and computes what was recorded when the artifact was verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import load_file

from vlmopt.core.machine import n_cores, processor_name
from vlmopt.core.manifest import Manifest, read_manifest
from vlmopt.core.progress import Progress, Silent
from vlmopt.core.session_choice import SESSION, Optimization, SessionChoice
from vlmopt.rundir import write_json
from vlmopt.verify.parity import check_file
from vlmopt.workflow.artifact import AS_RECORDED, recorded_cases
from vlmopt.workflow.budgeting import LATENCY_NOISE
from vlmopt.workflow.device_graphs import DeviceGraph
from vlmopt.workflow.device_opening import DeviceSource
from vlmopt.workflow.publishing import CASES
from vlmopt.workflow.timing import time_variants

_RUNS, _ROUNDS = 40, 5


@dataclass(frozen=True)
class Variant:
    """Options of a session."""

    optimization: Optimization
    threads: int

    @property
    def name(self) -> str:
        return f"{self.optimization}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def tune_session(path: Path, *, runs: int = _RUNS, progress: Progress | None = None) -> dict[str, Any]:
    """Times the variants, and leaves the fastest in the artifact's session.json, where `vlmopt.load` finds it.

    Raises:
        ArtifactError: the directory is no artifact, or has no ONNX files.
    """
    show = progress or Silent()
    manifest = read_manifest(path)
    graphs = DeviceSource(str(path), progress=show).graphs(path)
    variants = variants_of(n_cores())
    times = _times_us(graphs, variants, runs=runs, progress=show)
    ranked = fastest_first(times, default=variants[0])
    chosen = next(one for one in ranked if one == variants[0] or _computes_the_same(path, manifest, one))
    choice = SessionChoice(
        cpu=processor_name(),
        cores=n_cores(),
        runtime=metadata.version("onnxruntime"),
        optimization=chosen.optimization,
        threads=chosen.threads,
        times_us={variant.name: time for variant, time in times.items()},
    )
    write_json(path / SESSION, choice.model_dump(mode="json"))
    return {"chosen": chosen.name, **choice.model_dump(mode="json")}


def variants_of(cores: int) -> list[Variant]:
    """All there are, the runtime's own choice first."""
    counts = sorted({1, max(1, cores // 2), cores}, reverse=True)
    return [Variant(level, count) for count in counts for level in get_args(Optimization)]


def fastest_first(times_us: Mapping[Variant, float], *, default: Variant) -> list[Variant]:
    """The variants in the order in which they are tried; none slower than the default, which wins within noise."""
    limit = times_us[default] * (1.0 - LATENCY_NOISE)
    faster = sorted((one for one in times_us if times_us[one] < limit), key=lambda one: times_us[one])
    return [*faster, default]


def _times_us(
    graphs: Sequence[DeviceGraph], variants: Sequence[Variant], *, runs: int, progress: Progress
) -> dict[Variant, float]:
    """Microseconds of a call of every graph, added up, each in its quietest round; variants take turns."""
    totals = dict.fromkeys(variants, 0.0)
    for graph in graphs:
        sessions = {one.name: (graph.path, one.threads, one.optimization) for one in variants}
        with progress.stage(f"timing {len(variants)} variants of {graph.title}"):
            table = time_variants(sessions, dict.fromkeys(sessions, graph.feed), runs=runs, rounds=_ROUNDS)
        for one in variants:
            totals[one] += 1e3 * table[one.name].quietest_ms
    return totals


def _computes_the_same(path: Path, manifest: Manifest, variant: Variant) -> bool:
    """Whether every graph computes what was recorded with these options, too."""
    recorded = load_file(path / CASES)
    for name, entry in manifest.components.items():
        cases = recorded_cases(recorded, name, entry)
        file = entry.files["onnx"]
        gate = check_file(
            f"{file} {AS_RECORDED}",
            path / file,
            "onnx",
            cases,
            dtype=entry.outputs[0].dtype,
            limit=entry.onnx_tolerance,
            optimization=variant.optimization,
        )
        if not gate.passed:
            return False
    return True
