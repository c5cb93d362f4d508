"""The interface of importance estimators, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Workload
from vlmopt.graph.branches import Branch


@dataclass(frozen=True)
class Unit:
    """What is scored: one branch, or all branches of a layer."""

    component: str
    name: str
    is_layer: bool
    branches: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """Mean and standard error over items. Higher means: needed more."""

    unit: Unit
    mean: float
    standard_error: float


@dataclass(frozen=True)
class Estimate:
    """All scores of a program; `forward_passes` is the cost in full passes over one sample."""

    scores: tuple[Score, ...]
    reference_loss: float
    forward_passes: float


# Hands back what an earlier, interrupted run computed under this key, or computes it and keeps it.
Checkpoint = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


def no_checkpoint(key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    return compute()


class Estimator(Protocol):
    """Gives every branch and layer of a program a score on a workload."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str:
        """Of the scores."""
        ...

    def estimate(
        self, program: Program, workload: Workload, *, progress: Progress, checkpoint: Checkpoint, seed: int
    ) -> Estimate: ...


def units_of(component: str, branches: Sequence[Branch], *, with_layers: bool = True) -> list[Unit]:
    """Every branch, then every layer of more than one branch."""
    units = [Unit(component, branch.name, False, (branch.name,)) for branch in branches]
    layers = {branch.layer for branch in branches} if with_layers else set[int]()
    for layer in sorted(layers):
        members = [branch for branch in branches if branch.layer == layer]
        if len(members) > 1:
            units.append(Unit(component, members[0].layer_name, True, tuple(b.name for b in members)))
    return units
