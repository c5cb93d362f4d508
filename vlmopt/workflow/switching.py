"""Adapters of an artifact: their files, and which of them can take each other's place in its graphs.

The graphs hold the base once, and one adapter whose weights lie in data files under their own names. ONNX Runtime puts
the numbers of another file there when a graph is opened, so artifacts that differ in the adapter are one folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vlmopt.core.adapter_file import NONE, SUFFIX
from vlmopt.core.errors import PassError
from vlmopt.core.manifest import AdapterItem
from vlmopt.graph.replay import run_outputs
from vlmopt.rundir import ADAPTERS_FOLDER, atomic_write
from vlmopt.verify.parity import Gate, Recorded, check_file
from vlmopt.workflow.attaching import AttachedAdapter, is_whole, with_tensors, without_adapter
from vlmopt.workflow.run_state import RunState


@dataclass(frozen=True)
class Switchable:
    """The adapters of a run by name; `active` is the one in the graphs, `names` those that can take its place."""

    adapters: Mapping[str, AttachedAdapter] = field(default_factory=dict)
    active: str | None = None
    names: frozenset[str] = frozenset()

    @property
    def places(self) -> frozenset[str]:
        """The weights that others may take the place of, as `COMPONENT/PATH`."""
        return frozenset(key for name in self.names for key in self.adapters[name].tensors)

    def items(self) -> dict[str, AdapterItem]:
        return {
            name: AdapterItem(
                file=f"{ADAPTERS_FOLDER}/{name}{SUFFIX}",
                is_switchable=name in self.names,
                is_active=name == self.active and name in self.names,
            )
            for name in self.adapters
        }


def adapters_of(state: RunState) -> Switchable:
    """What the artifact holds: the adapters that the model was opened with, the one that was trained, and none at all.

    Raises:
        PassError: several were given, and passes have left no place where they could take turns.
    """
    opened = state.opened.adapters
    found = {one.name: one for one in (*opened, *(() if state.trained is None else (state.trained,)))}
    if not found:
        return Switchable()
    active = opened[0].name if state.trained is None else state.trained.name
    names = {name for name, one in found.items() if is_whole(state.optimized, one)}
    if len(opened) > 1 and (lost := [one.name for one in opened if one.name not in names]):
        raise PassError(
            f"adapter {lost[0]}",
            "its place is gone from the graphs, so it cannot take its turn there",
            expected="passes that leave adapters as they are, where several are given",
            remedy="leave out the passes that fold adapters, or give one adapter",
        )
    if active not in names or "onnx" not in state.recipe.emit:
        return Switchable(found, active)
    if not (opened and found[active].has_heads):  # else the heads of the model itself are gone
        found[NONE] = without_adapter(found[active], state.opened.program)
    return Switchable(found, active, frozenset(names | found.keys() & {NONE}))


def write_adapters(state: RunState, held: Switchable) -> None:
    """The files of all adapters."""
    for name, item in held.items().items():
        path = state.run.path(item.file)
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, held.adapters[name].as_bytes())


def check_switched(
    state: RunState,
    held: Switchable,
    files: Mapping[str, Mapping[str, str]],
    cases: Mapping[str, Sequence[Recorded]],
    *,
    limits: Mapping[str, float],
) -> list[Gate]:
    """Every graph with every other adapter in it against the program with that adapter."""
    gates: list[Gate] = []
    for name in sorted(held.names - {held.active}):
        tensors = held.adapters[name].tensors
        program = with_tensors(state.optimized, tensors)
        for part, component in program.components.items():
            own = weights_of_component(tensors, part)
            if own:
                wanted = [(feed, run_outputs(component, feed)) for feed, _ in cases[part]]
                file, dtype = files[part]["onnx"], component.outputs[0].dtype
                title = f"{file} with adapter {name} equals the program"
                path, limit = state.run.path(file), limits.get(part)
                gates.append(check_file(title, path, "onnx", wanted, dtype=dtype, limit=limit, weights=own))
    return gates


def weights_of_component(tensors: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """The tensors of one component by their paths in it."""
    prefix = f"{component}/"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
