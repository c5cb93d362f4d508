"""What a run measured at great cost, kept for the next try under a digest of all that it depends on.

The digest of a choice holds the program that it was made for, down to its weights, so it stays valid whatever happens
to later steps of the recipe, and is never taken for another program. Adapters are the exception: a plan under budgets
of resources counts what later steps insert.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vlmopt import __version__
from vlmopt.core.contract import Plan
from vlmopt.core.errors import ProfileError
from vlmopt.core.machine import versions
from vlmopt.core.manifest import sha256_of
from vlmopt.core.program import Program
from vlmopt.planning.cuts import Choice
from vlmopt.profiling.document import Profile, read_profile
from vlmopt.rewrite.invariants import checksum
from vlmopt.rewrite.pipeline import program_text
from vlmopt.rundir import CHOICE_WORK, PROFILE_WORK, RunDirectory, atomic_write, write_json
from vlmopt.workflow.opening import OpenedTask
from vlmopt.workflow.profiling import digest
from vlmopt.workflow.run_state import RunState, later_steps

_PROFILE = "profile.json"
_KEY_LENGTH = 16


@dataclass(frozen=True)
class MeasuredChoice:
    """A choice, the number of items that it was measured on, and the drop in points that it was allowed."""

    choice: Choice
    n_items: int
    max_drop_points: float | None = None


def profile_folder(state: RunState, bound: OpenedTask, workload: str, *, with_layers: bool) -> Path:
    """Where the profile of this run is measured; profiles of other models, tasks or settings are removed.

    Args:
        workload: fingerprint of the samples that are measured on.
    """
    recipe = state.recipe
    settings = recipe.profile.model_dump(exclude={"file"})
    fitted = None if state.fit is None else state.fit.fingerprint
    key = _key([*_surroundings(state, bound), settings, with_layers, workload, fitted])
    folder = state.run.work(PROFILE_WORK)
    for other in folder.iterdir():
        if other.name != key:
            shutil.rmtree(other)
    return state.run.work(f"{PROFILE_WORK}/{key}")


def kept_profile(folder: Path) -> Profile | None:
    """The profile that an earlier try finished in this folder."""
    with suppress(ProfileError):
        return read_profile(folder / _PROFILE)
    return None


def keep_profile(folder: Path, profile: Profile) -> None:
    """Keeps a finished profile for the next try."""
    atomic_write(folder / _PROFILE, profile.to_json())


def choice_key(state: RunState, bound: OpenedTask, program: Program, plan: Plan, *, workloads: list[str]) -> str:
    """A digest of all that a choice depends on: program, candidates, importance, data, budget, adapters and settings.

    Args:
        workloads: fingerprints of the samples that cuts are measured on.
    """
    sites = [[site.name, site.component, site.target, site.saving.as_dict()] for site in plan.sites]
    importance = {site.name: state.importance.get(site.name) for site in plan.sites}
    programs = [program_text(program), _weights(program), program_text(state.reference), _weights(state.reference)]
    budgets = [state.recipe.budgets.model_dump(mode="json"), state.headroom]
    if state.recipe.budgets.limits.resources:  # a plan is then checked as later adapters and files would have it
        budgets += [[[step.name, step.options] for step in later_steps(state)], state.recipe.opset]
    learned = [] if state.profile is None else [_costs_and_interactions(state.profile)]
    return _key([*_surroundings(state, bound), budgets, *workloads, sites, importance, *learned, *programs])


def _costs_and_interactions(profile: Profile) -> list[Any]:
    """What the planner takes from a profile beside the scores."""
    times = {f"{score.component}/{score.name}": score.latency_us for score in profile.scores}
    pairs = [[one.first, one.second, one.score] for one in profile.interactions]
    return [times, [total.model_dump(mode="json") for total in profile.totals], pairs]


def tuning_key(state: RunState, bound: OpenedTask, program: Program, *, workloads: list[str]) -> str:
    """A digest of all that a training depends on: the program before it, the original, data and settings."""
    programs = [program_text(program), _weights(program), program_text(state.reference), _weights(state.reference)]
    settings = state.recipe.recovery.model_dump(mode="json")
    return _key([*_surroundings(state, bound), settings, *workloads, *programs])


def kept_choice(run: RunDirectory, key: str) -> MeasuredChoice | None:
    """The choice that an earlier try made under this key."""
    with suppress(FileNotFoundError, json.JSONDecodeError, ValidationError):
        content = json.loads((run.work(CHOICE_WORK) / f"{key}.json").read_text(encoding="utf-8"))
        return TypeAdapter(MeasuredChoice).validate_python(content)
    return None


def keep_choice(run: RunDirectory, key: str, measured: MeasuredChoice) -> None:
    """Keeps a choice for the next try."""
    write_json(run.work(CHOICE_WORK) / f"{key}.json", asdict(measured))


def _surroundings(state: RunState, bound: OpenedTask) -> list[Any]:
    """Versions, model, preprocessing, task and the settings that every number depends on."""
    recipe, task = state.recipe, bound.task
    preprocessing = [[file.name, sha256_of(file)] for file in state.opened.preprocessor.files]
    model = [state.original.source.fingerprint, preprocessing, recipe.device, recipe.dtype]
    data = [task.specification.model_dump(mode="json"), task.fingerprint, recipe.seed, recipe.num_samples]
    return [__version__, versions(), *model, *data]


def _weights(program: Program) -> list[list[Any]]:
    return [
        [name, path, list(tensor.shape), str(tensor.dtype), checksum(tensor)]
        for name, component in program.components.items()
        for path, tensor in [*component.graph.named_parameters(), *component.graph.named_buffers()]
    ]


def _key(values: list[Any]) -> str:
    return digest(values)[:_KEY_LENGTH]
