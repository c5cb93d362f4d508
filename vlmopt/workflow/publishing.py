"""The second half of a run: emit, compare the files with the program, evaluate on the test split, measure, report."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vlmopt import __version__
from vlmopt.core.manifest import MANIFEST, GateEntry, Manifest, sha256_of
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed
from vlmopt.emit import emit_program
from vlmopt.emit.manifest import build_manifest, write_manifest
from vlmopt.graph.branches import find_branches
from vlmopt.graph.costing import program_cost
from vlmopt.graph.replay import run_component
from vlmopt.report.markdown import render_markdown
from vlmopt.report.schema import read_report
from vlmopt.rewrite.pipeline import StepResult
from vlmopt.rundir import CHECKSUM, RECIPE, REPORT_JSON, REPORT_MARKDOWN, WORK, RunDirectory, atomic_write, write_json
from vlmopt.runtime.latency import LatencyTable, measure_latency
from vlmopt.runtime.session import open_session
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.tasks.kinds.zero_shot_image_classification import prompts
from vlmopt.tasks.specification import TaskKind
from vlmopt.verify.parity import Gate, check_file, open_onnx, two_shapes
from vlmopt.verify.statistics import mean_interval, paired_difference
from vlmopt.workflow.inspecting import branch_rows
from vlmopt.workflow.run_state import RunState

CASES = ".work/40-verify/cases.safetensors"
PROFILE = "profile.json"
PROFILE_WORK = "10-profile"

Files = dict[str, dict[str, str]]  # component -> format -> file name


@dataclass
class Evidence:
    """Everything that was measured about the emitted artifact."""

    files: Files
    gates: list[Gate]
    metric: dict[str, Any] | None = None
    latency_ms: dict[str, Any] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)
    n_test: int = 0


def emit_and_verify(state: RunState, steps: list[StepResult]) -> Evidence:
    """Writes the artifact's files into the run and measures them against the original."""
    recipe, run = state.recipe, state.run
    with state.stage("emit"):
        _clear(run.partial)
        files = emit_program(state.optimized, recipe.emit, run.partial, opset=recipe.opset, progress=state.progress)
        _copy_processor(state)
    evidence = Evidence(files, list(state.gates))
    with state.stage("verify"):
        evidence.gates += _check_files(state, files)
    if state.bound is not None:
        with state.stage("evaluate"):
            evidence.metric, evidence.n_test = _final_evaluation(state, files)
            evidence.gates += _drop_gate(state, evidence.metric)
    with state.stage("latency"):
        originals = emit_program(
            state.original, ("onnx",), run.work("30-original"), opset=recipe.opset, progress=state.progress
        )
        evidence.latency_ms = _latencies(state, files, originals)
        evidence.size_bytes = {
            "original": _size(run.work("30-original"), originals),
            "optimized": _size(run.partial, files),
        }
        shutil.rmtree(run.work("30-original"))
    return evidence


def _clear(partial: Path) -> None:
    """Removes what an interrupted run had written of the artifact, halves of files included; `.work` stays."""
    halves = partial.rglob(".*.tmp")
    for path in {*partial.iterdir(), *halves}:
        if path.is_file():
            path.unlink()


def keep_measurements(run: RunDirectory) -> None:
    """Leaves of a run that was stopped only what the next one takes up: the batches that were profiled."""
    _clear(run.partial)
    for folder in (run.partial / WORK).iterdir():
        if folder.is_dir() and folder.name != PROFILE_WORK:
            shutil.rmtree(folder)


def _copy_processor(state: RunState) -> None:
    for source in state.opened.preprocessor.files:
        shutil.copyfile(source, state.run.path(source.name))


def _check_files(state: RunState, files: Files) -> list[Gate]:
    """Every file at two shapes against the program; the cases are kept, so `vlmopt verify` can repeat this later."""
    gates: list[Gate] = []
    recorded: dict[str, Tensor] = {}
    feeds = state.sample_feeds(state.optimized)
    for name, component in state.optimized.components.items():
        cases: list[tuple[Feed, Tensor]] = []
        for i, feed in enumerate(two_shapes(component, feeds[name], state.optimized.dims)):
            wanted = run_component(component, [feed])
            cases.append((feed, wanted))
            recorded.update({f"{name}|{i}|{key}": value.contiguous() for key, value in feed.items()})
            recorded[f"{name}|{i}|="] = wanted.contiguous()
        for kind, file in files[name].items():
            dtype = component.outputs[0].dtype
            gates.append(check_file(f"{file} equals the program", state.run.path(file), kind, cases, dtype=dtype))
    atomic_write(state.run.path(CASES), save({key: value.clone() for key, value in recorded.items()}))
    return gates


