"""What the test split says about original and artifact: one evaluation of each, and everything that is read off it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmopt.core.errors import TaskError
from vlmopt.core.manifest import AdapterItem
from vlmopt.core.workload import Outputs, by_part
from vlmopt.emit.manifest import component_entry, dim_entry, generation_entry
from vlmopt.graph.quantized import quantized_nodes
from vlmopt.tasks.answers import Answer, Query, Slice
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.tasks.pictures import picture_uri
from vlmopt.verify.comparing import Change, GroupScores, changes, examples, group_drops
from vlmopt.verify.parity import Gate
from vlmopt.verify.statistics import mean_interval, paired_difference
from vlmopt.workflow.answering import ArtifactFiles, program_outputs
from vlmopt.workflow.controls import modules_removed
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.timing import Files

MAX_SHOWN = 24  # items with their pictures


@dataclass(frozen=True)
class PartDrop:
    """The metric of what a drop is held against: of one task of several by its name, or of all items."""

    name: str
    original_points: float
    drop_points: float


@dataclass
class Evidence:
    """Everything that was measured about the emitted artifact."""

    files: Files
    gates: list[Gate]
    metric: dict[str, Any] | None = None
    latency_ms: dict[str, Any] = field(default_factory=dict)
    energy: str = ""  # what its joules are, or why there are none
    n_threads: int | None = None
    quietest_us: dict[str, float] = field(
        default_factory=dict
    )  # of one call of every component, original and optimized
    size_bytes: dict[str, int] = field(default_factory=dict)
    n_test: int = 0
    adapters: dict[str, AdapterItem] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)  # of ONNX files, where their type does not say it


def final_evaluation(state: RunState, files: Files) -> tuple[dict[str, Any], list[PartDrop]]:
    """The metric of original and artifact on the same test items, which nothing before has seen, in all and by part."""
    assert state.bound is not None
    source = state.bound.source
    before, after = source.open_test(state.original), source.open_test(state.optimized)
    original = program_outputs(state.original, before, what="the original", progress=state.progress)
    optimized = _artifact_outputs(state, files, after)
    section = {
        **_metric(before, after, original, optimized, seed=state.recipe.seed),
        "simulated": _simulated(state, after),
        "groups": _groups(before, before.slices(original), after.slices(optimized), seed=state.recipe.seed),
        "removed": modules_removed(
            source, state.optimized, after, optimized, seed=state.recipe.seed, progress=state.progress
        ),
        "changes": _changes(state, before.queries(), before.answers(original), after.answers(optimized)),
    }
    return section, _parts(before, after, original, optimized)


def _simulated(state: RunState, workload: TaskWorkload) -> float | None:
    """The metric of a quantized program, beside that of its files; None of one that is not quantized."""
    if not any(quantized_nodes(component.graph) for component in state.optimized.components.values()):
        return None
    outputs = program_outputs(state.optimized, workload, what="the quantized program", progress=state.progress)
    return float(workload.item_scores(outputs).mean())


def _parts(before: TaskWorkload, after: TaskWorkload, original: Outputs, optimized: Outputs) -> list[PartDrop]:
    first, second = by_part(before, before.item_scores(original)), by_part(after, after.item_scores(optimized))
    return [
        PartDrop(name, 100.0 * float(own.mean()), 100.0 * float((own - second[name]).mean()))
        for name, own in first.items()
    ]


def _artifact_outputs(state: RunState, files: Files, workload: TaskWorkload) -> Outputs:
    """Outputs of the emitted ONNX files in ONNX Runtime; of the program where ONNX was not asked for."""
    program, what = state.optimized, "the artifact"
    if any("onnx" not in formats for formats in files.values()):
        return program_outputs(program, workload, what=what, progress=state.progress)
    entries = {name: component_entry(part, {"onnx": files[name]["onnx"]}) for name, part in program.components.items()}
    dims = {name: dim_entry(dim) for name, dim in program.dims.items()}
    artifact = ArtifactFiles(state.run.partial, entries, dims, generation_entry(program))
    return artifact.outputs(workload, what=what, progress=state.progress)


def _metric(
    before: TaskWorkload, after: TaskWorkload, original: Outputs, optimized: Outputs, *, seed: int
) -> dict[str, Any]:
    items = [w.item_scores(o).numpy() for w, o in ((before, original), (after, optimized))]
    groups = list(before.item_groups)
    paired = paired_difference(items[0], items[1], groups, seed=seed)
    first, second = before.metrics(original), after.metrics(optimized)
    return {
        "name": before.metric,
        "original": float(items[0].mean()),
        "optimized": float(items[1].mean()),
        "drop_points": paired.drop_points,
        "drop_interval95": paired.interval95,
        "original_interval95": mean_interval(items[0], groups, seed=seed),
        "optimized_interval95": mean_interval(items[1], groups, seed=seed),
        "p_value": paired.p_value,
        "n": paired.n,
        "all": {name: (first[name] / 100, second[name] / 100) for name in first if name in second},
    }


def _groups(
    workload: TaskWorkload, original: Sequence[Slice], optimized: Sequence[Slice], *, seed: int
) -> list[dict[str, Any]]:
    """The metric by label, type of question or direction of the search."""
    clusters = workload.item_groups
    groups = [
        GroupScores(
            name=before.name,
            original=before.scores.double().numpy(),
            optimized=after.scores.double().numpy(),
            clusters=[clusters[row] for row in before.rows],
        )
        for before, after in zip(original, optimized, strict=True)
    ]
    return [
        {
            "name": found.name,
            "n": found.n,
            "original": found.original,
            "optimized": found.optimized,
            "drop_points": found.drop_points,
            "drop_interval95": found.interval95,
        }
        for found in group_drops(groups, seed=seed)
    ]


def _changes(
    state: RunState, queries: Sequence[Query], original: Sequence[Answer], optimized: Sequence[Answer]
) -> dict[str, Any]:
    """Counts over all queries, and a few of them with pictures: only those are opened."""
    found = changes(original, optimized)
    counts = {change: sum(1 for other in found.values() if other is change) for change in Change}
    kinds, clusters = [query.kind for query in queries], [query.group for query in queries]
    shown = examples(found, kinds, clusters, seed=state.recipe.seed, limit=MAX_SHOWN)
    return {
        "n": len(queries),
        "n_lost": counts[Change.LOST],
        "n_gained": counts[Change.GAINED],
        "n_other": counts[Change.OTHER],
        "items": [_changed_item(state, queries[i], original[i], optimized[i]) for i in shown],
    }


def _changed_item(state: RunState, query: Query, original: Answer, optimized: Answer) -> dict[str, Any]:
    return {
        "name": query.name,
        "question": query.question,
        "expected": query.expected,
        "original": _answer_text(original),
        "optimized": _answer_text(optimized),
        "original_is_right": original.is_right,
        "optimized_is_right": optimized.is_right,
        "image": _picture(state, query),
    }


def _answer_text(answer: Answer) -> str:
    return f"{answer.text} ({answer.note})" if answer.note else answer.text


def _picture(state: RunState, query: Query) -> str:
    """The picture; a warning where it is gone since it was evaluated, which is no reason to lose the run."""
    try:
        return picture_uri(query.picture)
    except TaskError as error:
        state.warnings.append(f"the report lacks a picture: {error.one_line()}")
        return ""


def drop_gates(state: RunState, metric: str, parts: Sequence[PartDrop]) -> list[Gate]:
    """The gate on the drop, where the recipe has one; of several tasks each may have its own."""
    limit = state.recipe.budgets.drop
    if limit is None or not state.recipe.verify.max_drop_gate:
        return []
    gates = []
    for part in parts:
        bound, of_task = limit.resolve(part.original_points), f" ({part.name})" if part.name else ""
        name = f"drop of {metric} on the test split, in points{of_task}"
        gates.append(Gate(name, part.drop_points <= bound, part.drop_points, bound))
    return gates
