"""What every branch costs in ONNX Runtime: the component with and without branches of one class, in turns.

Branches of one kind, size and computation are one class: they are the same layers over other weights, and one time
tells all. The whole class is left out at once and the difference shared out, since a single branch of a large model
takes less than the clock's noise. Shares are measured on one thread and scaled to the whole on all. That times add up
is a model, so one mixed cut is measured too and the error of the sum is told.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed
from vlmopt.emit import DEFAULT_OPSET, emit_program
from vlmopt.graph.branches import Branch, find_branches
from vlmopt.graph.costing import component_cost, nodes_cost
from vlmopt.graph.regions import is_read_behind
from vlmopt.profiling.document import Profile, ProfiledTotal
from vlmopt.workflow.cutting import cut_program
from vlmopt.workflow.samples import single
from vlmopt.workflow.timing import time_sessions

# Differences are small, so the graphs take turns often: whatever else the machine does then slows all of them alike.
RUNS, ROUNDS = 96, 12
_WHOLE, _MIXED = "whole", "a mixed cut"


@dataclass(frozen=True)
class ComponentTimes:
    """Microseconds of a call at batch 1: of the whole, of every branch, of a mixed cut as added up and as measured."""

    whole_us: float
    branches_us: Mapping[str, float]
    mixed_predicted_us: float | None = None
    mixed_measured_us: float | None = None

    @property
    def error(self) -> float | None:
        """Of the sum against the mixed cut, as a share of the measured time."""
        if self.mixed_predicted_us is None or not self.mixed_measured_us:
            return None
        return self.mixed_predicted_us / self.mixed_measured_us - 1.0


def time_branches(
    program: Program, feeds: Mapping[str, Feed], *, progress: Progress, opset: int = DEFAULT_OPSET, runs: int = RUNS
) -> dict[str, ComponentTimes]:
    """Times of every component and of each of its branches that can be skipped.

    Args:
        feeds: one sample a component is taken of them.
    """
    return {
        name: _time_component(program, name, feeds[name], opset=opset, progress=progress, runs=runs)
        for name in program.components
    }


def _time_component(
    program: Program, name: str, feed: Feed, *, opset: int, progress: Progress, runs: int
) -> ComponentTimes:
    classes = branch_classes(program, name)
    mixed = _mixed(classes)
    variants: dict[str, Sequence[str]] = {_WHOLE: ()}
    variants |= {f"without class {i}": members for i, members in enumerate(classes)}
    if mixed:
        variants[_MIXED] = mixed
    alone = program.with_components({name: program.components[name]})
    with tempfile.TemporaryDirectory(prefix="vlmopt-times-") as folder:
        paths = {}
        for i, (variant, skipped) in enumerate(variants.items()):
            place = Path(folder) / str(i)
            place.mkdir()
            files = emit_program(cut_program(alone, {name: skipped}), ("onnx",), place, progress=progress, opset=opset)
            paths[variant] = place / files[name]["onnx"]
        one = {key: value.numpy() for key, value in single(program.components[name], feed).items()}
        # One thread: threads that wait for each other make a small graph as slow as the busiest core, and times to be
        # added up must not be. The whole with all threads then says how long an artifact really takes.
        table = time_sessions(paths, one, progress=progress, runs=runs, rounds=ROUNDS, threads=1)
        real = time_sessions({_WHOLE: paths[_WHOLE]}, one, progress=progress, runs=runs // 2, rounds=ROUNDS)
    quietest = {variant: 1e3 * latency.quietest_ms for variant, latency in table.items()}
    scale = 1e3 * real[_WHOLE].quietest_ms / quietest[_WHOLE]
    times: dict[str, float] = {}
    for i, members in enumerate(classes):
        # Above zero: to skip a branch never costs time, so a difference below it is noise.
        each = max(0.0, quietest[_WHOLE] - quietest[f"without class {i}"]) / len(members)
        times.update(dict.fromkeys(members, scale * each))
    whole = scale * quietest[_WHOLE]
    if not mixed:
        return ComponentTimes(whole, times)
    predicted = whole - sum(times[branch] for branch in mixed)
    return ComponentTimes(whole, times, predicted, scale * quietest[_MIXED])


def branch_classes(program: Program, name: str) -> list[list[str]]:
    """Branches that can be skipped, by kind and cost."""
    component = program.components[name]
    classes: dict[tuple[object, ...], list[str]] = {}
    for branch in _skippable(program, name):
        cost = nodes_cost(component, branch.region, program.dims)
        classes.setdefault((branch.kind, cost.parameters, cost.macs), []).append(branch.name)
    return list(classes.values())


def _skippable(program: Program, name: str) -> list[Branch]:
    component = program.components[name]
    return [branch for branch in find_branches(component.graph) if not is_read_behind(component, branch)]


def _mixed(classes: Sequence[Sequence[str]]) -> list[str]:
    """Every second branch of every class: a cut that no class was timed by."""
    mixed = [branch for members in classes for branch in members[::2]]
    return mixed if any(len(members) > 1 for members in classes) or len(classes) > 1 else []


def with_latency(profile: Profile, program: Program, times: Mapping[str, ComponentTimes]) -> Profile:
    """The profile with measured times: of branches, of layers as sums of their branches, and of the totals."""
    scores = []
    for score in profile.scores:
        known = times[score.component].branches_us if score.component in times else {}
        latency = sum(known[name] for name in score.branches) if all(name in known for name in score.branches) else None
        scores.append(score.model_copy(update={"latency_us": latency}))
    totals = profile.totals or _totals(program)
    timed = tuple(
        total.model_copy(update={"latency_us": times[total.component].whole_us}) if total.component in times else total
        for total in totals
    )
    return profile.model_copy(update={"scores": tuple(scores), "totals": timed})


def has_times(profile: Profile) -> bool:
    """Whether the profile says how long branches take."""
    return bool(profile.totals) and all(total.latency_us is not None for total in profile.totals)


def _totals(program: Program) -> tuple[ProfiledTotal, ...]:
    costs = {name: component_cost(component, program.dims) for name, component in program.components.items()}
    return tuple(
        ProfiledTotal(component=name, params=cost.parameters, params_bytes=cost.parameters_bytes, macs=cost.macs)
        for name, cost in costs.items()
    )


def error_lines(times: Mapping[str, ComponentTimes]) -> list[str]:
    """How far the sum of times is off, a line a component where a mixed cut could be measured."""
    return [
        f"{name}: a mixed cut takes {found.mixed_measured_us:.0f} us, the sum of branch times says "
        f"{found.mixed_predicted_us:.0f} us ({100 * found.error:+.0f} %)"
        for name, found in times.items()
        if found.error is not None
    ]
