"""The second half of a run: emit, compare the files with the program, evaluate on the test split, measure, publish."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from vlmopt.core.energy import energy_meter
from vlmopt.core.formats import ROUNDS_INPUTS
from vlmopt.core.manifest import MANIFEST, GateEntry, Manifest, sha256_of
from vlmopt.emit import emit_program
from vlmopt.emit.configuration import copy_processor
from vlmopt.emit.manifest import build_manifest, write_manifest
from vlmopt.graph.numbering import with_numbered_cache
from vlmopt.graph.replay import run_outputs
from vlmopt.report import read_report, render_markdown
from vlmopt.report.html import render_html
from vlmopt.rewrite.pipeline import StepResult
from vlmopt.rundir import (
    CHECKSUM,
    MEASURED,
    REPORT_HTML,
    REPORT_JSON,
    REPORT_MARKDOWN,
    WORK,
    RunDirectory,
    atomic_write,
    write_json,
)
from vlmopt.tasks.kinds.zero_shot_image_classification import prompts
from vlmopt.tasks.specification import TaskKind
from vlmopt.verify.loading import check_loading
from vlmopt.verify.parity import Gate, Recorded, check_file
from vlmopt.workflow.budgeting import resource_gates
from vlmopt.workflow.checking_genai import check_genai_graphs
from vlmopt.workflow.checking_quantized import check_quantized_layers, quantized_tolerance
from vlmopt.workflow.counting import uncounted
from vlmopt.workflow.evidence import Evidence, drop_gates, final_evaluation
from vlmopt.workflow.reporting import report_of
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.samples import sample_shapes
from vlmopt.workflow.switching import Switchable, adapters_of, check_switched, write_adapters
from vlmopt.workflow.timing import Files, graphs_bytes, time_components

CASES = ".work/40-verify/cases.safetensors"
PROFILE = "profile.json"
ORIGINAL_WORK = "30-original"


def emit_and_verify(state: RunState, steps: list[StepResult]) -> Evidence:
    """Writes the artifact's files into the run and measures them against the original."""
    recipe, run = state.recipe, state.run
    with state.stage("emit"):
        _clear(run.partial)
        state.optimized = with_numbered_cache(state.optimized)
        held = adapters_of(state)
        files = emit_program(
            state.optimized,
            recipe.emit,
            run.partial,
            opset=recipe.opset,
            progress=state.progress,
            replaceable=held.places,
        )
        write_adapters(state, held)
        copy_processor(state.opened.preprocessor.files, state.optimized, run.partial)
        state.warnings += uncounted(state.optimized, run.partial)
    evidence = Evidence(files, list(state.gates), adapters=held.items())
    with state.stage("verify"):
        evidence.gates += _check_files(state, files, held, evidence.tolerances)
    if state.bound is not None:
        with state.stage("evaluate"):
            evidence.metric, parts = final_evaluation(state, files)
            evidence.n_test = int(evidence.metric["n"])
            evidence.gates += drop_gates(state, evidence.metric["name"], parts)
    with state.stage("latency"):
        _measure(state, evidence)
    evidence.gates += resource_gates(state, evidence)
    return evidence


def _measure(state: RunState, evidence: Evidence) -> None:
    """Latency and size beside those of the original, which is emitted in the same way for it."""
    folder = state.run.work(ORIGINAL_WORK)
    originals = emit_program(state.original, ("onnx",), folder, opset=state.recipe.opset, progress=state.progress)
    timings = time_components(state, evidence.files, originals, original_folder=folder)
    evidence.latency_ms, evidence.n_threads = timings.rows, timings.n_threads
    evidence.quietest_us = timings.quietest_us
    evidence.energy = energy_meter().note
    per_call = {
        name: {side: row[side] and row[side]["joules"] for side in ("original", "optimized")}
        for name, row in timings.rows.items()
    }
    state.ledger.note("energy", evidence.energy, joules=per_call)
    evidence.size_bytes = {
        "original": graphs_bytes(folder, originals),
        "optimized": graphs_bytes(state.run.partial, evidence.files),
    }
    shutil.rmtree(folder)


def _clear(partial: Path) -> None:
    """Removes what an interrupted run had written of the artifact, halves of files included; `.work` stays."""
    halves = partial.rglob(".*.tmp")
    for path in {*partial.iterdir(), *halves}:
        if path.is_file():
            path.unlink()


def keep_measurements(run: RunDirectory) -> None:
    """Leaves of a run that was stopped only what the next one takes up: the profile and what was chosen by it."""
    _clear(run.partial)
    for folder in (run.partial / WORK).iterdir():
        if folder.is_dir() and folder.name not in MEASURED:
            shutil.rmtree(folder)


def _check_files(state: RunState, files: Files, held: Switchable, tolerances: dict[str, float]) -> list[Gate]:
    """Every file at two shapes against the program; the cases are kept, so `vlmopt verify` can repeat this later.

    Args:
        tolerances: gets what ONNX files of quantized components are held to.
    """
    gates: list[Gate] = []
    recorded: dict[str, Tensor] = {}
    every: dict[str, list[Recorded]] = {}
    shapes = sample_shapes(state.optimized, state.fit, seed=state.recipe.seed)
    for name, component in state.optimized.components.items():
        cases = every.setdefault(name, [])
        names = {spec.name: spec.name_in_files for spec in component.inputs}
        for i, feed in enumerate(shapes[name]):
            wanted = run_outputs(component, feed)
            cases.append((feed, wanted))
            recorded.update({f"{name}|{i}|{names[key]}": value.contiguous() for key, value in feed.items()})
            recorded.update({wanted_key(name, i, place): value.contiguous() for place, value in enumerate(wanted)})
        if (tolerance := quantized_tolerance(component, cases)) is not None:
            tolerances[name] = tolerance
        for kind, file in files[name].items():
            dtype, limit = component.outputs[0].dtype, tolerances.get(name) if kind in ROUNDS_INPUTS else None
            title = f"{file} equals the program"
            gates.append(check_file(title, state.run.path(file), kind, cases, dtype=dtype, limit=limit))
        if "onnx" in files[name]:
            file = files[name]["onnx"]
            gates.append(check_loading(f"{file} loads in ONNX Runtime without a warning", state.run.path(file)))
            gates += check_quantized_layers(component, cases, opset=state.recipe.opset)
    program = state.optimized
    claim = "equals the program"
    folder = state.run.partial
    gates += check_genai_graphs(program.generation, program.components, every, folder, claim=claim, limits=tolerances)
    gates += check_switched(state, held, files, every, limits=tolerances)
    atomic_write(state.run.path(CASES), save({key: value.clone() for key, value in recorded.items()}))
    return gates


def wanted_key(component: str, case: int, place: int) -> str:
    """Under which an output of a case is kept."""
    return f"{component}|{case}|={place or ''}"


def write_results(state: RunState, steps: list[StepResult], evidence: Evidence) -> dict[str, Any]:
    """Writes profile, report and, last of all, the manifest with every file's hash, and the hash of the manifest."""
    if all(gate.passed for gate in evidence.gates):
        for name in MEASURED:  # batches of features among it, which only another try reads
            shutil.rmtree(state.run.work(name))
    if state.profile is not None:
        atomic_write(state.run.path(PROFILE), state.profile.to_json())
    report = read_report(report_of(state, steps, evidence)).as_dict()
    write_json(state.run.path(REPORT_JSON), report)
    atomic_write(state.run.path(REPORT_MARKDOWN), render_markdown(report))
    atomic_write(state.run.path(REPORT_HTML), render_html(report))
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
        adapters=evidence.adapters,
        tolerances=evidence.tolerances,
    )
