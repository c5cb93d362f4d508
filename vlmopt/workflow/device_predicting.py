"""What programs, and plans of branches to skip, take on a device that a profile tells of, without running them."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress, Silent
from vlmopt.devices.document import DeviceProfile, read_device_profile
from vlmopt.devices.operations import operations_of
from vlmopt.devices.predicting import Prediction, predict
from vlmopt.graph.branches import by_component
from vlmopt.workflow.branch_timing import branch_classes
from vlmopt.workflow.cutting import cut_program
from vlmopt.workflow.device_graphs import captured, graphs_of


def predict_program(
    program: Program, profile: DeviceProfile, *, place: str, progress: Progress
) -> dict[str, Prediction]:
    """Microseconds of a call of every component at batch 1; of a decoder also of the next token.

    Args:
        place: the profile's file, for messages.

    Raises:
        ProfileError: the profile lacks operations of the program.
    """
    with tempfile.TemporaryDirectory(prefix="vlmopt-predict-") as folder:
        found = {}
        for graph in graphs_of(program, Path(folder), progress=progress):
            operations = operations_of(graph.path, graph.feed, level=profile.runtime.graph)
            found[graph.title] = predict(operations, profile, place=place)
    return found


@dataclass(frozen=True)
class BranchCosts:
    """What a component takes whole, and what each of its branches adds, in microseconds.

    A plan is predicted from these alone. That a branch adds the same wherever it stands is a model of its own: what is
    fused across the seam of two branches is shared out among them.
    """

    whole_us: float
    branches_us: Mapping[str, float]

    def without(self, branches: Collection[str]) -> float:
        """Microseconds without these branches."""
        return self.whole_us - sum(self.branches_us[name] for name in branches)


def branch_costs(
    program: Program, component: str, profile: DeviceProfile, *, place: str, progress: Progress
) -> BranchCosts:
    """Costs of all branches that can be skipped, predicted once for each class of like ones: nothing is run."""
    alone = program.with_components({component: program.components[component]})

    def predicted(skipped: Sequence[str]) -> float:
        cut = cut_program(alone, {component: skipped})
        return predict_program(cut, profile, place=place, progress=progress)[component].us

    whole, times = predicted(()), dict[str, float]()
    for members in branch_classes(program, component):
        each = max(0.0, whole - predicted(members)) / len(members)
        times.update(dict.fromkeys(members, each))
    return BranchCosts(whole, times)


def predict_model(
    model: str,
    profile: Path,
    *,
    skipped: Sequence[str] = (),
    image_size: tuple[int, int] | None = None,
    allow_pickle: bool = False,
    allow_other_runtime: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What a model takes on the profile's device, without the branches (`component/branch`) that a plan skips.

    Raises:
        ProfileError: the profile cannot be used, or lacks operations.
        VlmoptError: a branch is not there.
    """
    show = progress or Silent()
    device = read_device_profile(profile, allow_other_runtime=allow_other_runtime)
    program = captured(model, image_size, allow_pickle, show)
    cut = by_component(skipped)
    for component, names in cut.items():
        if component not in program.components:
            raise VlmoptError("--skip", f"there is no component {component!r}", expected=", ".join(program.components))
        known = [name for members in branch_classes(program, component) for name in members]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise VlmoptError("--skip", f"{component} has no branch {unknown[0]!r} to skip", expected=", ".join(known))
    found = predict_program(cut_program(program, cut), device, place=str(profile), progress=show)
    return {
        "device": device.machine.cpu,
        "threads": device.runtime.threads,
        "components": {
            title: {"predicted_us": one.us, "sum_us": one.sum_us, "operations_us": dict(one.by_signature_us)}
            for title, one in found.items()
        },
    }
