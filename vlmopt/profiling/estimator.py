"""The interface of importance estimators, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Workload
from vlmopt.graph.branches import Branch, find_branches


@dataclass(frozen=True)
class Unit:
    """What is scored: one branch, or all branches of a layer."""

    component: str
    name: str
    is_layer: bool
    branches: tuple[str, ...]

    @property
    def site(self) -> str:
        return f"{self.component}/{self.name}"

    @property
    def sites(self) -> frozenset[str]:
        """Its branches as `component/branch`."""
        return frozenset(f"{self.component}/{branch}" for branch in self.branches)


@dataclass(frozen=True)
class Score:
    """Mean and standard error over items. Higher means: needed more.

    `drop_points` is the drop of the task's metric on the same items, where the estimator measures it.
    """

    unit: Unit
    mean: float
    standard_error: float
    drop_points: float | None = None
    drop_error: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Branches (`component/branch`) that were skipped, and the loss without them on one batch."""

    skipped: frozenset[str]
    loss: float
    batch: int


@dataclass(frozen=True)
class Interaction:
    """What two arms (`component/name`) cost together beyond the sum of both."""

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class Stability:
    """For every unit (`component/name`) the 5 % and 95 % quantile of its rank over resamples of the items, and the
    Spearman correlation of the branches' scores with those under a disturbance."""

    n_resamples: int
    ranks: Mapping[str, tuple[float, float]]
    agreement: Mapping[str, float | None]


@dataclass(frozen=True)
class Estimate:
    """All scores of a program; `forward_passes` is the cost in full passes over one sample, `precision` that of the
    products where it is not the program's own.
    """

    scores: tuple[Score, ...]
    reference_loss: float
    forward_passes: float
    interactions: tuple[Interaction, ...] = ()
    subsets: tuple[Evaluation, ...] = ()
    stability: Stability | None = None
    precision: str | None = None


def renamed(estimate: Estimate, name: Callable[[str], str]) -> Estimate:
    """The same with other names `component/name` of units."""

    def unit(one: Unit) -> Unit:
        component, _, own = name(one.site).partition("/")
        return replace(one, component=component, name=own)

    stability = estimate.stability
    if stability is not None:
        stability = replace(stability, ranks={name(site): ranks for site, ranks in stability.ranks.items()})
    return replace(
        estimate,
        scores=tuple(replace(score, unit=unit(score.unit)) for score in estimate.scores),
        interactions=tuple(replace(p, first=name(p.first), second=name(p.second)) for p in estimate.interactions),
        subsets=tuple(replace(entry, skipped=frozenset(map(name, entry.skipped))) for entry in estimate.subsets),
        stability=stability,
    )


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


def program_units(program: Program, workload: Workload, *, with_layers: bool) -> list[Unit]:
    """The units of every component that the workload runs."""
    units: list[Unit] = []
    for name, component in program.components.items():
        if name in workload.feeds:
            units += units_of(name, find_branches(component.graph), with_layers=with_layers)
    return units


def refuse_not_finite(values: Tensor, *, place: str, skipped: Iterable[str]) -> None:
    """Makes sure that a measured tensor holds numbers.

    Raises:
        ProfileError: it does not; names the place and what was skipped.
    """
    if bool(torch.isfinite(values).all()):
        return
    names = ", ".join(sorted(skipped))
    whose = f"without {names}" if names else "of the whole model"
    raise ProfileError(
        place,
        f"values {whose} are not finite numbers",
        remedy="profile in float32, and look at the data of this batch" if names else "check the model and its dtype",
    )
