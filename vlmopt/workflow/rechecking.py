"""`vlmopt recheck`: whether an artifact's plan still holds on data that came in since, and what would be cut today."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmopt.core.budgets import Limit, Quantity, parse_limit
from vlmopt.core.errors import ArtifactError, TaskError
from vlmopt.core.manifest import Manifest, read_manifest
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress, Silent
from vlmopt.core.workload import parts_of
from vlmopt.graph.branches import find_branches
from vlmopt.graph.regions import is_read_behind
from vlmopt.planning.solving import Problem, Site, least_loss
from vlmopt.profiling.document import Profile, diff_profiles, profile_as_dict, read_profile
from vlmopt.recipe.loading import load_recipe
from vlmopt.recipe.schema import Recipe
from vlmopt.report.schema import Report, read_report
from vlmopt.rundir import RECIPE, REPORT_JSON
from vlmopt.tasks.binding import TaskSource, TaskWorkload
from vlmopt.tasks.dataset import Task, load_task
from vlmopt.verify.statistics import paired_difference
from vlmopt.workflow.answering import program_outputs
from vlmopt.workflow.budgeting import folded_components
from vlmopt.workflow.evaluating import artifact_scores
from vlmopt.workflow.opening import OpenedModel, open_recipe, open_task, with_fitted_head
from vlmopt.workflow.profiling import estimator_of, measure_profile
from vlmopt.workflow.publishing import PROFILE


@dataclass(frozen=True)
class _Artifact:
    path: Path
    manifest: Manifest
    recipe: Recipe
    report: Report


def recheck(
    path: Path,
    task: str,
    *,
    max_drop: str | None = None,
    num_samples: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What an artifact loses on new data against the original, and what a profile of the new data would cut instead.

    The original's head is the one that the artifact was compared with when it was made: fitted on the task of its
    recipe, or, where that is gone, on the new profile split.

    Args:
        max_drop: allowed drop, as in recipes; by default the recipe's.
        num_samples: limit of the new profile split, on which importance is measured.

    Raises:
        ArtifactError: the directory is no artifact made for a task.
        TaskError: the new task is of another kind, or has labels that the artifact does not know.
    """
    show = progress or Silent()
    artifact = _open(path)
    limit = artifact.recipe.budgets.drop if max_drop is None else parse_limit(Quantity.DROP, max_drop)
    new = load_task(task)
    _refuse_other_task(artifact, new)
    recipe = artifact.recipe
    opened = open_recipe(recipe, progress=show)
    original, fitted_on = _original(opened, artifact, task, show)
    source = TaskSource(new, opened.preprocessor, seed=recipe.seed)
    replanned = _replanned(artifact, original, new, source, num_samples, show)  # before the test split is opened
    metric = _compared(artifact, original, new, source, limit, show)
    return {
        "artifact": str(path),
        "task": task,
        "holds": metric["drop_points"] <= metric["allowed_points"] if limit is not None else None,
        "metric": metric,
        "head_fitted_on": fitted_on,
        "plan": replanned,
    }


def _open(path: Path) -> _Artifact:
    manifest = read_manifest(path)
    recipe = load_recipe(path / RECIPE, {})
    if recipe.task is None or manifest.task is None:
        raise ArtifactError(str(path), "was made without a task", remedy="recheck needs an artifact made for a task")
    report = read_report(json.loads((path / REPORT_JSON).read_text(encoding="utf-8")), place=str(path / REPORT_JSON))
    return _Artifact(path, manifest, recipe, report)


def _refuse_other_task(artifact: _Artifact, task: Task) -> None:
    kind = task.specification.kind.value
    if kind != artifact.manifest.task:
        raise TaskError(str(task.path), f"is a task of kind {kind}", expected=str(artifact.manifest.task))
    unknown = sorted(set(task.labels) - set(artifact.manifest.labels)) if artifact.manifest.labels else []
    if unknown:
        found = f"has labels that the artifact does not know: {', '.join(unknown[:5])}"
        raise TaskError(str(task.path), found, remedy="compile the model for these labels with `vlmopt optimize`")


def _original(opened: OpenedModel, artifact: _Artifact, new: str, show: Progress) -> tuple[Program, str]:
    """The original with the head that it had when the artifact was made, and the task that head was fitted on."""
    recipe = artifact.recipe
    assert recipe.task is not None
    try:
        bound, name = open_task(opened, recipe.task, seed=recipe.seed, progress=show), recipe.task
    except TaskError:
        bound, name = open_task(opened, new, seed=recipe.seed, progress=show), new
    if bound.program.labels != tuple(artifact.manifest.labels):
        found = f"has other labels than the artifact: {', '.join(bound.program.labels[:5])}"
        raise TaskError(name, found, remedy="restore the task that the artifact was made from")
    fit = bound.source.workload(bound.program, "profile", limit=recipe.num_samples)
    with show.stage("original"):
        return with_fitted_head(bound.program, fit, seed=recipe.seed, progress=show), name


