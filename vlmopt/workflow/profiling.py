"""Measures the importance of every branch and layer of a model for a task, and writes the profile."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from vlmopt import __version__
from vlmopt.core.errors import TaskError
from vlmopt.core.estimators import DEFAULT_SAMPLE, DEFAULT_UPDATES
from vlmopt.core.machine import versions
from vlmopt.core.program import AdapterSource, Program
from vlmopt.core.progress import Progress, Silent
from vlmopt.graph.branches import find_branches
from vlmopt.graph.costing import component_cost, nodes_cost
from vlmopt.graph.joined import joined
from vlmopt.profiling.document import (
    Profile,
    ProfileCost,
    ProfiledInteraction,
    ProfiledModel,
    ProfiledScore,
    ProfiledSubset,
    ProfiledTask,
    ProfiledTotal,
    ProfileStability,
    profile_as_dict,
)
from vlmopt.profiling.estimator import Checkpoint, Estimator, Score, Stability, renamed
from vlmopt.profiling.selection import make_estimator, scoring_of
from vlmopt.recipe.schema import ProfileSettings
from vlmopt.rundir import RunFile, atomic_write
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.tasks.dataset import Task
from vlmopt.workflow.branch_timing import error_lines, time_branches, with_latency
from vlmopt.workflow.opening import open_model, open_task, with_fitted_head
from vlmopt.workflow.samples import sample_feeds


def estimator_of(settings: ProfileSettings, *, with_layers: bool) -> Estimator:
    """The estimator that a recipe asks for."""
    return make_estimator(
        settings.estimator,
        settings.scoring,
        with_layers=with_layers,
        n_updates=settings.n_updates,
        subset_size=settings.subset_size,
        arms=settings.arms,
        sample_size=settings.sample_size,
        with_stability=settings.stability,
    )


def profile_model(
    model: str,
    task: str,
    output: Path,
    *,
    estimator: str = "leave-one-out",
    scoring: str = "refit",
    num_samples: int = 512,
    n_updates: int = DEFAULT_UPDATES,
    subset_size: int | None = None,
    arms: str = "branch",
    sample_size: int = DEFAULT_SAMPLE,
    stability: bool | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    allow_pickle: bool = False,
    latency: bool = False,
    adapters: Sequence[AdapterSource] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Profiles a model on the task's profile split and writes the file; a killed run continues where it stopped.

    Args:
        adapters: put on the model first.
        latency: measure what every branch costs in ONNX Runtime, too.
    """
    show = progress or Silent()
    # Stability is computed from what the checkpoint holds, so asking for it does not measure anything again.
    settings = [estimator, scoring, num_samples, n_updates, subset_size, arms, sample_size, seed, device, dtype]
    chosen = make_estimator(
        estimator,
        scoring,
        n_updates=n_updates,
        subset_size=subset_size,
        arms=arms,
        sample_size=sample_size,
        with_stability=stability,
    )
    on_it = [[one.name, str(Path(one.path).resolve()), one.weight] for one in adapters]
    key = digest([str(Path(model).resolve()), str(Path(task).resolve()), on_it, *settings, __version__])
    with RunFile(output, key=key, force=force) as run:
        opened = open_model(
            model, device=device, dtype=dtype, allow_pickle=allow_pickle, adapters=adapters, progress=show
        )
        bound = open_task(opened, task, seed=seed, progress=show)
        workload = bound.source.workload(bound.program, "profile", limit=num_samples)
        program = with_fitted_head(bound.program, workload, seed=seed, progress=show)
        fresh = f"{opened.program.source.fingerprint[:16]}-{workload.fingerprint[:16]}"
        profile = measure_profile(
            program,
            bound.task,
            workload,
            chosen,
            scoring=scoring,
            seed=seed,
            dtype=dtype,
            checkpoint=checkpoint_in(run.work(f"10-profile/{fresh}")),
            progress=show,
        )
        if latency:
            with show.stage("branch times"):
                times = time_branches(program, sample_feeds(program, workload, seed=seed), progress=show)
            for line in error_lines(times):
                show.message(f"branch times: {line}")
            profile = with_latency(profile, program, times)
        run.publish(profile.to_json())
    return profile_as_dict(profile)


