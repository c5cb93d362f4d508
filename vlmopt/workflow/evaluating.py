"""The metric of a model or of an artifact on a task's test split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmopt.core.errors import ArtifactError, TaskError
from vlmopt.core.manifest import MANIFEST, ComponentEntry, Manifest, read_manifest
from vlmopt.core.program import (
    AdapterSource,
    Assembly,
    Component,
    Dim,
    Generation,
    ModelSource,
    Program,
    Similarity,
    TensorSpec,
)
from vlmopt.core.progress import Progress, Silent
from vlmopt.preprocess import Preprocessor
from vlmopt.rundir import REPORT_JSON
from vlmopt.tasks.binding import TaskSource, TaskWorkload
from vlmopt.tasks.dataset import Task, load_task
from vlmopt.verify.statistics import mean_interval
from vlmopt.workflow.answering import ArtifactFiles, program_outputs
from vlmopt.workflow.opening import open_model, open_task, with_fitted_head


def evaluate(
    target: str,
    task: str,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    allow_pickle: bool = False,
    adapters: Sequence[AdapterSource] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The metric of an artifact directory or of a model, with these adapters on it, on the test split.

    A task that brings its own head has it fitted on the profile split first (at most `num_samples` of it).

    Raises:
        ArtifactError: an artifact was to be given adapters, which are put on models.
    """
    show = progress or Silent()
    if (Path(target) / MANIFEST).is_file():
        if adapters:
            found, remedy = "is an artifact, whose graphs are made", "`vlmopt run --adapter` uses another of its own"
            raise ArtifactError(target, found, expected="a model folder or hub id to put adapters on", remedy=remedy)
        return evaluate_artifact(Path(target), task, progress=show)
    opened = open_model(target, device=device, dtype=dtype, allow_pickle=allow_pickle, adapters=adapters, progress=show)
    bound = open_task(opened, task, seed=seed, progress=show)
    fit = bound.source.workload(bound.program, "profile", limit=num_samples)
    program = with_fitted_head(bound.program, fit, seed=seed, progress=show)
    workload = bound.source.open_test(program)
    outputs = program_outputs(program, workload, what="the model", progress=show)
    return _result(target, workload, outputs, seed=seed)


def evaluate_artifact(path: Path, task: str, *, progress: Progress) -> dict[str, Any]:
    """The metric of an artifact in its own runtime, beside what its report says (`recorded`)."""
    manifest = read_manifest(path)
    loaded = load_task(task)
    if manifest.task is not None and loaded.specification.kind.value != manifest.task:
        found = f"is a task of kind {loaded.specification.kind.value}"
        raise TaskError(task, found, expected=f"{manifest.task}, which the artifact was made for")
    workload, outputs = _run_artifact(path, manifest, loaded, progress)
    result = _result(str(path), workload, outputs, seed=manifest.seed)
    return {**result, "recorded": _recorded(path)}


def artifact_scores(path: Path, manifest: Manifest, task: Task, *, progress: Progress) -> NDArray[np.float64]:
    """The metric's contribution of every test item, from the artifact's files in their own runtime."""
    workload, outputs = _run_artifact(path, manifest, task, progress)
    scores: NDArray[np.float64] = workload.item_scores(outputs).numpy()
    return scores


def _run_artifact(
    path: Path, manifest: Manifest, task: Task, progress: Progress
) -> tuple[TaskWorkload, dict[str, Tensor]]:
    """The test split, and the outputs of the artifact's files on it."""
    workload = TaskSource(task, Preprocessor.load(path)).open_test(_signature_of(manifest))
    artifact = ArtifactFiles(path, manifest.components, manifest.dims, manifest.generation)
    return workload, artifact.outputs(workload, what="the artifact", progress=progress)


def _recorded(path: Path) -> float | None:
    report = path / REPORT_JSON
    if not report.is_file():
        return None  # a state that `vlmopt bisect` made for its check
    metric = json.loads(report.read_text(encoding="utf-8"))["result"]["metric"]
    return None if metric is None else float(metric["optimized"])


def _signature_of(manifest: Manifest) -> Program:
    """A program with the artifact's signature and no nodes: what a task needs to feed it and to read its outputs."""
    components = {name: _empty(name, entry) for name, entry in manifest.components.items()}
    dims = {key: Dim(key, dim.minimum, dim.maximum, dim.typical) for key, dim in manifest.dims.items()}
    similarity = manifest.similarity
    source = ModelSource(**manifest.source.model_dump())
    return Program(
        Assembly(manifest.assembly),
        components,
        dims,
        source,
        None if similarity is None else Similarity(similarity.scale, similarity.bias),
        labels=manifest.labels,
        generation=None if manifest.generation is None else Generation(**manifest.generation.model_dump()),
    )


def _empty(name: str, entry: ComponentEntry) -> Component:
    specs = [
        tuple(TensorSpec(spec.name, tuple(spec.shape), spec.dtype) for spec in side)
        for side in (entry.inputs, entry.outputs)
    ]
    graph = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    return Component(name, graph, specs[0], specs[1])


def _result(target: str, workload: TaskWorkload, outputs: dict[str, Tensor], *, seed: int) -> dict[str, Any]:
    items = workload.item_scores(outputs).numpy()
    return {
        "target": target,
        "metric": workload.metric,
        "value": float(items.mean()),
        "interval95": mean_interval(items, list(workload.item_groups), seed=seed),
        "n": workload.n_items,
        "all": workload.metrics(outputs),
    }
