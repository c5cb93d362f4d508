"""What every benchmark of cuts shares: the pipeline's own steps with named branches, and a profile that is kept."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmopt.core.ledger import Ledger
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.planning.cuts import Candidate, fits, without_overlaps
from vlmopt.profiling.document import Profile, profile_as_dict, read_profile
from vlmopt.profiling.selection import make_estimator
from vlmopt.recipe.schema import Recipe
from vlmopt.rundir import RunDirectory
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.workflow.opening import LazyOutputs, OpenedModel, OpenedTask
from vlmopt.workflow.optimizing import load_passes
from vlmopt.workflow.profiling import checkpoint_in, measure_profile
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.stepping import run_passes

SEED = 0
ADAPTERS = {"insert-skip-adapter": {"rank": 64, "per": "run"}}  # what follows a cut at the level `adapters`


def state_of(recipe: Recipe, folder: Path, opened: OpenedModel, bound: OpenedTask) -> RunState:
    return RunState(recipe, RunDirectory(folder, key=""), opened, bound, Ledger(), Silent())


def recovered(
    state: RunState, original: Program, outputs: dict[tuple[int, str], LazyOutputs] | None = None
) -> RunState:
    """The state behind the passes of its recipe and what follows them.

    Args:
        outputs: those of the original on workloads, as far as they are known.
    """
    assert state.bound is not None
    state.fit = state.bound.source.workload(state.bound.program, "profile", limit=state.recipe.num_samples)
    state.original = original
    if outputs is not None:
        state.known_outputs = outputs
    with state.run:
        run_passes(state, load_passes(state.recipe))
    return state


def steps_of(cut: Collection[str], level: str) -> list[dict[str, Any]]:
    """The passes of a recipe that cuts these branches and recovers at this level."""
    cutting = [{"skip-branches": {"branches": list(cut)}}]
    return [*cutting, ADAPTERS] if level == "adapters" else cutting


def kept_profile(
    bound: OpenedTask, original: Program, workload: TaskWorkload, file: Path, folder: Path, *, scoring: str
) -> Profile:
    """Leave-one-out on these items: that of an earlier run, or measured now and written to the file."""
    if file.is_file() and (known := read_profile(file)).task.fingerprint == workload.fingerprint:
        return known
    profile = measure_profile(
        original,
        bound.task,
        workload,
        make_estimator("leave-one-out", scoring, with_layers=False, with_stability=False),
        scoring=scoring,
        seed=SEED,
        dtype="float32",
        checkpoint=checkpoint_in(folder / "batches"),
        progress=Silent(),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(profile_as_dict(profile)), encoding="utf-8")
    return profile


def first_that_fit(ranked: Sequence[Candidate], needs: Mapping[str, float]) -> tuple[str, ...]:
    """Names of the first candidates of the order, as few as save what is needed."""
    prefixes = (without_overlaps(ranked[:n]) for n in range(1, len(ranked) + 1))
    return tuple(candidate.name for candidate in next(cut for cut in prefixes if fits(cut, needs)))