def measure_profile(
    program: Program,
    task: Task,
    workload: TaskWorkload,
    estimator: Estimator,
    *,
    scoring: str,
    seed: int,
    dtype: str,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Profile:
    """The profile of a bound program, its heads fitted, on a workload.

    Raises:
        TaskError: all items have one answer, so that any model is right about them.
        ProfileError: a loss or a value is no finite number.
    """
    _refuse_one_answer(task, workload)
    start = time.perf_counter()
    with progress.stage("profile"):
        whole = joined(program)
        estimate = estimator.estimate(whole.program, workload, progress=progress, checkpoint=checkpoint, seed=seed)
        estimate = renamed(estimate, whole.own_site)
    source = program.source
    return Profile(
        vlmopt=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=ProfiledModel(
            path=source.path,
            model_type=source.model_type,
            architecture=source.architecture,
            fingerprint=source.fingerprint,
        ),
        task=ProfiledTask(
            name=task.specification.name,
            kind=task.specification.kind.value,
            fingerprint=workload.fingerprint,
            n_items=workload.n_items,
        ),
        estimator=estimator.name,
        scoring=scoring_of(estimator.name, scoring),
        unit=estimator.unit,
        seed=seed,
        dtype=dtype,
        measured_in=estimate.precision,
        versions=versions(),
        cost=ProfileCost(forward_passes=estimate.forward_passes, seconds=round(time.perf_counter() - start, 2)),
        reference_loss=None if math.isnan(estimate.reference_loss) else estimate.reference_loss,
        scores=tuple(_row(program, score) for score in estimate.scores),
        interactions=tuple(
            ProfiledInteraction(first=pair.first, second=pair.second, score=pair.score)
            for pair in estimate.interactions
        ),
        subsets=tuple(
            ProfiledSubset(skipped=tuple(sorted(entry.skipped)), loss=entry.loss, batch=entry.batch)
            for entry in estimate.subsets
        ),
        totals=tuple(_total(program, name) for name in program.components),
        stability=None if estimate.stability is None else _stability(estimate.stability),
    )


def _refuse_one_answer(task: Task, workload: TaskWorkload) -> None:
    answers = {query.expected for query in workload.queries()}
    if len(answers) == 1:
        raise TaskError(
            str(task.path),
            f"all {workload.n_items} items of the profile split have one answer ({answers.pop()!r})",
            expected="items of two classes or more",
            remedy="profile on more samples, or correct the labels",
        )


def _total(program: Program, name: str) -> ProfiledTotal:
    cost = component_cost(program.components[name], program.dims)
    return ProfiledTotal(component=name, params=cost.parameters, params_bytes=cost.parameters_bytes, macs=cost.macs)


def _stability(found: Stability) -> ProfileStability:
    return ProfileStability(n_resamples=found.n_resamples, ranks=dict(found.ranks), agreement=dict(found.agreement))


def _row(program: Program, score: Score) -> ProfiledScore:
    component = program.components[score.unit.component]
    branches = {branch.name: branch for branch in find_branches(component.graph)}
    members = [branches[name] for name in score.unit.branches]
    nodes = dict.fromkeys(node for branch in members for node in branch.region)
    cost = nodes_cost(component, nodes, program.dims)
    return ProfiledScore(
        component=score.unit.component,
        name=score.unit.name,
        scope="layer" if score.unit.is_layer else "branch",
        kind="layer" if score.unit.is_layer else members[0].kind.value,
        layer=members[0].layer,
        branches=score.unit.branches,
        params=cost.parameters,
        macs=cost.macs,
        score=score.mean,
        stderr=_number(score.standard_error),
        drop_points=_number(score.drop_points),
        drop_stderr=_number(score.drop_error),
    )


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def checkpoint_in(folder: Path) -> Checkpoint:
    """Keeps every batch's values in a file of its own, so that a killed run loses one batch at most."""

    def checkpoint(key: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        path = folder / f"{key}.safetensors"
        with suppress(SafetensorError, FileNotFoundError):  # a file torn by a crash is computed again
            return load_file(path)
        values = {name: value.contiguous() for name, value in compute().items()}
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, save({name: value.clone() for name, value in values.items()}))
        return values

    return checkpoint


def digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
