"""The loss of a model without some of its branches, on one batch after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Workload
from vlmopt.graph.branches import by_component, find_branches
from vlmopt.graph.head import head_features
from vlmopt.graph.modules import output_values
from vlmopt.graph.precision import measuring_precision
from vlmopt.graph.refit import fit_head, prior_weight
from vlmopt.graph.replay import Replay, run_component
from vlmopt.profiling.estimator import refuse_not_finite
from vlmopt.profiling.part import WorkloadPart, batch_part, empty_outputs, looks_outside
from vlmopt.profiling.passes import PassCounter


class SubsetLosses:
    """Losses of sets of skipped branches (`component/branch`), each on one batch.

    *raw*: the head stays. *refit*: the head is fitted on the rows of the batch, and every row is judged by a fit that
    has not seen it. `forward_passes` counts what was computed so far.
    """

    def __init__(
        self, program: Program, workload: Workload, *, is_refit: bool, progress: Progress, seed: int = 0
    ) -> None:
        self.program, self.workload = program, workload
        self.is_refit, self.progress, self.seed = is_refit, progress, seed
        self.passes = PassCounter(program, workload.feeds)
        self.forward_passes = 0.0
        self.n_batches = max(len(feeds) for feeds in workload.feeds.values())
        self._replays = {name: self._replay(name) for name in workload.feeds}
        self._base: dict[str, Tensor] | None = None

    def _replay(self, name: str) -> Replay:
        component = self.program.components[name]
        target = output_values(component.graph)[0]
        if self.is_refit:
            target = head_features(component, self.program.heads.get(name))
        return Replay(component, find_branches(component.graph), target, precision=measuring_precision(component))

    def batches(self) -> list[int]:
        """The batches that can be measured: a head cannot be cross-fitted on items of one group.

        Raises:
            ProfileError: there are none.
        """
        every = range(self.n_batches)
        usable = [batch for batch in every if not self.is_refit or len(set(self._part(batch).item_groups)) > 1]
        if not usable:
            raise ProfileError(
                "the profile split", "has no batch with items of two groups, so no head can be judged on unseen items",
                remedy="take more samples, or scoring raw",
            )  # fmt: skip
        return usable

    def losses(self, batch: int, subsets: Sequence[frozenset[str]]) -> Tensor:
        """The mean loss of the batch's items for every subset, [n_subsets], float64.

        Raises:
            ProfileError: a loss is no finite number.
        """
        part = self._part(batch)
        plans = [by_component(subset) for subset in subsets]
        values: dict[str, list[Tensor]] = {}
        for name, replay in self._replays.items():
            skips = [plan.get(name, frozenset()) for plan in plans]
            values[name] = replay.variants(part.feeds[name][0], skips)
        found = []
        for i, subset in enumerate(subsets):
            for name, value in values.items():
                refuse_not_finite(value[i], place=f"{name}, batch {batch}", skipped=subset)
            outputs = {name: self._output(name, value[i], part) for name, value in values.items()}
            loss = part.losses(outputs).mean()
            refuse_not_finite(loss, place=f"batch {batch}", skipped=subset)
            found.append(loss.double())
        return torch.stack(found)

    def cost(self, batch: int, subsets: Sequence[frozenset[str]]) -> float:
        """What `losses` computes, in full passes of one sample."""
        plans = [by_component(subset) for subset in subsets]
        total = 0.0
        for name, replay in self._replays.items():
            n_batches, n_rows = len(self.workload.feeds[name]), len(self.workload.groups(name))
            skips = [plan.get(name, frozenset()) for plan in plans]
            total += n_rows / n_batches * self.passes.replay(replay, skips)
        return total

    def _output(self, name: str, value: Tensor, part: WorkloadPart) -> Tensor:
        if not self.is_refit:
            return value
        prior = prior_weight(self.program, name)
        fit = fit_head(name, value, part, part.reference(), prior=prior, seed=self.seed)
        return value if fit is None else fit.held_out

    def _part(self, batch: int) -> WorkloadPart:
        if self._base is not None:
            return batch_part(self.workload, self._base, batch)
        empty = None if self.is_refit else empty_outputs(self.program, self.workload)
        part = None if empty is None else batch_part(self.workload, empty, batch)
        if part is not None and not looks_outside(part):
            return part
        self._base = {name: self._whole_outputs(name) for name in self.workload.feeds}
        return batch_part(self.workload, self._base, batch)

    def _whole_outputs(self, name: str) -> Tensor:
        """The original's outputs for all rows: what the rows outside a batch keep, and what a head may reproduce."""
        feeds = self.workload.feeds[name]
        tracked = self.progress.track(feeds, f"outputs of {name}", total=len(feeds))
        self.forward_passes += len(self.workload.groups(name)) * self.passes.whole(name)
        outputs = []
        for i, feed in enumerate(tracked):
            outputs.append(run_component(self.program.components[name], [feed]))
            refuse_not_finite(outputs[-1], place=f"{name}, batch {i}", skipped=())
        return torch.cat(outputs)