def _final_evaluation(state: RunState, files: Files) -> tuple[dict[str, Any], int]:
    """The metric of original and artifact on the same test items, which nothing before has seen."""
    assert state.bound is not None
    source, seed = state.bound.source, state.recipe.seed
    before, after = source.open_test(state.original), source.open_test(state.optimized)
    original = program_outputs(state, state.original, before)
    optimized = artifact_outputs(state, files, after)
    items = [w.item_scores(o).numpy() for w, o in ((before, original), (after, optimized))]
    groups = list(before.item_groups)
    paired = paired_difference(items[0], items[1], groups, seed=seed)
    first, second = before.metrics(original), after.metrics(optimized)
    result = {
        "name": before.metric,
        "original": float(items[0].mean()),
        "optimized": float(items[1].mean()),
        "drop_points": paired.drop_points,
        "drop_interval95": paired.interval95,
        "original_interval95": mean_interval(items[0], groups, seed=seed),
        "optimized_interval95": mean_interval(items[1], groups, seed=seed),
        "p_value": paired.p_value,
        "n": paired.n,
        "all": {name: (first[name], second[name]) for name in first if name in second},
    }
    return result, before.n_items


def program_outputs(state: RunState, program: Program, workload: TaskWorkload) -> dict[str, Tensor]:
    outputs = {}
    for name, component in program.components.items():
        feeds = workload.feeds[name]
        tracked = state.progress.track(feeds, f"evaluating the original {name}", total=len(feeds))
        outputs[name] = run_component(component, tracked)
    return outputs


def artifact_outputs(state: RunState, files: Files, workload: TaskWorkload) -> dict[str, Tensor]:
    """Outputs of the emitted ONNX files in ONNX Runtime; of the program where ONNX was not asked for."""
    outputs = {}
    for name, component in state.optimized.components.items():
        feeds = workload.feeds[name]
        tracked = state.progress.track(feeds, f"evaluating the artifact's {name}", total=len(feeds))
        if "onnx" not in files[name]:
            outputs[name] = run_component(component, tracked)
            continue
        run = open_onnx(state.run.path(files[name]["onnx"]))
        outputs[name] = torch.cat([run(feed) for feed in tracked])
    return outputs


def _drop_gate(state: RunState, metric: Mapping[str, Any]) -> list[Gate]:
    bound = state.recipe.budgets.max_drop
    if bound is None or not state.recipe.verify.max_drop_gate:
        return []
    drop = float(metric["drop_points"])
    return [Gate(f"drop of {metric['name']} on the test split, in points", drop <= bound, drop, bound)]


def _latencies(state: RunState, files: Files, originals: Files) -> dict[str, Any]:
    """Batch 1 in ONNX Runtime, original and optimized side by side; a component that is gone has no second number."""
    feeds = state.sample_feeds(state.original)
    rows: dict[str, Any] = {}
    for name in originals:
        one = {key: value[:1].numpy() for key, value in feeds[name].items()}
        paths = {"original": state.run.work("30-original") / originals[name]["onnx"]}
        if name in files and "onnx" in files[name]:
            paths["optimized"] = state.run.path(files[name]["onnx"])
        measured = time_sessions(paths, one, progress=state.progress)
        optimized = measured.get("optimized")
        ratio = None if optimized is None else measured.ratio("original", "optimized").value
        rows[name] = {
            "original": _milliseconds(measured["original"]),
            "optimized": None if optimized is None else _milliseconds(optimized),
            "ratio": ratio,
        }
    return rows


def time_sessions(
    paths: Mapping[str, Path],
    feed: Mapping[str, Any],
    *,
    progress: Progress,
    runs: int = 50,
    threads: int | None = None,
) -> LatencyTable:
    """Latency of ONNX files on one feed, one session at a time, in rounds."""
    factories = {name: partial(open_session, path, threads=threads) for name, path in paths.items()}
    with progress.stage(f"timing {', '.join(paths)}"):
        return measure_latency(factories, dict.fromkeys(paths, feed), runs=runs)


def _milliseconds(latency: Any) -> dict[str, float]:
    return {"median_ms": latency.median_ms, "p10_ms": latency.p10_ms, "p90_ms": latency.p90_ms}


def _size(folder: Path, files: Files) -> int:
    """Bytes of one format's graphs, the first that every component has, external weights included."""
    kind = next(iter(next(iter(files.values()))))
    names = [formats[kind] for formats in files.values()]
    paths = [folder / part for name in names for part in (name, f"{name}.data")]
    return sum(path.stat().st_size for path in paths if path.is_file())


