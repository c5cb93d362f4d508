"""What the sites of every open step do where they stand: how far their branch is off, and what it takes then.

Sites of one step in branches of one class are applied together, to one clone, and what they save is shared out among
them: they are the same layers over other weights. That is one graph for each step and class, whatever the depth.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from vlmopt.core.budgets import Quantity
from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.devices.document import DeviceProfile
from vlmopt.emit import emit_program
from vlmopt.graph.branches import find_branches
from vlmopt.graph.costing import nodes_cost
from vlmopt.planning.together import Measure, Option, Role
from vlmopt.rewrite.pipeline import clone_program
from vlmopt.workflow.branch_timing import branch_classes
from vlmopt.workflow.device_predicting import predict_program
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.timing import arrays_of, time_each
from vlmopt.workflow.together.losses import Losses
from vlmopt.workflow.together.steps import OpenStep

_RUNS, _ROUNDS = 60, 12
_WHOLE = "whole"
_OTHER, _NO_CLASS = -1, -2  # branches that cannot be skipped, and what is no branch


@dataclass(frozen=True)
class _Group:
    """Sites of one step in places of one class."""

    step: OpenStep
    component: str
    sites: tuple[str, ...]
    places: tuple[str, ...]  # each once
    key: tuple[int, ...]

    @property
    def is_outside(self) -> bool:
        """Whether its places are no branches."""
        return self.key == (_NO_CLASS,)

    @property
    def name(self) -> str:
        return f"{self.step.number} {self.step.pass_.name} {self.sites[0]}"


@dataclass(frozen=True)
class Effects:
    """Options with what they lose and save, and what every place takes as it is, by resource."""

    options: tuple[Option, ...]
    wholes: Mapping[str, Mapping[str, float]]
    times_us: Mapping[str, float]  # of every component
    left_out: tuple[str, ...]

    @property
    def planned(self) -> list[str]:
        """Components with places that can be edited, or that read less once another hands on less."""
        if any(option.role is Role.REDUCES for option in self.options):
            return list(self.times_us)
        places = {place for option in self.options for place in option.places}
        return [name for name in self.times_us if any(place.split("/")[0] == name for place in places)]


def effects_of(
    state: RunState,
    program: Program,
    steps: Sequence[OpenStep],
    measure: Measure,
    device: DeviceProfile | None = None,
) -> Effects:
    """Measures the options of all steps.

    Args:
        measure: what edits lose on the task, where they reduce what all branches read: no branch tells of that.
        device: predicts latency on that device; measured here where there is none.
    """
    wholes = {place: {**own} for place, own in _costs(program).items()}
    options: list[Option] = []
    left_out: list[str] = []
    times_us: dict[str, float] = {}
    reduced = {_reduction_name(*pair): edited(program, pair[0], [pair[1]]) for pair in _reductions(steps)}
    saved_us = dict.fromkeys(reduced, 0.0)
    for name in program.components:
        groups = list(_groups(program, name, steps))
        made = state.progress.track(groups, f"edits of {name}", total=len(groups))
        programs = {_WHOLE: program} | {one.name: edited(program, one.step, one.sites) for one in made} | reduced
        if device is None:
            times = _measured_us(state, name, programs)
        else:
            times = _predicted_us(state, name, programs, device)
        times_us[name], losses = times[_WHOLE], None
        saved_us = {key: saved + times_us[name] - times.get(key, math.inf) for key, saved in saved_us.items()}
        for group in groups:
            if group.name not in times:
                left_out.append(f"{group.step.pass_.name} in {name} needs operations that the device's profile lacks")
                continue
            each = (times[_WHOLE] - times[group.name]) / len(group.places)
            if group.step.role is Role.REMOVES:
                for place in group.places:
                    wholes.setdefault(place, {})["latency"] = max(0.0, each)
            if each <= 0 and Quantity.SIZE not in state.recipe.budgets.limits.limits:
                left_out.append(f"{group.step.pass_.name} saves no time in {len(group.places)} places of {name}")
                continue
            if losses is None:
                losses = Losses(state, program, name)
            options += _options(state, program, group, max(0.0, each) * len(group.places), losses)
    for step, site in _reductions(steps):
        saved = saved_us[_reduction_name(step, site)]
        if saved > 0 or (math.isfinite(saved) and Quantity.SIZE in state.recipe.budgets.limits.limits):
            options.append(_reduction(step, site, max(0.0, saved), measure))
        else:
            why = "saves no time" if math.isfinite(saved) else "needs operations that the device's profile lacks"
            left_out.append(f"{step.pass_.name} ({step.sites[site].summary}) {why}")
    return Effects(tuple(options), wholes, times_us, tuple(left_out))


def _reductions(steps: Sequence[OpenStep]) -> list[tuple[OpenStep, str]]:
    return [(step, site) for step in steps if step.role is Role.REDUCES for site in step.sites]


def _reduction_name(step: OpenStep, site: str) -> str:
    return f"{step.number} {step.pass_.name} {site}"


def _reduction(step: OpenStep, name: str, saved_us: float, measure: Measure) -> Option:
    """Measured whole, on the task."""
    edit, site = step.edit(name), step.sites[name]
    saves = {"macs": float(site.saving.macs), "size": float(site.saving.parameters_bytes), "latency": saved_us}
    lost = measure(frozenset({edit})).loss
    return Option(step.pass_.name, step.role, (edit,), step.places[name], lost, saves)


def _costs(program: Program) -> dict[str, dict[str, float]]:
    """MACs and bytes of every branch."""
    found = {}
    for name, component in program.components.items():
        for branch in find_branches(component.graph):
            cost = nodes_cost(component, branch.region, program.dims)
            found[f"{name}/{branch.name}"] = {"macs": float(cost.macs), "size": float(cost.parameters_bytes)}
    return found


def _groups(program: Program, component: str, steps: Sequence[OpenStep]) -> Iterator[_Group]:
    """The sites of every step in this component, by the class of the branches that they edit."""
    classes = {
        f"{component}/{branch}": i for i, members in enumerate(branch_classes(program, component)) for branch in members
    }
    branches = {f"{component}/{branch.name}" for branch in find_branches(program.components[component].graph)}
    for step in steps:
        if step.role is Role.REDUCES:
            continue
        grouped: dict[tuple[int, ...], list[str]] = {}
        for name, site in step.sites.items():
            if site.component == component:
                key = tuple(
                    sorted(
                        classes.get(place, _OTHER if place in branches else _NO_CLASS) for place in step.places[name]
                    )
                )
                grouped.setdefault(key, []).append(name)
        for key, sites in grouped.items():
            places = tuple(dict.fromkeys(place for name in sites for place in sorted(step.places[name])))
            yield _Group(step, component, tuple(sites), places, key)


def edited(program: Program, step: OpenStep, names: Collection[str]) -> Program:
    """A clone behind these sites of a step."""
    clone = clone_program(program)
    for name in names:
        step.pass_.apply(clone, step.sites[name], step.context)
    for component in clone.components.values():
        component.graph.recompile()
    return clone


def _predicted_us(
    state: RunState, component: str, programs: Mapping[str, Program], device: DeviceProfile
) -> dict[str, float]:
    """Microseconds of a call of the component on a device; programs with operations that it does not know are left out.

    Raises:
        ProfileError: the profile does not know the component as it is.
    """
    place, found = str(state.recipe.device_profile), dict[str, float]()
    for name, one in programs.items():
        try:
            found[name] = predict_program(one, device, place=place, progress=state.progress)[component].us
        except ProfileError:
            if name == _WHOLE:
                raise
    return found


def _measured_us(state: RunState, component: str, programs: Mapping[str, Program]) -> dict[str, float]:
    """Microseconds of a call of the component, as it is and behind the edits of every group, at batch 1."""
    alone = {name: one.with_components({component: one.components[component]}) for name, one in programs.items()}
    with tempfile.TemporaryDirectory(prefix="vlmopt-together-") as folder:
        paths = {}
        for i, (name, one) in enumerate(alone.items()):
            own = Path(folder) / str(i)
            own.mkdir()
            files = emit_program(one, ("onnx",), own, progress=state.progress, opset=state.recipe.opset)
            paths[name] = own / files[component]["onnx"]
        arrays = {name: arrays_of(one, component, state.sample_feeds(one)[component]) for name, one in programs.items()}
        # One thread, since differences are small; the whole with all of them says how long a call really takes.
        table = time_each(paths, arrays, progress=state.progress, runs=_RUNS, rounds=_ROUNDS, threads=1)
        whole = {_WHOLE: paths[_WHOLE]}
        real = time_each(whole, arrays, progress=state.progress, runs=_RUNS // 2, rounds=_ROUNDS)
    scale = 1e3 * real[_WHOLE].quietest_ms / table[_WHOLE].quietest_ms
    return {name: scale * latency.quietest_ms for name, latency in table.items()}


def _options(state: RunState, program: Program, group: _Group, saved_us: float, losses: Losses) -> Iterator[Option]:
    """What may be done in every place of the group: its site, or as many of its sites as one likes, the least harmful
    first."""
    step, by_places = group.step, dict[frozenset[str], list[str]]()
    for name in group.sites:
        by_places.setdefault(step.places[name], []).append(name)
    weights = {name: float(max(1, step.sites[name].saving.parameters_bytes)) for name in group.sites}
    total = sum(weights.values())
    lost = _lost(state, program, group, by_places, losses)
    for places, names in by_places.items():
        ranked = sorted((name for name in names if name in lost), key=lambda name: lost[name])
        for n in range(1, len(ranked) + 1):
            own = [step.sites[name].saving for name in ranked[:n]]
            saves = {
                "macs": float(sum(one.macs for one in own)),
                "size": float(sum(one.parameters_bytes for one in own)),
                "latency": saved_us * sum(weights[name] for name in ranked[:n]) / total,
            }
            edits = tuple(sorted(step.edit(name) for name in ranked[:n]))
            yield Option(step.pass_.name, step.role, edits, places, sum(lost[name] for name in ranked[:n]), saves)


def _lost(
    state: RunState, program: Program, group: _Group, by_places: Mapping[frozenset[str], Sequence[str]], losses: Losses
) -> dict[str, float]:
    """What every site is to lose by itself; sites whose branch is gone behind them are left out."""
    step = group.step
    if step.role is Role.REMOVES:
        return {name: state.importance.get(name, 0.0) for name in group.sites}
    if group.is_outside:
        return {name: losses.of_all(edited(program, step, [name])) for name in group.sites}
    lost: dict[str, float] = {}
    for turn in zip_longest(*by_places.values()):  # one site of every branch at a time
        names = [name for name in turn if name is not None]
        found = losses.in_branches(edited(program, step, names), {place for n in names for place in step.places[n]})
        for name in names:
            (place,) = step.places[name]
            if place in found:
                lost[name] = found[place]
    return lost
