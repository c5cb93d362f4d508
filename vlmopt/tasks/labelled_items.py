"""A split whose items have one label each, given by one component: what every closed answer has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from vlmopt.core.workload import Outputs
from vlmopt.tasks.answers import Answer, Query, Slice, label_answers, label_queries, label_slices
from vlmopt.tasks.feeding import Batches
from vlmopt.tasks.mislabelling import mislabelled
from vlmopt.tasks.scoring import cross_entropy, is_right, percent
from vlmopt.tasks.splits import Sample


@dataclass(eq=False)
class LabelledItems:
    """One split; every item is a row of the component, whose first output has a logit for each label."""

    fingerprint: str
    n_items: int
    feeds: Mapping[str, Batches]
    component: str
    targets: Tensor  # [n]
    labels: Sequence[str]
    samples: Sequence[Sample]
    item_groups: Sequence[str]
    metric: str = "accuracy"

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs[self.component], self.targets)

    def item_scores(self, outputs: Outputs) -> Tensor:
        return is_right(outputs[self.component], self.targets)

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        return {self.metric: percent(self.item_scores(outputs))}

    def groups(self, component: str) -> Sequence[str]:
        return self.item_groups

    def rows(self, component: str, items: Sequence[int]) -> Sequence[int]:
        return items

    def part(self, items: Sequence[int]) -> Self:
        feeds = {name: feeds.part(items) for name, feeds in self.feeds.items()}
        samples = [self.samples[item] for item in items]
        groups = [self.item_groups[item] for item in items]
        targets = self.targets[list(items)]
        return replace(self, n_items=len(items), feeds=feeds, targets=targets, samples=samples, item_groups=groups)

    def with_wrong_labels(self, share: float, *, seed: int) -> Self:
        return replace(self, targets=mislabelled(self.targets, len(self.labels), share, seed=seed))

    def queries(self) -> Sequence[Query]:
        return label_queries(self.samples)

    def answers(self, outputs: Outputs) -> Sequence[Answer]:
        return label_answers(outputs[self.component], self.targets, self.labels)

    def slices(self, outputs: Outputs) -> Sequence[Slice]:
        return label_slices(self.samples, self.item_scores(outputs))
