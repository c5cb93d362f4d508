"""What the sites of every open step do where they stand: how far their branch is off, and what it takes then.

Sites of one step in branches of one class are applied together, to one clone, and what they save is shared out among
them: they are the same layers over other weights. That is one graph for each step and class, whatever the depth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmopt.core.budgets import Quantity
from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.core.workload import Feed
from vlmopt.devices.document import DeviceProfile
from vlmopt.emit import emit_program
from vlmopt.graph.branch_errors import branch_errors
from vlmopt.graph.branches import find_branches
from vlmopt.graph.costing import nodes_cost
from vlmopt.planning.together import Option, Role
from vlmopt.rewrite.pipeline import clone_program
from vlmopt.workflow.branch_timing import branch_classes
from vlmopt.workflow.device_predicting import predict_program
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.timing import arrays_of, time_each
from vlmopt.workflow.together.steps import OpenStep

_RUNS, _ROUNDS = 60, 12
_WHOLE = "whole"


@dataclass(frozen=True)
class _Group:
    """Sites of one step in places of one class."""

    step: OpenStep
    component: str
    sites: tuple[str, ...]
    places: tuple[str, ...]  # each once

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
        """Components with places that can be edited."""
        places = {place for option in self.options for place in option.places}
        return [name for name in self.times_us if any(place.split("/")[0] == name for place in places)]


def effects_of(
    state: RunState, program: Program, steps: Sequence[OpenStep], device: DeviceProfile | None = None
) -> Effects:
    """Measures the options of all steps.

    Args:
        device: predicts latency on that device; measured here where there is none.
    """
    wholes = {place: {**own} for place, own in _costs(program).items()}
    feeds = state.sample_feeds(program)
    options: list[Option] = []
    left_out: list[str] = []
    times_us: dict[str, float] = {}
    for name in program.components:
        groups = list(_groups(program, name, steps))
        edited = {group.name: _edited(program, group) for group in groups}
        own = {group.name: state.sample_feeds(edited[group.name])[name] for group in groups}
        programs = {_WHOLE: program, **edited}
        if device is None:
            times = _measured_us(state, name, programs, {_WHOLE: feeds[name], **own})
        else:
            times = _predicted_us(state, name, programs, device)
        times_us[name] = times[_WHOLE]
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
            shares = _shares(program, edited[group.name], group, (feeds[name], own[group.name]))
            options += _options(state, group, max(0.0, each), shares)
    return Effects(tuple(options), wholes, times_us, tuple(left_out))


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
    for step in steps:
        grouped: dict[tuple[int, ...], list[str]] = {}
        for name, site in step.sites.items():
            if site.component == component:
                key = tuple(sorted(classes.get(place, -1) for place in step.places[name]))
                grouped.setdefault(key, []).append(name)
        for sites in grouped.values():
            places = tuple(dict.fromkeys(place for name in sites for place in sorted(step.places[name])))
            yield _Group(step, component, tuple(sites), places)


def _edited(program: Program, group: _Group) -> Program:
    clone = clone_program(program)
    for name in group.sites:
        group.step.pass_.apply(clone, group.step.sites[name], group.step.context)
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


def _measured_us(
    state: RunState, component: str, programs: Mapping[str, Program], feeds: Mapping[str, Feed]
) -> dict[str, float]:
    """Microseconds of a call of the component, as it is and behind the edits of every group, at batch 1."""
    alone = {name: one.with_components({component: one.components[component]}) for name, one in programs.items()}
    with tempfile.TemporaryDirectory(prefix="vlmopt-together-") as folder:
        paths = {}
        for i, (name, one) in enumerate(alone.items()):
            own = Path(folder) / str(i)
            own.mkdir()
            files = emit_program(one, ("onnx",), own, progress=state.progress, opset=state.recipe.opset)
            paths[name] = own / files[component]["onnx"]
        arrays = {name: arrays_of(programs[name], component, feed) for name, feed in feeds.items()}
        # One thread, since differences are small; the whole with all of them says how long a call really takes.
        table = time_each(paths, arrays, progress=state.progress, runs=_RUNS, rounds=_ROUNDS, threads=1)
        whole = {_WHOLE: paths[_WHOLE]}
        real = time_each(whole, arrays, progress=state.progress, runs=_RUNS // 2, rounds=_ROUNDS)
    scale = 1e3 * real[_WHOLE].quietest_ms / table[_WHOLE].quietest_ms
    return {name: scale * latency.quietest_ms for name, latency in table.items()}


def _shares(program: Program, edited: Program, group: _Group, feeds: tuple[Feed, Feed]) -> dict[str, float]:
    """How far every place is off, as a share of what it would be off without it; all of it where it is removed."""
    if group.step.role is Role.REMOVES:
        return dict.fromkeys(group.places, 1.0)
    found = branch_errors(program.components[group.component], edited.components[group.component], [feeds])
    shares = {f"{group.component}/{name}": min(1.0, error) for name, error in found.items()}
    rest = max((shares[place] for place in group.places if place in shares), default=_REST)
    return {place: shares.get(place, rest) for place in group.places}


_REST = 1e-3  # of what lies outside of all branches: a relative error that rounding to 8 bits stays below


def _options(state: RunState, group: _Group, saved_us: float, shares: Mapping[str, float]) -> Iterator[Option]:
    """An option for every place of the group, or for every set of places that go together."""
    step, by_places = group.step, dict[frozenset[str], list[str]]()
    for name in group.sites:
        by_places.setdefault(step.places[name], []).append(name)
    most = max((score for score in state.importance.values()), default=0.0)
    for places, names in by_places.items():
        own = [step.sites[name].saving for name in names]
        needed = state.importance.get(names[0], 0.0) if step.role is Role.REMOVES else None
        loss = sum(shares[place] * state.importance.get(place, most) for place in places) if needed is None else needed
        saves = {
            "macs": float(sum(one.macs for one in own)),
            "size": float(sum(one.parameters_bytes for one in own)),
            "latency": saved_us * len(places),
        }
        edits = tuple(step.edit(name) for name in names)
        yield Option(step.pass_.name, step.role, edits, places, loss, saves)
