"""Several classifications by one program: one encoder, and one head whose outputs lie side by side, a block a task.

An item is an image with the question of one task: only that task's outputs answer it. With `combine: weighted` the
metric is the weighted mean of the tasks' accuracies (equal weights by default); with `worst` it is that of all items,
and a bound on the drop holds for every task by itself. A program is bound as for a single classification.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor

from vlmopt.core.labels import label_blocks, task_of
from vlmopt.core.program import Program
from vlmopt.core.workload import HeadBlock, Outputs
from vlmopt.tasks.answers import Answer, Slice, label_answers, label_slices, named_slices
from vlmopt.tasks.dataset import Task
from vlmopt.tasks.feeding import Feeder
from vlmopt.tasks.kinds import image_classification
from vlmopt.tasks.kinds.image_classification import ImageClassification
from vlmopt.tasks.mislabelling import mislabelled
from vlmopt.tasks.scoring import cross_entropy, is_right, percent
from vlmopt.tasks.splits import Sample


@dataclass(eq=False)
class MultiTask(ImageClassification):
    """One split; an item is an image with one task's question. `targets` are columns of all tasks' labels."""

    weights: Mapping[str, float] = field(default_factory=dict)  # by task; empty where each counts for itself

    @property
    def item_tasks(self) -> list[str]:
        return [task_of(sample.label) for sample in self.samples]

    @property
    def item_parts(self) -> Sequence[str]:
        return [""] * self.n_items if self.weights else self.item_tasks

    def head_blocks(self) -> Sequence[HeadBlock]:
        tasks = self.item_tasks
        return [
            HeadBlock([item for item, task in enumerate(tasks) if task == name], columns)
            for name, columns in label_blocks(self.labels).items()
        ]

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(self._own(outputs), self.targets) * self._item_weights()

    def item_scores(self, outputs: Outputs) -> Tensor:
        return self._hits(outputs) * self._item_weights()

    def _hits(self, outputs: Outputs) -> Tensor:
        """1 where the greatest of the task's own logits is the target's. What is not finite there is never right."""
        logits = outputs[self.component]
        is_finite = (torch.isfinite(logits) | ~self._is_own()).all(-1)
        return is_right(self._own(outputs).nan_to_num(neginf=_LOWEST), self.targets) * is_finite

    def _own(self, outputs: Outputs) -> Tensor:
        """Logits [n, K] of which only the item's task can win."""
        logits = outputs[self.component].double()
        return torch.where(self._is_own(), logits, torch.full_like(logits, -torch.inf))

    def _is_own(self) -> Tensor:
        """Whether a column is of the item's task, [n, K]."""
        mask = torch.zeros(self.n_items, len(self.labels), dtype=torch.bool)
        for block in self.head_blocks():
            mask[torch.tensor(block.rows, dtype=torch.long)[:, None], torch.tensor(block.columns)] = True
        return mask

    def _item_weights(self) -> Tensor:
        """Weights of mean 1 with which the mean over items is the weighted mean over tasks."""
        if not self.weights:
            return torch.ones(self.n_items, dtype=torch.float64)
        tasks = self.item_tasks
        counts = {name: tasks.count(name) for name in dict.fromkeys(tasks)}
        total = sum(self.weights[name] for name in counts)
        share = {name: self.weights[name] / total * self.n_items / count for name, count in counts.items()}
        return torch.tensor([share[name] for name in tasks], dtype=torch.float64)

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        hits, tasks = self._hits(outputs), self.item_tasks
        found = {self.metric: percent(self.item_scores(outputs))}
        for name in dict.fromkeys(tasks):
            rows = [item for item, task in enumerate(tasks) if task == name]
            found[f"{self.metric} of {name}"] = percent(hits[rows])
        return found

    def with_wrong_labels(self, share: float, *, seed: int) -> Self:
        """Labels are exchanged within their task."""
        targets = self.targets.clone()
        for block in self.head_blocks():
            items, first = list(block.rows), block.columns[0]
            targets[items] = first + mislabelled(targets[items] - first, len(block.columns), share, seed=seed)
        return replace(self, targets=targets)

    def answers(self, outputs: Outputs) -> Sequence[Answer]:
        found = label_answers(self._own(outputs).nan_to_num(neginf=_LOWEST), self.targets, self.labels)
        hits = self._hits(outputs).tolist()
        return [replace(answer, is_right=bool(hit)) for answer, hit in zip(found, hits, strict=True)]

    def slices(self, outputs: Outputs) -> Sequence[Slice]:
        hits = self._hits(outputs)
        return [*named_slices(self.item_tasks, hits), *label_slices(self.samples, hits)]


_LOWEST = torch.finfo(torch.float64).min


def workload(program: Program, task: Task, samples: Sequence[Sample], feeder: Feeder) -> MultiTask:
    """The workload of these samples; `program` comes from `bind`, whatever passes did to it since."""
    alone = image_classification.workload(program, task, samples, feeder)
    specification, names = task.specification, [member.specification.name for member in task.members]
    weights = specification.weights or (1.0,) * len(names)
    is_weighted = specification.combine == "weighted"
    own = {part.name: getattr(alone, part.name) for part in fields(alone)}
    own["fingerprint"] = _fingerprint(alone.fingerprint, weights if is_weighted else ())
    return MultiTask(**own, weights=dict(zip(names, weights, strict=True)) if is_weighted else {})


def _fingerprint(samples: str, weights: Sequence[float]) -> str:
    """sha256 over the samples and how the tasks are combined: both make a profile's losses."""
    return hashlib.sha256(json.dumps([samples, *weights]).encode()).hexdigest()
