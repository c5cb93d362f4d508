"""Measures what a cut costs on the task: features behind the cut, head re-fitted in closed form, items of another split.

The reference is fitted on the same samples in the same way, and compared on the same items.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Outputs, Workload
from vlmopt.graph.branches import find_branches
from vlmopt.graph.clusters import clustered
from vlmopt.graph.head import head_features
from vlmopt.graph.refit import fit_head, prior_weight
from vlmopt.graph.replay import Replay
from vlmopt.planning.choice import Measurement


class CutMeter:
    """Drop of the metric on `check` for sets of skipped branches, heads fitted on `fit`.

    Branches are named `component/branch`. `reference_fit` and `reference_check` are the original program's outputs.
    """

    def __init__(
        self,
        program: Program,
        fit: Workload,
        check: Workload,
        reference_fit: Outputs,
        *,
        progress: Progress,
        seed: int = 0,
    ) -> None:
        self.program, self.fit, self.check = program, fit, check
        self.reference_fit, self.progress, self.seed = reference_fit, progress, seed
        self._replays = {name: _replay(program, name) for name in fit.feeds}
        self._baseline = self._outputs({})
        self._items = check.item_scores(self._baseline)

    def measure(self, branches: frozenset[str]) -> Measurement:
        """The drop in points, with its standard error over groups of items."""
        skips: dict[str, set[str]] = {}
        for name in branches:
            component, _, branch = name.partition("/")
            skips.setdefault(component, set()).add(branch)
        items = self.check.item_scores(self._outputs(skips))
        mean, error = clustered(100.0 * (self._items - items), self.check.item_groups)
        return Measurement(mean, error)

    def _outputs(self, skips: Mapping[str, set[str]]) -> dict[str, Tensor]:
        """Outputs of every component on `check`; those that are not cut are taken from the baseline."""
        outputs: dict[str, Tensor] = {}
        for name in self.fit.feeds:
            if skips and name not in skips:
                outputs[name] = self._baseline[name]
            else:
                outputs[name] = self._fitted(name, frozenset(skips.get(name, ())))
        return outputs

    def _fitted(self, name: str, skips: frozenset[str]) -> Tensor:
        features = self._features(name, self.fit, skips)
        prior = prior_weight(self.program, name)
        fit = fit_head(name, features, self.fit, self.reference_fit, prior=prior, seed=self.seed)
        seen = self._features(name, self.check, skips)
        return seen if fit is None else fit.outputs(seen)

    def _features(self, name: str, workload: Workload, skips: frozenset[str]) -> Tensor:
        replay, feeds = self._replays[name], workload.feeds[name]
        what = f"measuring {name} without {len(skips)} branches" if skips else f"measuring {name}"
        return torch.cat([replay.run(feed, skips) for feed in self.progress.track(feeds, what, total=len(feeds))])


def _replay(program: Program, name: str) -> Replay:
    component = program.components[name]
    return Replay(component, find_branches(component.graph), head_features(component, program.heads.get(name)))