def write_results(state: RunState, steps: list[StepResult], evidence: Evidence) -> dict[str, Any]:
    """Writes profile, report and, last of all, the manifest with every file's hash, and the hash of the manifest."""
    shutil.rmtree(state.run.work(PROFILE_WORK))  # batches of features, which only a resumed run reads
    if state.profile is not None:
        atomic_write(state.run.path(PROFILE), state.profile.to_json())
    report = read_report(_report(state, steps, evidence)).as_dict()
    write_json(state.run.path(REPORT_JSON), report)
    atomic_write(state.run.path(REPORT_MARKDOWN), render_markdown(report))
    manifest = write_manifest(_manifest(state, evidence), state.run.partial)
    atomic_write(state.run.path(CHECKSUM), f"{sha256_of(manifest)}  {MANIFEST}\n")  # as sha256sum writes it
    return report


def _manifest(state: RunState, evidence: Evidence) -> Manifest:
    folder = state.run.partial
    task = None if state.bound is None else state.bound.task
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return build_manifest(
        state.optimized,
        evidence.files,
        folder,
        files=files,
        task=None if task is None else task.specification.kind.value,
        metric=None if task is None else task.specification.headline,
        prompts=() if task is None or task.specification.kind is not TaskKind.ZERO_SHOT else prompts(task),
        seed=state.recipe.seed,
        gates=[GateEntry(name=g.name, passed=g.passed, found=g.found, allowed=g.allowed) for g in evidence.gates],
    )


def _report(state: RunState, steps: list[StepResult], evidence: Evidence) -> dict[str, Any]:
    source = state.original.source
    cost = {
        "original": program_cost(state.original).as_dict(),
        "optimized": program_cost(state.optimized).as_dict(),
    }
    return {
        "schema": 1,
        "vlmopt": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "path": source.path,
            "model_type": source.model_type,
            "architecture": source.architecture,
            "fingerprint": source.fingerprint,
        },
        "task": _task_section(state, evidence),
        "result": {
            "metric": evidence.metric,
            "cost": cost,
            "latency_ms": evidence.latency_ms,
            "size_bytes": evidence.size_bytes or None,
        },
        "passes": [_pass_section(result) for result in steps],
        "branches": _branch_section(state),
        "gates": [{"name": g.name, "passed": g.passed, "found": g.found, "allowed": g.allowed} for g in evidence.gates],
        "stages": [
            {"name": entry["stage"], "seconds": entry["seconds"]}
            for entry in state.ledger.entries
            if "seconds" in entry
        ],
        "reproduce": f"vlmopt optimize --recipe {shlex.quote(str(state.run.final / RECIPE))} -o NEW_FOLDER",
        "warnings": state.warnings,
    }


def _task_section(state: RunState, evidence: Evidence) -> dict[str, Any] | None:
    if state.bound is None or state.fit is None:
        return None
    task = state.bound.task
    return {
        "name": task.specification.name,
        "kind": task.specification.kind.value,
        "metric": task.specification.headline,
        "fingerprint": task.fingerprint,
        "n_profile": state.fit.n_items,
        "n_validation": task.counts["validation"],
        "n_test": evidence.n_test,
    }


def _pass_section(result: StepResult) -> dict[str, Any]:
    is_predicted = result.predicted.macs == result.counted.macs
    return {
        "step": result.step,
        "name": result.name,
        "promise": result.promise.value,
        "n_sites": len(result.plan.sites),
        "n_applied": len(result.applied),
        "sites": [{"name": s.name, "component": s.component, "summary": s.summary} for s in result.applied],
        "refusals": [{"name": r.name, "component": r.component, "reason": r.reason} for r in result.refusals],
        "predicted": result.predicted.as_dict(),
        "counted": result.counted.as_dict(),
        "verdict": "saves what it predicted" if is_predicted else "saves other than it predicted",
    }


def _branch_section(state: RunState) -> list[dict[str, Any]]:
    scores = (
        {} if state.profile is None else {(s.component, s.name): s for s in state.profile.scores if s.scope == "branch"}
    )
    rows = []
    for name, component in state.original.components.items():
        if name not in state.optimized.components:
            continue  # folded away whole, which is no cut
        kept = {branch.name for branch in find_branches(state.optimized.components[name].graph)}
        for row in branch_rows(state.original, component):
            score = scores.get((name, row["name"]))
            rows.append(
                {
                    **{key: row[key] for key in ("name", "kind", "layer", "params", "macs")},
                    "component": name,
                    "score": None if score is None else score.score,
                    "stderr": None if score is None else score.stderr,
                    "kept": row["name"] in kept,
                }
            )
    return rows