def _compared(
    artifact: _Artifact, original: Program, new: Task, source: TaskSource, limit: Limit | None, show: Progress
) -> dict[str, Any]:
    """Original and artifact on the new test items."""
    workload = source.open_test(original)
    outputs = program_outputs(original, workload, what="the original", progress=show)
    before = workload.item_scores(outputs).numpy()
    after = artifact_scores(artifact.path, artifact.manifest, new, progress=show)
    part, rows = _worst_part(workload, before, after, limit)
    before, after = before[rows], after[rows]
    groups = [workload.item_groups[row] for row in rows]
    found = paired_difference(before, after, groups, seed=artifact.recipe.seed)
    recorded = artifact.report.result.metric if not part else None  # the report holds the mean of all tasks
    return {
        "name": f"{workload.metric} of {part}" if part else workload.metric,
        "original": float(before.mean()),
        "artifact": float(after.mean()),
        "drop_points": found.drop_points,
        "drop_interval95": list(found.interval95),
        "p_value": found.p_value,
        "n": found.n,
        "allowed_points": None if limit is None else limit.resolve(100.0 * float(before.mean())),
        "drop_points_when_made": None if recorded is None else recorded.drop_points,
    }


def _worst_part(
    workload: TaskWorkload, before: NDArray[np.float64], after: NDArray[np.float64], limit: Limit | None
) -> tuple[str, list[int]]:
    """The task that is farthest over the bound, where each is held to it by itself, and its items; else all items."""
    rows: dict[str, list[int]] = {}
    for item, part in enumerate(parts_of(workload)):
        rows.setdefault(part, []).append(item)

    def excess(part: str) -> float:
        original, found = (100.0 * float(items[rows[part]].mean()) for items in (before, after))
        return original - found - (0.0 if limit is None else limit.resolve(original))

    worst = max(rows, key=excess)
    return worst, rows[worst]


def _replanned(
    artifact: _Artifact, original: Program, new: Task, source: TaskSource, num_samples: int | None, show: Progress
) -> dict[str, Any] | None:
    """What a cut of the same MACs would take out by the importance on the new data; None where nothing was cut."""
    cut = [f"{branch.component}/{branch.name}" for branch in artifact.report.branches if not branch.kept]
    if not cut:
        return None
    settings = artifact.recipe.profile
    limits = [n for n in (settings.num_samples, artifact.recipe.num_samples, num_samples) if n is not None]
    workload = source.workload(original, "profile", limit=min(limits))
    profile = measure_profile(
        original,
        new,
        workload,
        estimator_of(settings, with_layers=False),
        scoring=settings.scoring,
        seed=artifact.recipe.seed,
        dtype=artifact.recipe.dtype,
        checkpoint=lambda key, compute: compute(),
        progress=show,
    )
    today = _cut_of_same_macs(profile, cut, _candidates(artifact, original))
    known = artifact.path / PROFILE
    old = read_profile(known) if known.is_file() else None
    rows = _rows(profile, old, [name for name in dict.fromkeys((*cut, *today)) if (name in cut) != (name in today)])
    agreement = None if old is None else diff_profiles(profile_as_dict(old), profile_as_dict(profile))["spearman"]
    return {"n_cut": len(cut), "n_cut_today": len(today), "spearman": agreement, "differences": _marked(rows, cut)}


def _candidates(artifact: _Artifact, original: Program) -> frozenset[str]:
    """Branches that may be skipped, in components that the recipe leaves in the artifact."""
    folded = folded_components(artifact.recipe, original)
    return frozenset(
        f"{name}/{branch.name}"
        for name, component in original.components.items()
        for branch in find_branches(component.graph)
        if name not in folded and not is_read_behind(component, branch)
    )


def _cut_of_same_macs(profile: Profile, cut: Sequence[str], candidates: frozenset[str]) -> tuple[str, ...]:
    """Of the candidates the branches of least predicted loss that save as much as the cut does."""
    scores = [s for s in profile.scores if s.scope == "branch" and f"{s.component}/{s.name}" in candidates]
    names = {f"{score.component}/{score.name}": score for score in scores}
    sites = tuple(
        Site(name, score.score, {"macs": float(score.macs)}, frozenset({name})) for name, score in names.items()
    )
    need = sum(names[name].macs for name in cut if name in names)
    found = least_loss(Problem(sites), {"macs": float(need)})
    return () if found is None else found.names


def _rows(profile: Profile, old: Profile | None, names: Sequence[str]) -> list[dict[str, Any]]:
    now, before = profile.importance(), {} if old is None else old.importance()
    return [{"name": name, "score_when_made": before.get(name), "score_today": now.get(name)} for name in names]


def _marked(rows: list[dict[str, Any]], cut: Sequence[str]) -> list[dict[str, Any]]:
    return [{**row, "today": "kept" if row["name"] in cut else "cut"} for row in rows]
