"""Leave-one-out: the task loss without one branch (or layer) minus the loss of the whole.

*raw*: the head stays as it is. *refit*: the head is fitted in closed form for the whole and for every cut alike, and
losses are those of items that the fit has not seen. A fixed head misleads: it punishes a change of basis as if it were
a loss of information.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed, Outputs, Workload
from vlmopt.graph.branches import find_branches
from vlmopt.graph.clusters import clustered
from vlmopt.graph.head import head_features
from vlmopt.graph.modules import output_values
from vlmopt.graph.precision import lowered_precision, measuring_precision
from vlmopt.graph.refit import fit_head, prior_weight
from vlmopt.graph.replay import Replay, run_component
from vlmopt.profiling.estimator import Checkpoint, Estimate, Score, Unit, refuse_not_finite, units_of
from vlmopt.profiling.part import WorkloadPart
from vlmopt.profiling.passes import PassCounter
from vlmopt.profiling.stability import measure_stability

_WHOLE = "whole"  # key of the run without a skip
_REFERENCE = "reference"  # key of the original's outputs, next to features


@dataclass(frozen=True)
class LeaveOneOut:
    """`is_refit` chooses between the two ways to score; without layers only branches are scored, which costs less.

    With stability the ranking is tried on resampled items, wrong labels and few items; it costs fits, no passes.
    """

    is_refit: bool = True
    with_layers: bool = True
    with_stability: bool = False
    name: str = "leave-one-out"
    unit: str = "loss"

    def estimate(
        self, program: Program, workload: Workload, *, progress: Progress, checkpoint: Checkpoint, seed: int
    ) -> Estimate:
        units = {name: self._units(program, name) for name in program.components if name in workload.feeds}
        values = {name: self._values(program, name, workload, units[name], progress, checkpoint) for name in units}
        reference = {name: value[_REFERENCE if self.is_refit else _WHOLE] for name, value in values.items()}
        run = _Run(self, program, values, reference, seed)
        scores, differences, reference_loss = list[Score](), list[Tensor](), float("nan")
        for name, own in units.items():
            outputs = run.outputs(name, workload, own, progress)
            losses = {key: workload.losses({**reference, name: value}) for key, value in outputs.items()}
            items = {key: workload.item_scores({**reference, name: value}) for key, value in outputs.items()}
            reference_loss = float(losses[_WHOLE].mean())
            for unit in own:
                refuse_not_finite(losses[_key(unit)], place=f"loss of {name}", skipped=unit.branches)
                differences.append(losses[_key(unit)] - losses[_WHOLE])
                drop = clustered(100.0 * (items[_WHOLE] - items[_key(unit)]), workload.item_groups)
                scores.append(Score(unit, *clustered(differences[-1], workload.item_groups), *drop))
        stability = None
        if self.with_stability and scores:
            with progress.stage("stability"):
                again = partial(run.branch_scores, progress=progress)
                everything = [score.unit for score in scores]
                stability = measure_stability(
                    everything, torch.stack(differences), workload, reference, again, seed=seed
                )
        passes = self._passes(program, workload, units)
        precision = lowered_precision(program.components[name] for name in units)
        return Estimate(tuple(scores), reference_loss, passes, stability=stability, precision=precision)

    def _units(self, program: Program, name: str) -> list[Unit]:
        return units_of(name, find_branches(program.components[name].graph), with_layers=self.with_layers)

    def _replay(self, program: Program, name: str) -> Replay:
        component = program.components[name]
        target = output_values(component.graph)[0]
        if self.is_refit:
            target = head_features(component, program.heads.get(name))
        return Replay(component, find_branches(component.graph), target, precision=measuring_precision(component))

    def _passes(self, program: Program, workload: Workload, units: Mapping[str, Sequence[Unit]]) -> float:
        """The reference, the whole and every unit, by what each of them computes."""
        counter, total = PassCounter(program, workload.feeds), 0.0
        for name, own in units.items():
            subsets = [frozenset[str](), *(frozenset(unit.branches) for unit in own)]
            each = counter.replay(self._replay(program, name), subsets)
            if self.is_refit:
                each += counter.whole(name)
            total += len(workload.groups(name)) * each
        return total

    def _values(
        self,
        program: Program,
        name: str,
        workload: Workload,
        units: list[Unit],
        progress: Progress,
        checkpoint: Checkpoint,
    ) -> dict[str, Tensor]:
        """For the whole and for every unit left out the features (refit) or outputs (raw), over all batches.

        With features the original's outputs come along, which a head may have to reproduce.
        """
        replay = self._replay(program, name)
        subsets = [frozenset[str](), *(frozenset(unit.branches) for unit in units)]
        keys = [_WHOLE, *(_key(unit) for unit in units)]
        feeds = workload.feeds[name]
        parts: list[dict[str, Tensor]] = []
        for i, feed in enumerate(progress.track(feeds, f"leave-one-out {name}", total=len(feeds))):
            found = checkpoint(f"{name}-{i:05d}", partial(self._batch, replay, keys, subsets, feed))
            for key, skipped in zip(keys, subsets, strict=True):
                refuse_not_finite(found[key], place=f"{name}, batch {i}", skipped=skipped)
            parts.append(found)
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} if parts else {}

    def _batch(
        self, replay: Replay, keys: Sequence[str], subsets: Sequence[frozenset[str]], feed: Feed
    ) -> dict[str, Tensor]:
        found = dict(zip(keys, replay.variants(feed, subsets), strict=True))
        if self.is_refit:
            found[_REFERENCE] = run_component(replay.component, [feed])
        return found


@dataclass(frozen=True)
class _Run:
    """What was measured, ready to be judged on the workload or on a disturbed one."""

    settings: LeaveOneOut
    program: Program
    values: Mapping[str, Mapping[str, Tensor]]
    reference: Outputs
    seed: int

    def outputs(self, name: str, workload: Workload, units: Sequence[Unit], progress: Progress) -> dict[str, Tensor]:
        """The component's outputs for the whole and for every unit left out, the head fitted on the workload."""
        keys = [_WHOLE, *(_key(unit) for unit in units)]
        if not self.settings.is_refit:
            return {key: self._rows(name, workload, self.values[name][key]) for key in keys}
        reference = {other: self._rows(other, workload, value) for other, value in self.reference.items()}
        prior, made = prior_weight(self.program, name), dict[str, Tensor]()
        for key in progress.track(keys, f"fitting heads of {name}", total=len(keys)):
            value = self._rows(name, workload, self.values[name][key])
            fit = fit_head(name, value, workload, reference, prior=prior, seed=self.seed)
            made[key] = value if fit is None else fit.held_out
        return made

    def branch_scores(self, workload: Workload, branches: Sequence[Unit], *, progress: Progress) -> list[float]:
        """The scores that a profile of this workload would hold."""
        found: dict[str, float] = {}
        reference = {name: self._rows(name, workload, value) for name, value in self.reference.items()}
        for name in self.values:
            own = [unit for unit in branches if unit.component == name]
            outputs = self.outputs(name, workload, own, progress)
            means = {key: float(workload.losses({**reference, name: value}).mean()) for key, value in outputs.items()}
            found |= {unit.site: means[_key(unit)] - means[_WHOLE] for unit in own}
        return [found[unit.site] for unit in branches]

    def _rows(self, name: str, workload: Workload, value: Tensor) -> Tensor:
        return value[workload.rows[name]] if isinstance(workload, WorkloadPart) else value


def _key(unit: Unit) -> str:
    return ("layer:" if unit.is_layer else "branch:") + unit.name
